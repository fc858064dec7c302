"""How many events a second the collector makes durable: batches of 250 from 16 agents at once, real chains and signatures.

    python -m bench.ingest [--events 100000] [--batch 250] [--connections 16] [--dir DIR]

All batches are prepared first (packing and signing are the agents' work). Then a real `sekisho-collector serve` starts
and this process sends them; each connection waits for its receipt before its next batch. Prints one JSON object:
events/s, the collector's CPU seconds for each 100,000 events, bytes stored for each event, latency of a batch.
"""

import argparse
import http.client
import json
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from agent.contract.event import ProcessInfo, SourceInfo
from tests.collector_client import Client, copied, draft


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def prepare(port: int, number: int, batches: int, size: int) -> tuple[Client, list[bytes]]:
    """One agent and the bodies it will send."""
    agent, bodies = Client(port, f"ws-{number:03}"), []
    for _ in range(batches):
        first = len(agent.lines) + 1
        for n in range(first, first + size):
            rel = f"2014/{n:06}.csv"
            ours = copied(rel, 1000 + n, f"user{n % 7}")
            ours["source"] = SourceInfo(path=f"/srv/customers/{rel}", size=1000 + n, inode=n)
            argv = ["cp", "--", f"/srv/customers/{rel}", "/media/stick/"]
            ours["process"] = ProcessInfo(pid=4000 + n, exe="/usr/bin/cp", argv=argv, start=n)
            agent.append(draft(agent=agent.id, name=agent.name, **ours))
        bodies.append(agent.batch(first))
    return agent, bodies


def wait_ready(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        finally:
            connection.close()
        time.sleep(0.05)


def send_all(port: int, agents: list[tuple[Client, list[bytes]]]) -> tuple[float, list[float]]:
    """Seconds for all, and each batch's latency (s)."""
    latencies: list[float] = []
    failed: list[str] = []

    def run(agent: Client, bodies: list[bytes]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Sekisho-Agent": agent.id, "Content-Encoding": "gzip"}
        for body in bodies:
            began = time.perf_counter()
            connection.request("POST", "/v1/batches", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                failed.append(f"{answer.status} {text!r}")
                return
            latencies.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=run, args=each) for each in agents]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"refused: {failed[0]}")
    return time.perf_counter() - began, latencies


def collector(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    config = root / "collector.toml"
    config.write_text(
        f'[collector]\nlisten = "127.0.0.1:{port}"\nstate_dir = "{root}/state"\n'
        'enroll_token = "house-token"\nsilent_after = "1h"\n'
    )
    each = args.events // args.connections // args.batch
    agents = [prepare(port, number, each, args.batch) for number in range(args.connections)]
    count = sum(len(agent.lines) for agent, _ in agents)
    size = sum(len(line) for agent, _ in agents for line in agent.lines)
    served = subprocess.Popen([sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)])
    try:
        wait_ready(port)
        for agent, _ in agents:
            agent.enrol()
        process = psutil.Process(served.pid)
        before = process.cpu_times()
        seconds, latencies = send_all(port, agents)
        after = process.cpu_times()
        memory = process.memory_info().rss
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(30)
    stored = sum(file.stat().st_size for file in (root / "state").glob("collector.db*"))
    quantiles = statistics.quantiles(latencies, n=100)
    return {
        "events": count,
        "event_bytes": round(size / count),
        "events_per_s": round(count / seconds),
        "cpu_s_per_100k": round((after.user + after.system - before.user - before.system) * 100_000 / count, 2),
        "stored_bytes_per_event": round(stored / count),
        "batch_ms_median": round(quantiles[49] * 1000, 1),
        "batch_ms_p99": round(quantiles[98] * 1000, 1),
        "rss_mb": round(memory / 1e6, 1),
        "load_average": psutil.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--dir", help="where to store (default: the temporary directory)")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sekisho-ingest-", dir=args.dir))
    try:
        print(json.dumps(collector(root, args)))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
