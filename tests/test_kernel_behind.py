"""What lies behind a FUSE file system whose source says nothing (dislocker, VeraCrypt): by what its real server holds open."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel_lab import EXT4, ROOT, medium

from agent.core.facts import Device, Mounted, Plugged
from agent.core.media import Media
from agent.sense.mounts import Mounts
from tests import silent_fuse

_NAMED_SINCE = (6, 14)
pytestmark = [
    ROOT,
    EXT4,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse"),
    pytest.mark.skipif(
        tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) < _NAMED_SINCE,
        reason="needs Linux 6.14: fdinfo of /dev/fuse names the connection",
    ),
]
Serve = Callable[[int], Path]


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Path]:
    with medium(tmp_path) as mount:
        yield mount


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Mounts a server's file system that holds one more descriptor."""
    path, servers = tmp_path / "view", list[subprocess.Popen[str]]()
    path.mkdir()

    def served(fd: int) -> Path:
        arguments = [sys.executable, silent_fuse.__file__, str(path), "0"]
        servers.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, pass_fds=[fd]))
        assert servers[0].stdout is not None
        if servers[0].stdout.readline() != "mounted\n":
            pytest.skip("needs leave to mount FUSE file systems")
        return path

    yield served
    subprocess.run(["umount", "-l", path], capture_output=True, check=False)
    for server in servers:
        server.kill()
        server.communicate()


def told() -> dict[str, Mounted]:
    sensor = Mounts()
    try:
        return {each.mount: each for each in sensor.drain(time.time_ns() // 1_000_000) if isinstance(each, Mounted)}
    finally:
        sensor.close()


def owner_of(view: Path, stick: Path) -> str:
    """The id of the medium that the view is taken for."""
    mounts, media = told(), Media()
    device = Device(id="stick", bus="usb", interfaces=["08:06:50"], nodes=[mounts[str(stick)].dev])
    media.plugged(Plugged(at_ms=1, device=device))
    media.mounted(mounts[str(stick)])
    mount = media.mounted(mounts[str(view)])
    assert mount is not None and mount.view
    return mount.medium.id


def test_a_view_of_a_sticks_own_device_is_the_stick(stick: Path, serve: Serve) -> None:
    fd = os.open(told()[str(stick)].source, os.O_RDONLY)
    try:
        assert owner_of(serve(fd), stick) == "stick"
    finally:
        os.close(fd)


def test_a_view_of_a_container_on_the_stick_is_the_stick(stick: Path, serve: Serve) -> None:
    (stick / "container.hc").write_bytes(bytes(4096))
    fd = os.open(stick / "container.hc", os.O_RDWR)
    try:
        assert owner_of(serve(fd), stick) == "stick"
    finally:
        os.close(fd)


def test_a_server_that_only_logs_onto_the_stick_is_another(stick: Path, serve: Serve) -> None:
    fd = os.open(stick / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        view = serve(fd)
        assert told()[str(view)].holds == []
    finally:
        os.close(fd)
