"""What the kernel tests stand on: a medium with a file system of its own, commands run as somebody, and waiting for facts."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.core.facts import Fact

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify, mount and the proc connector")
EXT4 = pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs e2fsprogs (mkfs.ext4)")
DEADLINE_S = 10.0


@contextmanager
def medium(folder: Path, size_mib: int = 64) -> Iterator[Path]:
    """A stick: ext4 in an image, mounted through a loop device that goes away with the mount."""
    image, mount = folder / "stick.img", folder / "stick"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    run(f"mkfs.ext4 -q -F -N 20000 {image}")
    done = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs loop devices: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
        image.unlink()


def run(command: str, loginuid: int | None = None) -> None:
    """A shell command, which must succeed; under a login user if one is named."""

    def login() -> None:
        Path("/proc/self/loginuid").write_text(str(loginuid))

    subprocess.run(command, shell=True, check=True, capture_output=True, preexec_fn=login if loginuid is not None else None)


def until(facts: Callable[[], Iterator[Fact]], done: Callable[[list[Fact]], bool], seconds: float = DEADLINE_S) -> list[Fact]:
    """Drain again and again until `done` says enough, or fail with all that was told."""
    told: list[Fact] = []
    deadline = time.monotonic() + seconds
    while True:
        told += facts()
        if done(told):
            return told
        assert time.monotonic() < deadline, "never told; only:\n" + "\n".join(map(repr, told))
        time.sleep(0.005)  # between two looks, not instead of one
