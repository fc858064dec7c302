"""How long does a decision of mode "enforce" take, as whoever opens a file feels it, with every core busy or none?

A probe opens a file on a medium and measures open(2): not watched at all, and under each rule that the small process answers
by, whether the open is then allowed or refused. The rules are set as the agent sets them, without an agent around it, so that
this is the decision and nothing else. It runs as an ordinary process, as its user would feel it, and with real-time priority,
so that its own waiting for a core is not counted. Rounds interleave.

    python -m bench.refuse [-r ROUNDS] [-n OPENS]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.sense.holder import Holder
from agent.sense.refusing import Refusing, Rule
from bench import ground

PROBE = """
import json, os, sys, time
path, count, real_time, flags, refused = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]), sys.argv[5] == "1"
if real_time:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
found = []
for number in range(count):
    began = time.perf_counter_ns()
    try:
        fd = os.open(path, flags)
        was = False
    except PermissionError:
        was = True
    found.append(time.perf_counter_ns() - began)
    assert was == refused, "decided otherwise than expected"
    if not was:
        os.close(fd)
    time.sleep(0.002)
print(json.dumps(found))
"""
CASES: list[tuple[str, str, int, bool]] = [
    ("not watched", "", os.O_RDWR, False),
    ("read-only medium: a read goes on", "writes", os.O_RDONLY, False),
    ("read-only medium: a write is refused", "writes", os.O_RDWR, True),
    ("refused medium: any open is refused", "all", os.O_RDONLY, True),
    ("approval with directories: a write by who read none goes on", "tainted", os.O_RDWR, False),
    ("approval with directories: a protected file is read", "sources", os.O_RDONLY, False),
]


def probe(place: ground.Ground, kind: str, flags: int, refused: bool, count: int, real_time: bool, busy: bool) -> list[int]:
    """Nanoseconds each open took under one rule."""
    medium, tree = os.fsencode(place.medium), Path(place.root) / "decided"
    tree.mkdir(exist_ok=True)
    (tree / "a.csv").write_text("x")
    (place.medium / "probe").write_text("x")
    holder = Holder.trial()
    holder.may_refuse(Refusing(False))
    holder.lay_tripwire(-1)
    holder.tripwire("mark", [os.fsencode(tree)])
    rules = {"writes": Rule("writes", False), "all": Rule("all", False)}
    rules["tainted"] = rules["sources"] = Rule("tainted", False, (os.fsencode(tree) + b"/",))
    load = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(2 * (os.cpu_count() or 1))] if busy else []
    try:
        if kind:
            holder.refuse({medium: rules[kind]})
        path = tree / "a.csv" if kind == "sources" else place.medium / "probe"
        given = [str(path), str(count), str(int(real_time)), str(flags), str(int(refused))]
        found: list[int] = json.loads(ground.run([sys.executable, "-c", PROBE, *given]))
        return found
    finally:
        holder.close()
        for each in load:
            each.kill()
            each.wait()


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-r", "--rounds", type=int, default=3)
    args.add_argument("-n", "--opens", type=int, default=500)
    given = args.parse_args()
    raw: list[dict[str, Any]] = []
    machines = [(busy, real_time) for busy in (False, True) for real_time in (False, True)]
    with ground.ground("refuse", 1, 1) as place:
        for _ in range(given.rounds):
            for busy, real_time in machines:
                for title, kind, flags, refused in CASES:
                    found = probe(place, kind, flags, refused, given.opens, real_time, busy)
                    raw.append({"case": title, "busy": busy, "real_time": real_time, "ns": found})
    rows = []
    for busy, real_time in machines:
        for title, *_ in CASES:
            mine = [each["ns"] for each in raw if (each["case"], each["busy"], each["real_time"]) == (title, busy, real_time)]
            cells = [ground.spread([ground.percentile(ns, share) / 1000 for ns in mine], 0) for share in (0.5, 0.99)]
            load, who = "all cores busy" if busy else "quiet", "real-time" if real_time else "ordinary"
            rows.append([load, who, title, *cells, f"{max(max(ns) for ns in mine) / 1000:.0f}"])
    for each in raw:
        each["quantiles_us"] = [round(ground.percentile(each["ns"], at) / 1000, 1) for at in (0.5, 0.9, 0.99, 1)]
        each["mean_us"] = round(statistics.fmean(each.pop("ns")) / 1000, 1)
    head = ["machine", "probe", "decision", "p50 µs", "p99 µs", "worst µs"]
    ground.report("refuse", {"open(2) while mode enforce decides": ground.table(head, rows)}, raw)


if __name__ == "__main__":
    ground.main(main)
