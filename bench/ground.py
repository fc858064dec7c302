"""The ground every measurement stands on: scratch file systems, the tools compared, how CPU, memory and ratios are taken.

Owns: two loop-mounted ext4 images (a disk with protected and other files, a medium), starting and ending a tool and
waiting until it is idle, and the arithmetic of interleaved rounds. Must not know which work is measured. Everything lives
under one folder ($SEKISHO_BENCH_DIR, default /var/tmp/sekisho-bench), is unmounted at the end, and is removed unless
SEKISHO_BENCH_KEEP is set.
"""

import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agent import checkup, simulate
from agent.spool import read_events

BASE = Path(os.environ.get("SEKISHO_BENCH_DIR") or "/var/tmp/sekisho-bench")
TICK = os.sysconf("SC_CLK_TCK")
Measured = TypeVar("Measured")
SOMEBODY = 1000
"""The login uid the measured work runs under, where the kernel lets us set one."""


class CannotMeasure(Exception):
    """This machine lacks something; str() says what."""


# -- the two file systems ----------------------------------------------------------------------------------------------


@dataclass
class Ground:
    """`disk` holds `protected` and `other`; `medium` is a file system of its own under the agent's `media` directory."""

    root: Path
    disk: Path = field(init=False)
    protected: Path = field(init=False)
    other: Path = field(init=False)
    media: Path = field(init=False)
    medium: Path = field(init=False)

    def __post_init__(self) -> None:
        self.disk = self.root / "disk"
        self.protected = self.disk / "protected"
        self.other = self.disk / "other"
        self.media = self.root / "media"
        self.medium = self.media / "stick"


@contextlib.contextmanager
def ground(name: str, disk_gib: int = 8, medium_gib: int = 6) -> Iterator[Ground]:
    """Mount the scratch file systems for one program, and take them away again. Needs root."""
    if os.geteuid() != 0:
        raise CannotMeasure("mounting the scratch file systems needs root")
    place = Ground(BASE / name)
    shutil.rmtree(place.root, ignore_errors=True) if not os.path.ismount(place.disk) else None
    mounted: list[Path] = []
    try:
        for image, at, size in (("disk.img", place.disk, disk_gib), ("medium.img", place.medium, medium_gib)):
            at.mkdir(parents=True, exist_ok=True)
            with (place.root / image).open("wb") as file:
                file.truncate(size << 30)
            run(["mkfs.ext4", "-q", "-F", "-N", "400000", "-E", "lazy_itable_init=0", str(place.root / image)])
            run(["mount", "-o", "loop,noatime", str(place.root / image), str(at)])
            mounted.append(at)
        place.protected.mkdir()
        place.other.mkdir()
        yield place
    finally:
        for at in reversed(mounted):
            run(["umount", "-l", str(at)])
        if not os.environ.get("SEKISHO_BENCH_KEEP"):
            shutil.rmtree(place.root, ignore_errors=True)


SUFFIX = ".txt"
"""What planted files end in, so that directories are not counted as files told."""


def plant(tree: Path, directories: int = 1000, files_each: int = 50) -> int:
    """Many small files (200 to 3,200 bytes, random): `directories` × `files_each`. Returns how many."""
    chance = random.Random(2014)
    for number in range(directories):
        folder = tree / f"d{number // 50}" / f"s{number}"
        folder.mkdir(parents=True)
        for file in range(files_each):
            (folder / f"f{file}{SUFFIX}").write_bytes(chance.randbytes(200 + (file * 53) % 3000))
    return directories * files_each


# -- processes ---------------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and its living children."""
    with contextlib.suppress(OSError):
        return [pid, *(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return [pid]


def cpu_s(pids: Sequence[int]) -> float:
    """User and system seconds these processes have used; what the kernel charges to others is not in it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            found = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(found[11]) + int(found[12])
    return total / TICK


def memory_kib(pids: Sequence[int], key: str = "Pss") -> int:
    """PSS (or Rss; "Uss" is private clean and dirty) of processes together, from smaps_rollup."""
    keys = ("Private_Clean", "Private_Dirty") if key == "Uss" else (key,)
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.partition(":")[0] in keys:
                    total += int(line.split()[1])
    return total


def run(command: Sequence[str]) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@dataclass
class Took:
    """What one run of the work cost: wall clock, and the user and system seconds of its own processes."""

    wall_s: float
    cpu_s: float


def timed(command: str, cwd: Path | None = None) -> Took:
    """Run a shell line as somebody who logged in, and time it. Fails if the work fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=cwd,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_login,
    )
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _login() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/loginuid").write_text(str(SOMEBODY))


# -- the tools compared ------------------------------------------------------------------------------------------------

WATCHDOG = """
import signal, sys, threading
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer
class Write(FileSystemEventHandler):
    def on_any_event(self, event):
        if not event.is_directory:
            out.write(f"{event.event_type} {event.src_path}\\n")
out, done, observer = open(sys.argv[1], "w"), threading.Event(), Observer()
for path in sys.argv[2:]:
    observer.schedule(Write(), path, recursive=True)
observer.start()
signal.signal(signal.SIGTERM, lambda *_: done.set())
print("ready", flush=True)
done.wait()
observer.stop()
observer.join()
out.close()
"""


MARKS = """
import os, select, sys, time
from agent.sense.fanotify import Fanotify
files = Fanotify()
files.watch_tree(sys.argv[1])
files.watch_medium(sys.argv[2], True)
print("ready", flush=True)
waiting = select.poll()
waiting.register(files.fileno(), select.POLLIN)
while True:
    waiting.poll()
    try:
        os.read(files._group, 1 << 18)
    except BlockingIOError:
        pass
    time.sleep(0.01)
"""


class Tool:
    """Something that watches while work is done. Once stopped, `told` counts the distinct files that it named."""

    def __init__(self, place: Ground, scratch: Path) -> None:
        self.place, self.scratch = place, scratch
        self.process: subprocess.Popen[Any] | None = None
        self.at_start_s = self.ended_s = 0.0

    def start(self) -> None:
        """Begin to watch; returns once everything is marked."""

    def settle(self) -> None:
        """Wait until it has worked off what it was told: no CPU used for a while."""
        if self.process is None:
            return
        deadline = time.monotonic() + 300
        last = cpu_s(self.pids)
        quiet = 0
        while quiet < 3:
            time.sleep(0.3)
            now = cpu_s(self.pids)
            quiet = quiet + 1 if now - last <= 0.011 else 0
            last = now
            if time.monotonic() > deadline:
                raise CannotMeasure(f"{type(self).__name__} does not come to rest")

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return family(self.process.pid) if self.process else []

    def used_s(self) -> float:
        """CPU seconds from when it was ready to its end, once it is stopped: what it does last is its work too."""
        return self.ended_s - self.at_start_s

    def ready(self) -> None:
        """Count CPU from here."""
        self.at_start_s = cpu_s(self.pids)

    def told(self, folder: Path, suffix: str = SUFFIX) -> int:
        """How many distinct files below `folder`, with names that end so, its record names."""
        return 0

    def stop(self) -> None:
        """End it, and take what it used, with what its own children used."""
        if self.process is not None:
            if self.process.poll() is not None:
                raise CannotMeasure(f"{type(self).__name__} ended by itself, with {self.process.returncode}")
            self.process.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.ended_s = usage.ru_utime + usage.ru_stime
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()
            self.process = None


class Off(Tool):
    """Nothing watches."""


class Sekisho(Tool):
    """The real agent, with the disk's folder protected and the medium plugged as a simulated one over its own mount."""

    more = ""
    medium: simulate.Medium | None = None

    def start(self) -> None:
        """Start `sekisho-agent run` and wait until it says that it watches both."""
        self.state = self.scratch / "state"
        shutil.rmtree(self.state, ignore_errors=True)
        config = self.scratch / "config.toml"
        config.write_text(
            f'[agent]\nname = "bench"\nstate_dir = "{self.state}"\n'
            f'[[agent.protect]]\npath = "{self.place.protected}"\nlabel = "customers"\n'
            f'[agent.media]\nsimulated_dir = "{self.place.media}"\n'
            '[agent.spool]\nmax_bytes = "1GiB"\n' + self.more
        )
        self.log = (self.scratch / "agent.log").open("ab")
        compiled = {**os.environ, "PYTHONPYCACHEPREFIX": str(BASE / "compiled")}  # as an installed agent is, wherever this runs
        compiled.pop("PYTHONDONTWRITEBYTECODE", None)
        subprocess.run(
            [sys.executable, "-c", "import agent.cli, agent.daemon, agent.sense.udev, requests"], env=compiled, check=False
        )
        self.process = subprocess.Popen(self.command(config), stdout=self.log, stderr=self.log, env=compiled)
        self.until(lambda status: all(each["watched"] for each in status["protected"]), "does not start")
        self.medium = simulate.plug(self.place.media, "stick", serial="BENCH0001")
        self.until(lambda status: str(self.place.medium) in status["watched_media"], "does not watch the medium")
        self.settle()
        self.ready()

    def command(self, config: Path) -> list[str]:
        """How it is started."""
        return [sys.executable, "-m", "agent.cli", "run", "-c", str(config)]

    def status(self) -> dict[str, Any]:
        """What `sekisho-agent status --json` says."""
        return checkup.ask(str(self.state))

    def until(self, holds: Callable[[dict[str, Any]], bool], otherwise: str) -> None:
        """Wait for something its status says."""
        deadline = time.monotonic() + 120
        while True:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise CannotMeasure(f"the agent {otherwise}: {(self.scratch / 'agent.log').read_text()[-2000:]}")
            with contextlib.suppress(checkup.NotRunning):
                if holds(self.status()):
                    return
            time.sleep(0.05)

    def events(self) -> Iterator[dict[str, Any]]:
        """What it recorded."""
        for _, data in read_events(str(self.state)):
            yield json.loads(data)

    def told(self, folder: Path, suffix: str = SUFFIX) -> int:
        """Distinct files below `folder` named as a source in its events; where only read, those counted in its history."""
        sources: set[str] = set()
        counted = 0
        for event in self.events():
            own = event["unmapped"]["sekisho"]
            path = own.get("source", {}).get("path", "")
            if path.startswith(f"{folder}/"):
                sources.add(path)
            if event["metadata"]["event_code"] == "file.history":
                counted += own["detail"]["reads"]
        return len(sources) or counted

    def stop(self) -> None:
        """Pull the medium's descriptor (the mount stays) and end the agent."""
        if self.process is not None:
            if self.medium is not None:
                self.medium.descriptor_path.unlink(missing_ok=True)
            super().stop()
            self.log.close()


class Marks(Tool):
    """The agent's own notification marks, and a reader that throws away what it reads: what the kernel's part costs."""

    def start(self) -> None:
        """Start and wait for its word."""
        command = [sys.executable, "-c", MARKS, str(self.place.protected), str(self.place.medium)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise CannotMeasure("the marks can't be set")
        self.ready()


class _Lines(Tool):
    """A tool that writes one line an event, with the path in it."""

    @property
    def out(self) -> Path:
        return self.scratch / f"{type(self).__name__}.out"

    def told(self, folder: Path, suffix: str = SUFFIX) -> int:
        """Distinct paths below `folder` in its output."""
        needle, found = f"{folder}/".encode(), set()
        with self.out.open("rb") as lines:
            for line in lines:
                line = line.strip()
                at = line.find(needle)
                if at >= 0 and line.endswith(suffix.encode()):
                    found.add(line[at:])
        return len(found)

    def clear(self) -> None:
        """Start with an empty record."""
        self.out.unlink(missing_ok=True)


class Fatrace(_Lines):
    """fatrace as its user starts it: every mount it finds, all events, one line each with program and pid."""

    def start(self) -> None:
        """Start; it says nothing when ready, so wait until it is idle."""
        self.clear()
        self.process = subprocess.Popen(["fatrace", "-o", str(self.out)], stderr=subprocess.DEVNULL)
        time.sleep(1)
        self.settle()
        self.ready()


class Watchdog(_Lines):
    """A short program over the watchdog library (inotify); it names no process."""

    def start(self) -> None:
        """Start and wait for its word."""
        self.clear()
        command = [sys.executable, "-c", WATCHDOG, str(self.out), str(self.place.protected), str(self.place.medium)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.settle()
        self.ready()


class Inotifywait(_Lines):
    """inotifywait -m -r; it names no process and misses files in directories made while it runs."""

    def start(self) -> None:
        """Start and wait until its watches stand."""
        self.clear()
        command = ["inotifywait", "-m", "-r", "-o", str(self.out), "--format", "%e %w%f"]
        command += ["-e", "open,close_write,create,moved_to", str(self.place.protected), str(self.place.medium)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "established" in line:
                break
        self.ready()


TOOLS: dict[str, type[Tool]] = {
    "off": Off,
    "sekisho": Sekisho,
    "marks": Marks,
    "fatrace": Fatrace,
    "watchdog": Watchdog,
    "inotifywait": Inotifywait,
}


def available(names: Sequence[str]) -> list[str]:
    """Those of the named tools that are installed; says which are not."""
    found = []
    for name in names:
        needs = {"fatrace": "fatrace", "inotifywait": "inotifywait"}.get(name)
        if needs and not shutil.which(needs):
            print(f"{name} is left out: {needs} is not installed", file=sys.stderr)
        else:
            found.append(name)
    return found


@contextlib.contextmanager
def watching(name: str, place: Ground, kind: type[Tool] | None = None) -> Iterator[Tool]:
    """A tool that watches until the block ends."""
    scratch = place.root / "scratch"
    scratch.mkdir(exist_ok=True)
    tool = (kind or TOOLS[name])(place, scratch)
    try:
        tool.start()
        yield tool
    finally:
        tool.stop()


def again(run: Callable[[], Measured], times: int = 3) -> Measured:
    """What `run` measured; once more if a tool ended by itself, as fatrace does when some mount of the machine goes."""
    for _ in range(times - 1):
        try:
            return run()
        except CannotMeasure as error:
            print(f"once more: {error}", file=sys.stderr)
    return run()


# -- figures -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "median (min–max)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def machine() -> dict[str, Any]:
    """Where this was measured."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    with Path("/proc/meminfo").open() as lines:
        memory = int(next(lines).split()[1]) >> 20
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(each, 2) for each in os.getloadavg()],
        "at": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def report(program: str, tables: dict[str, str], raw: Any) -> None:
    """Print the tables, then one JSON object with the raw figures; keep it in $SEKISHO_BENCH_OUT if that names a folder."""
    document = {"program": program, "machine": machine(), "raw": raw}
    for title, text in tables.items():
        print(f"\n### {title}\n\n{text}")
    encoded = json.dumps(document, ensure_ascii=False)
    print(f"\n{encoded}", flush=True)
    if folder := os.environ.get("SEKISHO_BENCH_OUT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{program}.json").write_text(encoded + "\n")
        Path(folder, f"{program}.md").write_text("\n\n".join(f"### {title}\n\n{text}" for title, text in tables.items()) + "\n")


def main(measure: Callable[[], None]) -> None:
    """Run a program's measurement; what this machine lacks is one sentence and exit code 2."""
    try:
        measure()
    except (CannotMeasure, simulate.SimulationError) as error:
        print(f"{error}", file=sys.stderr)
        raise SystemExit(2) from None
