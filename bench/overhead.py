"""How much slower does ordinary work get, and what does each tool spend per file it tells?

Inside the protected tree (50,000 small files): `cp -r` to another folder, `cp -r` onto a medium, `tar | cat`, `grep -r`,
with the agent, its marks alone, fatrace, watchdog and inotifywait. Outside it, on the same file system, with the agent and
its marks alone: a build, `git status`, `tar`, `grep -r`; and large copies, onto the medium and beside it.
Every round runs every tool once, in turning order, so a slow minute of the machine hits all; ratios are taken within a
round. The work's own CPU seconds are given beside its wall clock: other load disturbs them less.

    python -m bench.overhead [-r ROUNDS] [--files N] [-w WORK …] [-m TOOL …] [inside] [outside] [large]
"""

import argparse
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def outside(place: Ground, files: int) -> list[Work]:
    """Ordinary work elsewhere on the file system that carries the protected folder."""
    tree, project, python = place.other / "tree", place.other / "project", place.other / "python"
    ground.plant(tree, max(1, files // 50))
    git = "git -c user.name=a -c user.email=a@b -c gc.auto=0"
    ground.run(["bash", "-c", f"cd {tree} && git init -q . && git add -A && {git} commit -qm x && git status >/dev/null"])
    project.mkdir()
    for number in range(40):
        (project / f"part{number}.h").write_text(f"static inline int part{number}(int x) {{ return x + {number}; }}\n")
    heads = "".join(f'#include "part{number}.h"\n' for number in range(40))
    for number in range(150):
        (project / f"unit{number}.c").write_text(f"{heads}int unit{number}(void) {{ return part3(part7({number})); }}\n")
    shutil.copytree(Path(statistics.__file__).parent / "email", python / "email")
    shutil.copytree(Path(statistics.__file__).parent / "asyncio", python / "asyncio")

    def objects() -> None:
        for each in project.glob("*.o"):
            each.unlink()

    def nothing() -> None:
        _settle_disks(place)

    found = [
        Work("git status", f"for i in 1 2 3 4 5; do git -C {tree} status; done", nothing),
        Work("tar | cat", f"tar cf - --exclude=.git {tree} | cat >/dev/null", nothing),
        Work("grep -r", f"grep -rq zzzzqqqq --exclude-dir=.git {tree} || true", nothing),
    ]
    if shutil.which("gcc"):
        build = f"cd {project} && ls *.c | xargs -P 2 -n 1 gcc -O0 -c"
        found.insert(0, Work("build: 150 × gcc -c", build, objects))
    else:
        compiled = f"python3 -m compileall -q -f {python}"
        found.insert(0, Work("build: python -m compileall", compiled, nothing))
    return found


def large(place: Ground, gib: float) -> list[Work]:
    """Copies of one large file: a protected one onto the medium, and another one beside itself."""
    size = int(gib * (1 << 30))
    for file in (place.protected / "large.bin", place.other / "large.bin"):
        ground.run(["bash", "-c", f"head -c {size} /dev/urandom >{file}"])
    onto, beside = place.medium / "large.bin", place.other / "again.bin"

    def clean() -> None:
        for each in (onto, beside):
            each.unlink(missing_ok=True)
        _settle_disks(place)

    return [
        Work(f"cp {gib:g} GiB onto the medium", f"cp {place.protected}/large.bin {onto}", clean),
        Work(f"cp {gib:g} GiB outside", f"cp {place.other}/large.bin {beside}", clean),
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
            runs += [once(place, work, tool) for tool in (*tools[turn:], *tools[:turn])]
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
    args.add_argument("-r", "--rounds", type=int, default=5)
    args.add_argument("--files", type=int, default=50_000)
    args.add_argument("--gib", type=float, default=2.0)
    args.add_argument("-w", "--work", action="append", help="only works whose name contains this")
    args.add_argument("-m", "--tool", action="append", choices=list(ground.TOOLS), help="only these (off is always run)")
    args.add_argument("parts", nargs="*", metavar="inside|outside|large")
    given = args.parse_args()
    parts = given.parts or ["inside", "outside", "large"]
    if unknown := set(parts) - {"inside", "outside", "large"}:
        args.error(f"no such part: {', '.join(unknown)}")
    with ground.ground("overhead") as place:
        for part in parts:
            works: list[Any] = {
                "inside": lambda: inside(place, given.files),
                "outside": lambda: outside(place, given.files),
                "large": lambda: large(place, given.gib),
            }[part]()
            works = [work for work in works if not given.work or any(word in work.name for word in given.work)]
            usual = ["off", "sekisho", "marks"]
            usual += ["fatrace", "watchdog", "inotifywait"] if part == "inside" else []
            tools = ground.available(["off", *(tool for tool in given.tool if tool != "off")] if given.tool else usual)
            runs = measure(place, works, tools, given.rounds)
            title = {"inside": "Inside the protected tree", "outside": "Outside it", "large": "Large copies"}[part]
            ground.report(f"overhead_{part}", {title: summary(works, tools, runs)}, [asdict(run) for run in runs])
            for tree in (place.other, place.protected):
                shutil.rmtree(tree)
                tree.mkdir()


if __name__ == "__main__":
    ground.main(main)
