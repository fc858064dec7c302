"""How fast bundles are made and checked, how large they are, and what a proof costs in a log of a million events.

The log is made by the real writer from real batches, the bundle by `export`, then checked by `verify` as its command does it
(every signature, every chain, the tree), on one processor and on all.

    python -m bench.verify [-r REPEAT] [--events N] [--batch N] [--machines N] [--tree N]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ground
from server_stub import export, intake, tree, verify
from server_stub.commit import Writer
from server_stub.query import Filter
from server_stub.store.sqlite import SqliteStore
from tests.bundles import COLLECTOR
from tests.collector_client import Client


def filled(store: SqliteStore, events: int, machines: int, batch: int) -> tuple[Writer, dict[str, bytes], int]:
    """A log of `events` events; the writer, the machines' keys, and how many bytes the events have."""
    writer = Writer(store, COLLECTOR, "collector", now=lambda: time.time_ns() // 1_000_000, woken=lambda _size: None)
    agents = [Client(0, f"ws-{number}") for number in range(machines)]
    done = size = 0
    while done < events:
        for agent in agents:
            agent.append_some(batch)
            last = len(agent.lines)
            taken = intake.examine(agent.batch(last - batch + 1), True, agent.id, agent.public, agent.name)
            writer.submit(lambda w, b=taken: w.take(b), batch).result(60)
            done += batch
            size += sum(map(len, agent.lines[-batch:]))
    return writer, {agent.id: agent.public for agent in agents}, size


def timed(path: Path, processors: set[int]) -> tuple[float, float]:
    """Seconds that `sekisho-collector verify` takes, from its start to its exit, and its seconds of processor: other load
    prolongs the first much more than the second."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "server_stub.cli", "verify", str(path)]
    bound = lambda: os.sched_setaffinity(0, processors)  # noqa: E731
    subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=bound, check=True)
    taken = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bundles(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    store = SqliteStore(root / "collector.db")
    writer, keys, size = filled(store, args.events, args.machines, args.batch)
    signer = export.Signer(f"sekisho/{writer.id}", COLLECTOR, writer.keys, [])
    path = root / "bundle.zip"
    began = time.perf_counter()
    with path.open("wb") as file:
        for part in export.chunks(store, export.Asked(Filter(), {}, writer.size), signer, keys.get, root):
            file.write(part)
    made_s = time.perf_counter() - began
    every = os.sched_getaffinity(0)
    one = min(timed(path, {min(every)}) for _ in range(args.repeat))
    both = min(timed(path, every) for _ in range(args.repeat))
    events = writer.size
    writer.close()
    store.close()
    assert verify.verify(str(path)).bad is None
    return {
        "events": events, "machines": args.machines, "batch": args.batch, "bytes_per_event": round(size / events),
        "bundle_bytes_per_event": round(path.stat().st_size / events, 1), "export_events_per_s": round(events / made_s),
        "verify_events_per_s_one_processor": round(events / one[0]), "verify_events_per_s": round(events / both[0]),
        "processors": len(every), "load_average": round(os.getloadavg()[0], 1),
        "verify_us_of_processor_per_event": {"one": round(one[1] / events * 1e6, 2), "all": round(both[1] / events * 1e6, 2)},
    }  # fmt: skip


def proofs(root: Path, leaves: int) -> dict[str, Any]:
    """Proofs in a log of `leaves` leaves, as the store answers them: the nodes it keeps, and the events of one tile."""
    store = SqliteStore(root / "tree.db")
    session, frontier, made = store.session(), tree.Frontier(), 0
    session.begin()
    session.execute("INSERT INTO chains VALUES (1, 'a', 1, 0, x'', 0)")
    raw = b"x" * 900
    insert = "INSERT INTO events (pos, chain, seq, time, received_at, severity, hash, raw) VALUES (?, 1, ?, 0, 0, 1, x'', ?)"
    while made < leaves:
        nodes, rows = [], []
        for pos in range(made + 1, min(made + 20_000, leaves) + 1):
            data = b"%d%s" % (pos, raw)
            nodes += frontier.add(tree.leaf_hash(data))
            rows.append((pos, pos, data))
        session.db.executemany(insert, rows)
        session.add_nodes(nodes)
        made += len(rows)
    session.commit()
    times: dict[str, list[float]] = {"inclusion": [], "consistency": [], "root": []}
    for number in range(200):
        at = number * 7919 * 13 % leaves
        for name, work in (
            ("inclusion", lambda at=at: tree.inclusion(at, leaves, store.subtree)),
            ("consistency", lambda at=at: tree.consistency(at + 1, leaves, store.subtree)),
            ("root", lambda at=at: tree.root_at(at + 1, store.subtree)),
        ):
            began = time.perf_counter()
            work()
            times[name].append((time.perf_counter() - began) * 1000)
    nodes_kept = store.rows("SELECT count(*) FROM nodes")[0][0]
    store.close()
    told = {f"{name}_ms": {"p50": round(statistics.median(ms), 2), "max": round(max(ms), 2)} for name, ms in times.items()}
    return {"leaves": leaves, "nodes_kept": nodes_kept, **told}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--machines", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("--tree", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as room:
        found = {"verify": bundles(Path(room), args), "proofs": proofs(Path(room), args.tree)}
    of_bundles, of_proofs = found["verify"], found["proofs"]
    processor = of_bundles["verify_us_of_processor_per_event"]
    rows = [
        ["exported", "events a second", f"{of_bundles['export_events_per_s']:,}"],
        ["verified on one processor", "events a second", f"{of_bundles['verify_events_per_s_one_processor']:,}"],
        [f"verified on {of_bundles['processors']}", "events a second", f"{of_bundles['verify_events_per_s']:,}"],
        ["verified", "µs of processor an event", f"{processor['one']:.1f}"],
        ["an event", "bytes", f"{of_bundles['bytes_per_event']:,}"],
        ["the same in a bundle", "bytes", f"{of_bundles['bundle_bytes_per_event']:.0f}"],
    ]
    kinds = ("inclusion", "consistency", "root")
    proven = [[kind, *(f"{of_proofs[f'{kind}_ms'][each]:.2f}" for each in ("p50", "max"))] for kind in kinds]
    made_of = f"{of_bundles['events']:,} events of {of_bundles['machines']} machines"
    tables = {
        f"A bundle of {made_of}": ground.table(["what", "", "figure"], rows),
        f"Proofs in a log of {of_proofs['leaves']:,} events, ms": ground.table(["proof", "p50", "most"], proven),
    }
    ground.report("verify", tables, found)


if __name__ == "__main__":
    ground.main(main)
