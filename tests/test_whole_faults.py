"""The agent when numbers are given twice, clocks jump, and processes are stopped or killed in mid-storm.

Real agent, real kernel. What must hold: nothing of a former life is told of a later one, nothing that was lost goes unsaid,
and the watch goes on.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent import simulate
from agent.pytest_plugin import Agent, Media
from tests.house import as_person, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def house(sekisho_media: Media) -> Iterator[ExitStack]:
    """What is started or mounted in a test goes at its end, last first, whatever happened."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media) -> Iterator[Agent]:
    """An agent that is not started yet."""
    made = Agent(tmp_path, sekisho_media)
    yield made
    made.stop()


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def customer(agent: Agent, name: str, size: int = 30_000) -> Path:
    """A protected file, made by a program that is nobody's parent: whoever opened it might hand it to its children."""
    made = agent.protected / name
    subprocess.run(["dd", "if=/dev/urandom", f"of={made}", f"bs={size}", "count=1"], check=True, capture_output=True)
    return made


def copied(agent: Agent, name: str) -> dict[str, Any]:
    """The one event of this source."""
    agent.wait_for("file.copied_out", where=lambda event: ours(event)["protected"]["rel"] == name)
    found = [event for event in agent.events("file.copied_out") if ours(event)["protected"]["rel"] == name]
    assert len(found) == 1
    return found[0]


# -- numbers given twice ---------------------------------------------------------------------------------------------------

_SAME_PID = """
import os, sys, time
secret, target, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
inner = os.fork()
if inner == 0:
    open(secret, "rb").read()
    os._exit(0)
os.waitpid(inner, 0)
time.sleep(pause)
for _ in range(500):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(inner - 1))
    again = os.fork()
    if again == 0:
        if os.getpid() == inner:
            with open(target, "wb") as file:
                file.write(os.urandom(os.path.getsize(secret)))
            os._exit(7)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(again, 0)[1]) == 7:
        sys.exit(0)
sys.exit("the number was not given again")
"""


@pytest.mark.skipif(not LAST_PID.exists(), reason="needs CONFIG_CHECKPOINT_RESTORE (ns_last_pid), to be given a pid again")
@pytest.mark.parametrize("pause", [0.1, 1.5])
def test_a_pid_given_again_inherits_nothing(sekisho_agent: Agent, sekisho_media: Media, pause: float) -> None:
    secret = customer(sekisho_agent, "a.csv")
    stick = sekisho_media.plug("stick1", fs="ext4")
    done = subprocess.run(
        [sys.executable, "-c", _SAME_PID, secret, stick.path / "own.bin", str(pause)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sekisho_agent.wait_for("file.written")
    as_person(f"cp {secret} {stick.path}/b.csv")
    assert ours(copied(sekisho_agent, "a.csv"))["dest"]["path"] == str(stick.path / "b.csv")


@pytest.mark.parametrize("fs", ["ext4", "tmpfs"])
def test_an_inode_given_again_inherits_nothing(
    agent: Agent, sekisho_media: Media, house: ExitStack, tmp_path: Path, fs: Any
) -> None:
    """A protected file is moved out and removed; another one gets its inode number, which the file handle tells apart."""
    base = simulate.plug(
        tmp_path, "base", fs=fs
    ).path  # a file system of our own, on which inode numbers are given again at once
    house.callback(subprocess.run, ["umount", "-l", base], capture_output=True)
    run = f'[[agent.protect]]\npath = "{base}/protected"\nlabel = "customers"\n'
    (base / "protected").mkdir()
    agent.config_file.write_text(agent.config_file.read_text().replace("[agent.media]", run + "[agent.media]"))
    secret, out = base / "protected" / "a.csv", base / "a.csv"
    subprocess.run(["dd", "if=/dev/urandom", f"of={out}", "bs=30000", "count=1"], check=True, capture_output=True)
    out.rename(secret)  # ext4 numbers the files of a directory near each other: its number is to be given again out there
    agent.start()
    stick = sekisho_media.plug("stick1", fs="ext4")
    as_person(f"mv {secret} {out}")
    other = customer(agent, "other.csv")
    as_person(f"cp {other} {stick.path}/")
    copied(agent, "other.csv")  # told in order: the move was read, and the file is marked
    as_person(f"cp {out} {stick.path}/moved.csv")
    copied(agent, "a.csv")
    number = out.stat().st_ino
    out.unlink()
    own = next(
        (each for each in (base / f"own{at}" for at in range(200)) if not each.touch() and each.stat().st_ino == number), None
    )
    if own is None:
        pytest.skip(f"{fs} here gives no inode number twice within 200 files")
    own.write_bytes(os.urandom(20_000))
    as_person(f"cp {own} {stick.path}/own.bin")
    agent.wait_for("file.written")
    assert len(agent.events("file.copied_out")) == 2


# -- stopped, killed ---------------------------------------------------------------------------------------------------------

STORM = 600


def planted(agent: Agent) -> set[str]:
    """STORM small files in the protected directory, there before the agent; their names in it."""
    tree = agent.protected / "tree"
    tree.mkdir()
    for number in range(STORM):
        (tree / f"f{number}.csv").write_bytes(os.urandom(300 + number))
    return {f"tree/f{number}.csv" for number in range(STORM)}


def storm(agent: Agent, there: Path) -> None:
    """Copy them all, as fast as cp can."""
    as_person(f"cp -r {agent.protected}/tree {there}/")


def told_once(agent: Agent, names: set[str]) -> None:
    agent.wait_for("file.copied_out", len(names))
    found = Counter(ours(event)["protected"]["rel"] for event in agent.events("file.copied_out"))
    assert set(found) == names and max(found.values()) == 1


def test_an_agent_stopped_for_seconds_in_a_storm_tells_it_afterwards(agent: Agent, sekisho_media: Media) -> None:
    names = planted(agent)
    agent.start()
    stick = sekisho_media.plug("stick1", fs="ext4")
    stopped = time.monotonic()
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        storm(agent, stick.path)  # nobody waits for a stopped agent
        until(lambda: time.monotonic() > stopped + 6, "time stands still")
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    told_once(agent, names)
    assert ours(agent.wait_for("agent.gap"))["lost"]["reason"] == "stalled"


def test_what_a_killed_agent_had_not_written_yet_lies_in_the_gap_that_is_told(
    agent: Agent, sekisho_media: Media, house: ExitStack
) -> None:
    names = planted(agent)
    agent.state_dir.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=700", "tmpfs", agent.state_dir], check=True)
    house.callback(subprocess.run, ["umount", "-l", agent.state_dir], capture_output=True)
    agent.start()
    house.callback(agent.stop)
    stick = sekisho_media.plug("stick1", fs="ext4")
    filler = agent.state_dir / "filler"
    with filler.open("wb") as file:
        held = os.statvfs(agent.state_dir)
        os.posix_fallocate(file.fileno(), 0, held.f_bavail * held.f_frsize)
    before_ms = time.time_ns() // 1_000_000
    storm(agent, stick.path)
    until(lambda: agent.status()["queue"]["error"], "the disk is not full")
    alive = agent.state_dir / "alive"
    since = time.time()
    # Two signs of life later it would once have said that all is well until then.
    until(lambda: time.time() - since > 11 or alive.stat().st_mtime > since, "no sign of life", 20)
    waiting = agent.status()["queue"]["waiting"]
    agent.stop(signal.SIGKILL)
    filler.unlink()
    agent.start()
    gap = agent.wait_for("agent.gap", where=lambda event: ours(event)["lost"]["reason"] == "not_running")
    lost = len(names) - len(agent.events("file.copied_out"))
    assert 0 < lost <= waiting + 100
    assert before_ms - 6_000 <= ours(gap)["lost"]["since"] <= before_ms + 5_000


@pytest.mark.parametrize("limit", ["nofile", "hidepid", "pids"])
def test_a_narrow_machine_costs_no_copy(limit: str, tmp_path: Path, sekisho_media: Media) -> None:
    launcher = {
        "nofile": ("prlimit", "--nofile=40:40"),
        "pids": ("prlimit", "--nproc=4:4"),
        "hidepid": ("unshare", "-m", "sh", "-c", 'mount -t proc -o hidepid=invisible proc /proc && exec "$@"', "sh"),
    }[limit]
    agent = Agent(tmp_path, sekisho_media, launcher=launcher)
    names = planted(agent)
    stick = sekisho_media.plug("stick1", fs="ext4")  # before: what is mounted later may not be seen in a namespace of its own
    agent.start()
    try:
        until(lambda: agent.status()["watched_media"], "the stick is not watched")
        storm(agent, stick.path)
        told_once(agent, names)
        assert not agent.status()["blind"] or limit == "pids"
    finally:
        agent.stop()
