"""Does anybody feel the agent who has nothing to do with protected files? And does one large copy?

Outside the protected tree, on the same file system: a build, `git status`, `tar | cat`, `grep -r`. Large copies (one file,
onto the medium and beside the protected tree) run on tmpfs: on a disk, what the kernel writes back when it likes is ten times
what is looked for. A tool is started once a round and the works are run several times under it, tools in turning order, so
that there are many pairs in little time; a pair is the n-th run under a tool and the n-th without one, in the same round.
`stopped` is the agent with all its marks, held by SIGSTOP: what differs from `sekisho` is what its own CPU takes from others.

    python -m bench.elsewhere [-r ROUNDS] [-n REPEATS] [--files N] [--mib N] [-m TOOL …] [outside] [large]
"""

import argparse
import contextlib
import shutil
import signal
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ground
from bench.ground import Ground


@dataclass
class Work:
    """`command` is timed; `before` puts things back."""

    name: str
    command: str
    before: Callable[[], None]


@dataclass
class Run:
    """One run of one work; `number` counts over all rounds, and names its pair."""

    work: str
    tool: str
    number: int
    wall_s: float
    work_cpu_s: float


class Stopped(ground.Sekisho):
    """The agent with all its marks, which does nothing."""

    def start(self) -> None:
        """Start, and hold it."""
        super().start()
        self._signal(signal.SIGSTOP)

    def stop(self) -> None:
        """Let it go on, to its end."""
        self._signal(signal.SIGCONT)
        super().stop()

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)


TOOLS = {"off": ground.Off, "sekisho": ground.Sekisho, "stopped": Stopped, "marks": ground.Marks}


@contextlib.contextmanager
def in_memory(name: str, gib: int = 3) -> Iterator[Ground]:
    """The ground on tmpfs."""
    place = Ground(ground.BASE / name)
    mounted: list[Path] = []
    try:
        for at in (place.disk, place.medium):
            at.mkdir(parents=True, exist_ok=True)
            ground.run(["mount", "-t", "tmpfs", "-o", f"size={gib}g", "sekisho-bench", str(at)])
            mounted.append(at)
        place.protected.mkdir()
        place.other.mkdir()
        yield place
    finally:
        for at in reversed(mounted):
            ground.run(["umount", "-l", str(at)])
        shutil.rmtree(place.root, ignore_errors=True)


def outside(place: Ground, files: int) -> list[Work]:
    """Ordinary work on the file system that carries the protected folder."""
    tree, project, python = place.other / "tree", place.other / "project", place.other / "python"
    ground.plant(tree, max(1, files // 50))
    ground.plant(place.protected / "tree", max(1, files // 50))
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
        pass

    if shutil.which("gcc"):
        build = Work("build: 150 × gcc -c", f"cd {project} && ls *.c | xargs -P 2 -n 1 gcc -O0 -c", objects)
    else:
        build = Work("build: python -m compileall", f"python3 -m compileall -q -f {python}", nothing)
    return [
        build,
        Work("git status", f"for i in 1 2 3; do git -C {tree} status; done", nothing),
        Work("tar | cat", f"tar cf - --exclude=.git {tree} | cat >/dev/null", nothing),
        Work("grep -r", f"grep -rq zzzzqqqq --exclude-dir=.git {tree} || true", nothing),
    ]


def large(place: Ground, mib: int) -> list[Work]:
    """Copies of one large file: a protected one onto the medium, and another one beside itself."""
    for file in (place.protected / "large.bin", place.other / "large.bin"):
        ground.run(["bash", "-c", f"head -c {mib << 20} /dev/urandom >{file}"])
    onto, beside = place.medium / "large.bin", place.other / "again.bin"

    def clean() -> None:
        for each in (onto, beside):
            each.unlink(missing_ok=True)

    return [
        Work(f"cp {mib} MiB onto the medium", f"cp {place.protected}/large.bin {onto}", clean),
        Work(f"cp {mib} MiB outside", f"cp {place.other}/large.bin {beside}", clean),
    ]


def measure(place: Ground, works: list[Work], tools: list[str], rounds: int, repeats: int) -> list[Run]:
    """All works under all tools; the first run of each work under a tool is not counted, as it warms the caches."""
    runs: list[Run] = []
    for turn in range(rounds):
        at = turn % len(tools)
        for tool in (*tools[at:], *tools[:at]):
            with ground.watching(tool, place, TOOLS[tool]):
                for work in works:
                    for number in range(-1, repeats):
                        work.before()
                        took = ground.timed(work.command)
                        if number >= 0:
                            runs.append(Run(work.name, tool, turn * repeats + number, took.wall_s, took.cpu_s))
        print(f"round {turn + 1} of {rounds}", flush=True)
    return runs


def summary(works: list[Work], tools: list[str], runs: list[Run]) -> str:
    """The table: ratios within pairs."""
    rows = []
    for work in works:
        by = {(run.tool, run.number): run for run in runs if run.work == work.name}
        pairs = sorted(number for tool, number in by if tool == "off")
        off = [by["off", number] for number in pairs]
        base = f"{statistics.median(run.wall_s for run in off) * 1000:.0f} ms"
        rows.append(
            [work.name, "off", base, f"{statistics.median(run.work_cpu_s for run in off) * 1000:.0f} ms", str(len(pairs))]
        )
        for tool in tools[1:]:
            mine = [by[tool, number] for number in pairs]
            wall = [run.wall_s / other.wall_s for run, other in zip(mine, off, strict=True)]
            cpu = [run.work_cpu_s / max(other.work_cpu_s, 1e-6) for run, other in zip(mine, off, strict=True)]
            rows.append(["", tool, "×" + quartiles(wall), "×" + quartiles(cpu), ""])
    return ground.table(["work", "tool", "wall", "the work's own CPU", "pairs"], rows)


def quartiles(values: list[float]) -> str:
    """ "median (first–third quartile)"."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f} ({low:.2f}–{high:.2f})"


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-r", "--rounds", type=int, default=6)
    args.add_argument("-n", "--repeats", type=int, default=5)
    args.add_argument("--files", type=int, default=20_000)
    args.add_argument("--mib", type=int, default=512)
    args.add_argument("-m", "--tool", action="append", choices=list(TOOLS), help="only these (off is always run)")
    args.add_argument("parts", nargs="*", metavar="outside|large")
    given = args.parse_args()
    parts = given.parts or ["outside", "large"]
    if unknown := set(parts) - {"outside", "large"}:
        args.error(f"no such part: {', '.join(unknown)}")
    tools = ["off", *(tool for tool in given.tool or TOOLS if tool != "off")]
    if "outside" in parts:
        with ground.ground("outside", 4, 1) as place:
            works = outside(place, given.files)
            runs = measure(place, works, tools, given.rounds, given.repeats)
            ground.report("elsewhere_outside", {"Work outside": summary(works, tools, runs)}, [asdict(run) for run in runs])
    if "large" in parts:
        with in_memory("large") as place:
            works = large(place, given.mib)
            tools = [tool for tool in tools if tool != "stopped"]  # nobody would answer for the copy onto the medium
            runs = measure(place, works, tools, given.rounds, given.repeats)
            ground.report("elsewhere_large", {"Large copies": summary(works, tools, runs)}, [asdict(run) for run in runs])


if __name__ == "__main__":
    ground.main(main)
