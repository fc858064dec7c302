"""How fast may files be opened before the agent loses something or lags behind, and what do others tell of the same?

A C program opens, reads and closes protected files, or creates files on the medium, as fast as one or more processes can.
Told are the rate with each tool and without, how long after the last file it was done, how many of the files it told, its CPU
for each file that it told, and what the agent says it lost (`agent.gap`).

    python -m bench.storm [-r ROUNDS] [--files N]
"""

import argparse
import shutil
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench import ground
from bench.ground import Sekisho


@dataclass
class Storm:
    """One storm: `opens` opens of `files` files by `processes` at once, of which the tool `told` so many files."""

    kind: str
    processes: int
    tool: str
    opens: int
    files: int
    told: int
    wall_s: float
    lag_s: float
    tool_cpu_s: float
    lost: int


def build(place: ground.Ground) -> Path:
    """Compile the C program."""
    if not shutil.which("gcc"):
        raise ground.CannotMeasure("the storm needs gcc; install gcc and libc6-dev")
    made = place.root / "storm"
    ground.run(["gcc", "-O2", "-o", str(made), str(Path(__file__).with_name("storm.c"))])
    return made


def blow(program: Path, place: ground.Ground, tool: str, *, kind: str, processes: int, files: int) -> Storm:
    """One storm under one tool."""
    folders = [(place.protected if kind == "read" else place.medium) / f"storm{number}" for number in range(processes)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if kind == "read":
            for number in range(files):
                (folder / f"f{number}").write_bytes(b"x" * 1000)
    loops = 3 if kind == "read" else 1
    ground.run(["sync"])
    with ground.watching(tool, place) as watcher:
        began = time.monotonic()
        storms = [
            subprocess.Popen([str(program), kind, str(folder), str(files), str(loops)], stdout=subprocess.DEVNULL)
            for folder in folders
        ]
        codes = [storm.wait() for storm in storms]
        if any(codes):
            raise ground.CannotMeasure("the storm failed")
        wall = time.monotonic() - began
        watcher.settle()
        lag = max(0.0, time.monotonic() - began - wall - 0.9) if tool != "off" else 0.0  # settle looks for 0.9 s of rest
        lost = 0
        if isinstance(watcher, Sekisho):
            gaps = [event for event in watcher.events() if event["metadata"]["event_code"] == "agent.gap"]
            reasons = [event["unmapped"]["sekisho"]["lost"]["reason"] for event in gaps]
            lost = sum(reason not in ("not_running", "stopped") for reason in reasons)
    told = sum(watcher.told(folder, "") for folder in folders)
    if isinstance(watcher, Sekisho):
        told = min(files * processes, told_by(watcher, kind))
    return Storm(kind, processes, tool, files * loops * processes, files * processes, told, wall, lag, watcher.used_s(), lost)


def told_by(agent: Sekisho, kind: str) -> int:
    """Files in the agent's events: those written one by one; of reads its summaries count opens, without those that the kernel
    merged with one before."""
    code = "file.written" if kind == "write" else "file.history"
    events = [event for event in agent.events() if event["metadata"]["event_code"] == code]
    return len(events) if kind == "write" else sum(event["unmapped"]["sekisho"]["detail"]["reads"] for event in events)


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-r", "--rounds", type=int, default=2)
    args.add_argument("--files", type=int, default=60_000)
    given = args.parse_args()
    runs: list[Storm] = []
    with ground.ground("storm", 4, 3) as place:
        program = build(place)
        cases = [("read", 1), ("read", 3), ("write", 1), ("write", 2)]
        tools = ground.available(["off", "sekisho", "fatrace", "watchdog"])
        for number in range(given.rounds):
            for kind, processes in cases:
                for tool in tools if number % 2 else reversed(tools):
                    files = given.files if kind == "read" else given.files // 2
                    blown = partial(blow, program, place, tool, kind=kind, processes=processes, files=files)
                    runs.append(ground.again(blown))
                    print(runs[-1], flush=True)
    rows = []
    for kind, processes in cases:
        for tool in tools:
            mine = [run for run in runs if (run.kind, run.processes, run.tool) == (kind, processes, tool)]
            rate = ground.spread([run.opens / run.wall_s for run in mine], 0)
            cells = ["", "", "", ""]
            if tool != "off":
                each = statistics.median(run.tool_cpu_s / max(1, run.told) for run in mine) * 1e6
                told = statistics.median(run.told / run.files for run in mine)
                lost = str(sum(run.lost for run in mine)) if tool == "sekisho" else "–"
                cells = [ground.spread([run.lag_s for run in mine], 1), f"{told:.0%}", f"{each:.1f}", lost]
            what = "protected files read, three times" if kind == "read" else "files made on the medium"
            rows.append([what, str(processes), tool, rate, *cells])
    head = ["storm", "processes", "tool", "opens a second", "done after, s", "files told", "CPU µs a file told", "gaps told"]
    ground.report("storm", {"Storms": ground.table(head, rows)}, [asdict(run) for run in runs])


if __name__ == "__main__":
    ground.main(main)
