"""Under load and on a bad day at once: a storm of small copies while the collector is away and the disk is nearly full.

Real agent, real file systems, real collector at the end. The truth is counted file by file: every file copied out was told
in an event or is counted in an `agent.gap`, none twice. How long the writers took with and without the agent, and the
memory at its peak, are printed, not asserted on a clock. `SEKISHO_LOAD=50000` (make test-load) is the full edition.
"""

import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.pytest_plugin import Agent, Media
from agent.service import pss_kib
from tests.house import LOGIN_UID, Collector, can_set_loginuid, link_config, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: fanotify (CAP_SYS_ADMIN) and mount(8)")
FILES = int(os.environ.get("SEKISHO_LOAD", "5000"))
FOLDERS = 100
WRITERS = 2
MEMORY_MIB = 60
"""What the agent and its holder may take together (PSS), whatever happens."""
PATIENCE_S = 30 + FILES / 500


@pytest.fixture
def house(sekisho_media: Media) -> Iterator[ExitStack]:
    """What is started or mounted in a test goes at its end, last first, whatever happened."""
    with ExitStack() as stack:
        yield stack


def ours(event: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = event["unmapped"]["sekisho"]
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"


def small_disk(house: ExitStack, folder: Path, mib: int) -> Path:
    """A file system of its own at `folder`, for the agent's state."""
    image = folder.parent / f"{folder.name}.img"
    with image.open("wb") as file:
        file.truncate(mib << 20)
    folder.mkdir(mode=0o700)
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-i", "4096", image)
    run("mount", "-o", "loop", image, folder)
    house.callback(image.unlink)
    house.callback(subprocess.run, ["umount", "-l", folder], capture_output=True)
    folder.chmod(0o700)
    return folder


def fill(disk: Path, share: float) -> Path:
    """Make `disk` full up to `share` of its blocks; the file to remove when there shall be room again."""
    held, filler = os.statvfs(disk), disk / "filler"
    spare = held.f_bavail - int(held.f_blocks * (1 - share))
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, spare) * held.f_frsize)
    return filler


def plant(tree: Path) -> set[str]:
    """FILES small files of different sizes, a tree for each writer; their paths below the protected directory."""
    made = set()
    for number in range(FILES):
        folder = tree / f"part{number % WRITERS}" / f"d{number % FOLDERS}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}.csv").write_bytes(os.urandom(300 + number % 3_000))
        made.add(str((folder / f"f{number}.csv").relative_to(tree.parent)))
    return made


def copy_all(source: Path, there: Path) -> float:
    """Everything below `source`, by several people's programs at once; seconds until the last one was done."""

    def login() -> None:
        if can:
            Path("/proc/self/loginuid").write_text(str(LOGIN_UID))

    can = can_set_loginuid()
    there.mkdir()
    began = time.monotonic()
    running = [subprocess.Popen(["cp", "-r", part, there], preexec_fn=login) for part in source.iterdir()]
    assert not any(each.wait(600) for each in running)
    return time.monotonic() - began


class Memory:
    """The highest PSS of the agent with its children, looked at all the time while the block runs."""

    def __init__(self, agent: Agent) -> None:
        self._pid, self._end = agent.pid, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peak_mib = 0.0

    def _look(self) -> None:
        while not self._end.wait(0.1):
            children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
            self.peak_mib = max(self.peak_mib, pss_kib([self._pid, *map(int, children)]) / 1024)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def lost(events: list[dict[str, Any]]) -> Counter[str]:
    """Events counted as lost, by reason."""
    counts: Counter[str] = Counter()
    for event in events:
        if event["metadata"]["event_code"] == "agent.gap":
            told = ours(event)["lost"]
            assert "count" in told or told["reason"] in ("stopped", "not_running", "stalled"), told
            counts[told["reason"]] += told.get("count", 0)
    return counts


def account(agent: Agent) -> str:
    """What matters of the status, for when a wait fails."""
    status = agent.status()
    return str({each: status.get(each) for each in ("queue", "spool", "collector", "counts")})


@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs e2fsprogs (mkfs.ext4)")
@pytest.mark.parametrize("room", ["a full disk", "a full spool"])
def test_nothing_of_a_storm_is_lost_uncounted(
    room: str, house: ExitStack, tmp_path: Path, sekisho_media: Media, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(house, tmp_path / "state", 24 + FILES // 1_000 if room == "a full disk" else 512)
    collector = Collector(tmp_path)
    spool = f'[agent.spool]\nmax_bytes = "{"1GiB" if room == "a full disk" else f"{1 + FILES // 10_000}MiB"}"\n'
    agent = Agent(tmp_path, sekisho_media, link_config(collector) + spool)
    copied = plant(agent.protected / "tree")
    medium = small_disk(house, sekisho_media.root / "stick1", 64 + FILES // 64)
    assert sekisho_media.plug("stick1").path == medium
    alone_s = copy_all(agent.protected / "tree", medium / "before")
    filler = fill(disk, 0.95)
    agent.start()
    house.callback(agent.stop)
    with Memory(agent) as memory:
        watched_s = copy_all(agent.protected / "tree", medium / "copies")

        def at_rest() -> bool:
            status = agent.status()
            queue = status.get("queue", {"waiting": 1, "error": ""})
            return bool(status and not status["counts"]["waiting"] and (queue["error"] or not queue["waiting"]))

        until(at_rest, lambda: account(agent), PATIENCE_S)
        seen = agent.status()
        filler.unlink()
        collector.start()
        house.callback(collector.stop)

        def delivered() -> bool:
            status = agent.status()
            if not status or not status["collector"]["last_receipt"]:
                return False
            return not (status["queue"]["waiting"] or status["collector"]["backlog"] or status["spool"]["losses_untold"])

        until(delivered, lambda: account(agent), PATIENCE_S)
    events = collector.events()
    told = Counter(ours(event)["protected"]["rel"] for event in events if event["metadata"]["event_code"] == "file.copied_out")
    gaps = lost(events)
    with capsys.disabled():
        print(
            f"\n{room}: {FILES} copies by {WRITERS} writers in {alone_s:.1f} s without, {watched_s:.1f} s with the agent"
            f" ({watched_s / alone_s:.2f}×); {len(told)} told, lost and counted {dict(gaps)};"
            f" {seen['queue']['waiting']} waited in memory; memory at its peak {memory.peak_mib:.1f} MiB"
        )
    assert told.keys() <= copied and max(told.values()) == 1
    others = sum(event["metadata"]["event_code"] != "file.copied_out" for event in events)
    assert FILES <= len(told) + sum(gaps.values()) <= FILES + others + 50, "each is told or counted, and not counted for more"
    assert memory.peak_mib <= MEMORY_MIB
