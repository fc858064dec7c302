"""Users' FUSE mounts: what is finished on one is told, and neither its server nor its owner can stop the agent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.facts import Closed, Fact, Lost
from agent.core.pipeline import MountWatch
from agent.sense import shares
from agent.sense.fanotify import Fanotify
from agent.sense.mounts import Mounts
from agent.sense.shares import Shares
from agent.watching import Watching
from tests import silent_fuse
from tests.far import NEEDS

UID = 65534
pytestmark = [NEEDS, pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a server's file system for a user; what is given are the requests that it does not answer."""
    path, servers = tmp_path / "mount", list[subprocess.Popen[str]]()
    path.mkdir()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o111)

    def mounted(*silent: int) -> Path:
        arguments = [sys.executable, silent_fuse.__file__, str(path), str(UID), *map(str, silent)]
        servers.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        assert servers[0].stdout is not None
        if servers[0].stdout.readline() != "mounted\n":
            pytest.skip("needs leave to mount FUSE file systems")
        return path

    yield mounted
    for server in servers:
        subprocess.run(["umount", "-l", path], capture_output=True)
        server.kill()
        server.communicate()


@pytest.fixture
def sensor(tmp_path: Path) -> Iterator[Shares]:
    made = Shares()
    yield made
    made.close()
    subprocess.run(["umount", "-f", "-l", tmp_path / "mount"], capture_output=True)  # aborts what waits for the server
    deadline = time.monotonic() + 10
    while made._ending and time.monotonic() < deadline:
        made.check(now_ms())
        time.sleep(0.01)
    assert not made._ending, "a small process is left, though its mount and server are gone"


def until(sensor: Shares, holds: Callable[[list[Fact]], bool]) -> list[Fact]:
    told: list[Fact] = []
    deadline = time.monotonic() + 10
    while not holds(told):
        assert time.monotonic() < deadline, f"{told}; {sensor.coverage(0).why}"
        sensor.check(now_ms())
        told += sensor.drain(now_ms())
        time.sleep(0.01)
    return told


def follow(sensor: Shares, path: Path) -> float:
    """The agent comes to know of the mount; how long that took."""
    files, mounts = Fanotify(), Mounts()
    list(mounts.drain(now_ms()))
    began = time.monotonic()
    wanted = [MountWatch(1, str(path), 0, str(path), False, False)]
    try:
        list(Watching(files, None, mounts, sensor).follow(wanted, now_ms(), None))
        assert os.getresuid() == (0, 0, 0)
    finally:
        files.close()
        mounts.close()
    return time.monotonic() - began


def write(path: Path) -> int:
    """As its owner, write to the file; the pid."""
    person = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"]
    writer = subprocess.Popen([*person, "dd", f"of={path}/f", "conv=notrunc", "status=none"], stdin=subprocess.PIPE)
    writer.communicate(b"0123456789")
    return writer.pid


def test_what_is_finished_on_a_users_mount_is_told(mount: Callable[..., Path], sensor: Shares) -> None:
    path = mount()
    follow(sensor, path)
    until(sensor, lambda _: not sensor.coverage(0).why)
    pid = write(path)
    (fact,) = (each for each in until(sensor, bool) if isinstance(each, Closed))
    assert (fact.pid, fact.path, fact.size) == (pid, f"{path}/f", silent_fuse.SIZE)
    assert sensor.coverage(0).ok and "medium_renames" in sensor.coverage(0).blind


def test_a_server_that_never_answers_holds_up_nobody(mount: Callable[..., Path], sensor: Shares) -> None:
    path = mount(silent_fuse.STATFS, silent_fuse.GETATTR)
    assert follow(sensor, path) < 1
    until(sensor, lambda _: not sensor.coverage(0).why)
    write(path)
    lost = until(sensor, lambda told: any(isinstance(each, Lost) for each in told))
    assert [each.reason for each in lost if isinstance(each, Lost)] == ["share_unwatched"]
    said = sensor.coverage(0)
    assert not said.ok and "medium_not_watched" in said.blind and str(path) in said.why


def test_who_ends_the_process_that_watches_his_mount_is_told_of(
    mount: Callable[..., Path], sensor: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mount()
    follow(sensor, path)
    until(sensor, lambda _: not sensor.coverage(0).why)
    (watcher,) = sensor.pids
    monkeypatch.setattr(shares, "AGAIN_S", 0.0)
    os.kill(watcher, signal.SIGKILL)
    until(sensor, lambda told: any(isinstance(each, Lost) and each.reason == "share_unwatched" for each in told))
    until(sensor, lambda _: not sensor.coverage(0).why)  # and it is watched anew
    assert sensor.pids and sensor.pids != {watcher}
