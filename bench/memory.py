"""What memory does the agent take, and what CPU while nothing happens?

PSS and USS of all its processes, with a collector on this machine to talk to: after start, with 50,000 protected
directories, while 50,000 small files are copied onto a medium, once they are told and delivered, after a second such storm,
and after all were only read; idle CPU over most of a minute before and after; and what each import costs by itself, in a
fresh interpreter.

    python -m bench.memory [--files N] [--directories N] [--idle SECONDS]
"""

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

from bench import ground
from bench.ground import Sekisho
from bench.latency import collector, joined

IMPORTS = [
    "msgspec.json",
    "sqlite3",
    "ssl",
    "nacl.signing",
    "pyudev",
    "psutil",
    "requests",
    "watchdog.observers",
    "agent.core.pipeline",
    "agent.spool",
    "agent.sender",
    "agent.daemon",
]
PROBE = """
import sys, time
def private():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Private_"))
before, began = private(), time.perf_counter()
__import__(sys.argv[1])
print(private() - before, (time.perf_counter() - began) * 1000)
"""


def imports() -> list[dict[str, Any]]:
    """Private memory and time of each import, the median of three fresh interpreters."""
    rows = []
    for name in IMPORTS:
        runs = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", PROBE, name], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                runs.append([float(each) for each in done.stdout.split()])
        if runs:
            kib, ms = (statistics.median(column) for column in zip(*runs, strict=True))
            rows.append({"module": name, "kib": int(kib), "ms": round(ms, 1)})
    return rows


def stage(name: str, agent: Sekisho) -> dict[str, Any]:
    """Memory of all its processes now."""
    pids = agent.pids
    found = {key.lower(): ground.memory_kib(pids, key) for key in ("Pss", "Uss", "Rss")}
    return {"stage": name, "processes": len(pids), **found, "each_pss": [ground.memory_kib([pid]) for pid in pids]}


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--files", type=int, default=50_000)
    args.add_argument("--directories", type=int, default=50_000)
    args.add_argument("--idle", type=float, default=40.0)
    args.add_argument("-r", "--rounds", type=int, default=1, help="accepted for the sake of `python -m bench`; not used")
    given = args.parse_args()
    stages = []
    with ground.ground("memory") as place, collector(place) as (port, _):
        with ground.watching("sekisho", place, joined(port)) as agent:
            assert isinstance(agent, Sekisho)
            agent.until(lambda status: bool(status["collector"]["last_receipt"]), "is not heard by the collector")
            stages.append(stage("after start", agent))
        ground.plant(place.protected / "tree", max(1, given.files // 50))
        for number in range(given.directories):
            (place.protected / "many" / f"m{number // 250}" / f"d{number}").mkdir(parents=True)
        began = time.monotonic()
        with ground.watching("sekisho", place, joined(port)) as agent:
            assert isinstance(agent, Sekisho)
            start_s = time.monotonic() - began
            stages.append(stage(f"{given.directories:,} directories protected", agent))
            before = ground.cpu_s(agent.pids)
            time.sleep(given.idle)
            idle = (ground.cpu_s(agent.pids) - before) / given.idle * 100
            for number, name in ((1, f"{given.files:,} files"), (2, "as many again")):
                ground.timed(f"cp -r {place.protected}/tree {place.medium}/copy{number}")
                stages.append(stage(f"while {name} are told", agent))
                agent.settle()
                agent.until(lambda status: not status["spool"]["backlog"], "does not deliver what it recorded")
                time.sleep(5)
                stages.append(stage(f"after {name}", agent))
            ground.timed(f"grep -rq zzzzqqqq {place.protected}/tree || true")
            agent.settle()
            time.sleep(5)
            stages.append(stage("after all were read", agent))
            before = ground.cpu_s(agent.pids)
            time.sleep(given.idle)
            idle_after = (ground.cpu_s(agent.pids) - before) / given.idle * 100
        told = agent.told(place.protected / "tree")
    costs = imports()
    mib = [
        [each["stage"], str(each["processes"]), *(f"{each[key] / 1024:.1f}" for key in ("pss", "uss", "rss"))]
        for each in stages
    ]
    tables = {
        "Memory of all the agent's processes together, MiB": ground.table(["when", "processes", "PSS", "USS", "RSS"], mib),
        "CPU while nothing happens, % of one core": ground.table(
            ["when", "%"],
            [
                [f"{given.directories:,} directories protected", f"{idle:.2f}"],
                [f"the same, after {told:,} files told", f"{idle_after:.2f}"],
            ],
        ),
        "What an import costs by itself": ground.table(
            ["module", "private MiB", "ms"],
            [[each["module"], f"{each['kib'] / 1024:.1f}", f"{each['ms']:.0f}"] for each in costs],
        ),
    }
    raw = {"stages": stages, "idle_percent": [idle, idle_after], "start_s": start_s, "told": told, "imports": costs}
    ground.report("memory", tables, raw)


if __name__ == "__main__":
    ground.main(main)
