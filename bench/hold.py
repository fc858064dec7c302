"""How long is a process held when it opens a file on a medium, with every core busy?

A probe opens files on the medium and measures open(2), with and without the agent, on a quiet machine and with two busy
loops a core. It runs once as an ordinary process, as its user would feel it, and once with real-time priority, so that
its own waiting for a core is not counted as holding. Rounds interleave.

    python -m bench.hold [-r ROUNDS] [-n OPENS]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from bench import ground

PROBE = """
import json, os, sys, time
folder, count, real_time = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
if real_time:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
paths = [os.path.join(folder, f"probe{n}") for n in range(20)]
for path in paths:
    open(path, "w").write("x")
found = []
for number in range(count):
    path = paths[number % len(paths)]
    began = time.perf_counter_ns()
    fd = os.open(path, os.O_RDONLY)
    found.append(time.perf_counter_ns() - began)
    os.close(fd)
    time.sleep(0.002)
print(json.dumps(found))
"""


def probe(place: ground.Ground, count: int, real_time: bool, busy: bool) -> list[int]:
    """Nanoseconds each open took."""
    load = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))] if busy else []
    try:
        command = [sys.executable, "-c", PROBE, str(place.medium), str(count), str(int(real_time))]
        found: list[int] = json.loads(ground.run(command))
        return found
    finally:
        for each in load:
            each.kill()
            each.wait()


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-r", "--rounds", type=int, default=3)
    args.add_argument("-n", "--opens", type=int, default=1000)
    given = args.parse_args()
    raw: list[dict[str, Any]] = []
    cases = [(busy, real_time) for busy in (False, True) for real_time in (False, True)]
    with ground.ground("hold", 1, 1) as place:
        for number in range(given.rounds):
            for tool in ("off", "sekisho") if number % 2 else ("sekisho", "off"):
                with ground.watching(tool, place):
                    for busy, real_time in cases:
                        found = probe(place, given.opens, real_time, busy)
                        raw.append({"tool": tool, "busy": busy, "real_time": real_time, "ns": found})
    rows = []
    for busy, real_time in cases:
        for tool in ("off", "sekisho"):
            mine = [each["ns"] for each in raw if (each["tool"], each["busy"], each["real_time"]) == (tool, busy, real_time)]
            cells = [ground.spread([ground.percentile(ns, share) / 1000 for ns in mine], 0) for share in (0.5, 0.99, 0.999)]
            worst = max(max(ns) for ns in mine) / 1000
            load = "all cores busy" if busy else "quiet"
            rows.append([load, "real-time" if real_time else "ordinary", tool, *cells, f"{worst:.0f}"])
    head = ["machine", "probe", "agent", "p50 µs", "p99 µs", "p99.9 µs", "worst µs"]
    for each in raw:
        each["quantiles_us"] = [round(ground.percentile(each["ns"], at) / 1000, 1) for at in (0.5, 0.9, 0.99, 0.999, 1)]
        each["mean_us"] = round(statistics.fmean(each.pop("ns")) / 1000, 1)
    ground.report("hold", {"open(2) on the medium": ground.table(head, rows)}, raw)


if __name__ == "__main__":
    ground.main(main)
