"""How much slower does work on protected files get, and what does each tool spend per file it tells?

Over the protected tree (30,000 small files): `cp -r` onto a medium, `cp -r` to another folder, `tar | cat`, `grep -r`,
with the agent, its marks alone, fatrace, watchdog and inotifywait.
Every round runs every tool once, in turning order, so a slow minute of the machine hits all; ratios are taken within a
round. The work's own CPU seconds are given beside its wall clock: other load disturbs them less.

    python -m bench.overhead [-r ROUNDS] [--files N] [-w WORK …] [-m TOOL …]
"""

import argparse
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench import ground
from bench.ground import Ground


@dataclass
class Work:
    """`command` is timed; `before` puts things back. `told_in`: the folder whose files a tool should name."""

    name: str
    command: str
    before: Callable[[], None]
    told_in: Path | None = None
    files: int = 0


@dataclass
class Run:
    """One run of one work under one tool."""

    work: str
    tool: str
    wall_s: float
    work_cpu_s: float
    tool_cpu_s: float
    told: int
    pss_kib: int


def inside(place: Ground, files: int) -> list[Work]:
    """Work over the protected tree."""
    tree = place.protected / "tree"
    ground.plant(tree, max(1, files // 50))
    there, medium = place.other / "copy", place.medium / "copy"

    def clean() -> None:
        for each in (there, medium):
            shutil.rmtree(each, ignore_errors=True)
        _settle_disks(place)

    return [
        Work("cp -r onto the medium", f"cp -r {tree} {medium}", clean, tree, files),
        Work("cp -r beside it", f"cp -r {tree} {there}", clean, tree, files),
        Work("tar | cat", f"tar cf - {tree} | cat >/dev/null", clean, tree, files),
        Work("grep -r", f"grep -rq zzzzqqqq {tree} || true", clean, tree, files),
    ]


def _settle_disks(place: Ground) -> None:
    """What an earlier run left in the write cache must not be written during this one."""
    ground.run(["sync", "-f", str(place.medium)])
    ground.run(["sync", "-f", str(place.disk)])


def once(place: Ground, work: Work, tool: str) -> Run:
    """One run: things put back, the tool watching, the work timed, the tool waited for."""
    work.before()
    with ground.watching(tool, place) as watcher:
        took = ground.timed(work.command)
        watcher.settle()
        pss = ground.memory_kib(watcher.pids)
    used, told = watcher.used_s(), watcher.told(work.told_in) if work.told_in else 0
    return Run(work.name, tool, took.wall_s, took.cpu_s, used, told, pss)


def measure(place: Ground, works: list[Work], tools: list[str], rounds: int) -> list[Run]:
    """All works under all tools, interleaved; one round before, unrecorded, warms the caches."""
    runs: list[Run] = []
    for work in works:
        once(place, work, "off")
        for number in range(rounds):
            turn = number % len(tools)
            runs += [ground.again(partial(once, place, work, tool)) for tool in (*tools[turn:], *tools[:turn])]
            print(
                work.name, "round", number + 1, {each.tool: round(each.wall_s, 2) for each in runs[-len(tools) :]}, flush=True
            )
    return runs


def summary(works: list[Work], tools: list[str], runs: list[Run]) -> str:
    """The table: ratios within rounds, and CPU per file told."""
    rows = []
    for work in works:
        mine = {tool: [run for run in runs if run.work == work.name and run.tool == tool] for tool in tools}
        off = mine["off"]
        base = f"{statistics.median(run.wall_s for run in off):.2f} s"
        rows.append([work.name, "off", base, "", "", "", "", ""])
        for tool in tools:
            if tool == "off":
                continue
            wall = [run.wall_s / other.wall_s for run, other in zip(mine[tool], off, strict=True)]
            cpu = [run.work_cpu_s / other.work_cpu_s for run, other in zip(mine[tool], off, strict=True)]
            told = statistics.median(run.told for run in mine[tool])
            used = statistics.median(run.tool_cpu_s for run in mine[tool])
            each = f"{used / told * 1e6:.0f} µs" if told else "–"
            seen = f"{told:.0f} of {work.files}" if work.files else "–"
            pss = f"{statistics.median(run.pss_kib for run in mine[tool]) / 1024:.0f} MiB"
            rows.append(["", tool, "×" + ground.spread(wall), "×" + ground.spread(cpu), f"{used:.2f} s", seen, each, pss])
    head = ["work", "tool", "wall", "the work's own CPU", "the tool's CPU", "files told", "CPU per file told", "PSS"]
    return ground.table(head, rows)


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-r", "--rounds", type=int, default=3)
    args.add_argument("--files", type=int, default=30_000)
    args.add_argument("-w", "--work", action="append", help="only works whose name contains this")
    args.add_argument("-m", "--tool", action="append", choices=list(ground.TOOLS), help="only these (off is always run)")
    given = args.parse_args()
    usual = ["sekisho", "marks", "fatrace", "watchdog", "inotifywait"]
    tools = ground.available(["off", *(tool for tool in given.tool or usual if tool != "off")])
    with ground.ground("overhead") as place:
        works = [work for work in inside(place, given.files) if not given.work or any(word in work.name for word in given.work)]
        runs = measure(place, works, tools, given.rounds)
        tables = {"Work on protected files": summary(works, tools, runs)}
        ground.report("overhead_inside", tables, [asdict(run) for run in runs])


if __name__ == "__main__":
    ground.main(main)
