"""How many events a second the collector makes durable: batches of 250 from 16 agents at once, real chains and signatures.

    python -m bench.ingest [--rounds 3] [--events 100000] [--batch 250] [--connections 16] [--polls 10000] [--dir DIR]

All batches are prepared first (packing and signing are the agents' work). Then a real `sekisho-collector serve` starts
and this process sends them; each connection waits for its receipt before its next batch. In turn with it rsyslog takes
the same events over as many RELP connections (`bench.relp`; fewer events into its synced disk queue, which is slow).
Then as many requests for the register as agents are held at once, and the register changes. Prints tables, and one JSON
object on the last line: medians, and all rounds.
"""

import argparse
import http.client
import json
import os
import resource
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
from bench import ground, relp
from tests.collector_client import Client, copied, draft


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def configure(config: Path, port: int, root: Path) -> None:
    config.write_text(
        f'[collector]\nlisten = "127.0.0.1:{port}"\nstate_dir = "{root}/state"\n'
        'enroll_token = "house-token"\nsilent_after = "1h"\n'
    )


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
    configure(config, port, root)
    each = args.events // args.connections // args.batch
    agents = [prepare(port, number, each, args.batch) for number in range(args.connections)]
    count = sum(len(agent.lines) for agent, _ in agents)
    size = sum(len(line) for agent, _ in agents for line in agent.lines)
    served = subprocess.Popen([sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)], stderr=subprocess.DEVNULL)
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


def polls(root: Path, many: int) -> dict[str, Any]:
    """Hold `many` requests for the register at once: memory, and how soon all have it once it changes."""
    root.mkdir()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(many, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    port, config = free_port(), root / "collector.toml"
    configure(config, port, root)
    served = subprocess.Popen([sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)], stderr=subprocess.DEVNULL)
    held: list[socket.socket] = []
    try:
        wait_ready(port)
        process, agent = psutil.Process(served.pid), Client(port, "ws-1")
        before = process.memory_info().rss
        version = json.loads(agent.enrol()[1]["register"]["body"])["version"]
        target = f"/v1/register?after={version}"
        signed = "".join(f"{name}: {text}\r\n" for name, text in agent.signed(target).items())
        asked = f"GET {target} HTTP/1.1\r\nHost: x\r\n{signed}\r\n".encode()
        began = time.perf_counter()
        for _ in range(many):
            held.append(sock := socket.create_connection(("127.0.0.1", port), timeout=60))
            sock.sendall(asked)
        agent.append_some(1)
        sent = time.perf_counter()
        if agent.send()[0] != 200:
            raise SystemExit("a batch is refused while requests are held")
        batch_s = time.perf_counter() - sent
        hold_s, memory = time.perf_counter() - began, process.memory_info().rss
        approval = ["--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never"]
        command = [sys.executable, "-m", "server_stub.cli", "media", "approve", "usb:1", *approval, "-c", str(config)]
        subprocess.run(command, check=True, capture_output=True)
        approved = time.perf_counter()
        answered = sum(sock.recv(1 << 16).startswith(b"HTTP/1.1 200") for sock in held)
        answer_s = time.perf_counter() - approved
    finally:
        for sock in held:
            sock.close()
        served.send_signal(signal.SIGTERM)
        served.wait(60)
    return {
        "held": many,
        "answered": answered,
        "to_connect_s": round(hold_s, 2),
        "batch_meanwhile_ms": round(batch_s * 1000, 1),
        "all_answered_after_s": round(answer_s, 2),
        "rss_mb": round(memory / 1e6, 1),
        "kb_each": round((memory - before) / many / 1000, 1),
    }


def yardstick(root: Path, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    events = args.events // 25 if kind == "disk" else args.events
    each = max(1, events // args.connections // args.batch)
    lines = [prepare(0, number, each, args.batch)[0].lines for number in range(args.connections)]
    return relp.measure(root, free_port(), kind, lines, args.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--polls", type=int, default=10_000)
    parser.add_argument("--dir", help="where to store (default: the temporary directory)")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sekisho-ingest-", dir=args.dir))
    lacking = relp.missing()
    ours: list[dict[str, Any]] = []
    theirs: dict[str, list[dict[str, Any]]] = {} if lacking else {kind: [] for kind in relp.QUEUES}
    try:
        for number in range(args.rounds):
            place = root / f"{number}"
            place.mkdir()
            ours.append(collector(place, args))
            for kind, taken in theirs.items():
                taken.append(yardstick(place / kind, kind, args))
            shutil.rmtree(place)
        held = polls(root / "polls", args.polls) if args.polls else {}
    finally:
        shutil.rmtree(root)
    report(ours, theirs, held, lacking)


def report(ours: list[dict[str, Any]], theirs: dict[str, list[dict[str, Any]]], held: dict[str, Any], lacking: str) -> None:
    """Tables, then everything as one line of JSON, the collector's medians at its top."""
    median = {key: statistics.median(each[key] for each in ours) for key in ours[0]}
    speed = [float(each["events_per_s"]) for each in ours]
    promise, cpu = "receipt signed, on disk", ground.spread([each["cpu_s_per_100k"] for each in ours])
    rows = [["sekisho-collector", promise, ground.spread(speed, 0), cpu, "1"]]
    document: dict[str, Any] = {**median}
    for kind, taken in theirs.items():
        key = "acked_per_s" if kind == "disk" else "stored_per_s"
        got = [float(each[key]) for each in taken]
        ratio = round(median["events_per_s"] / statistics.median(got), 1)
        promise = "acknowledged, on disk" if kind == "disk" else "acknowledged from memory, then on disk"
        cpu = ground.spread([each["cpu_s_per_100k"] for each in taken])
        rows.append([f"rsyslog, {kind} queue", promise, ground.spread(got, 0), cpu, f"1 / {ratio}"])
        document[f"times_rsyslog_{kind}"] = ratio
    text = ground.table(["who", "what is counted", "events/s", "CPU s for 100,000", "against us"], rows)
    if lacking:
        text += f"\n\nNo yardstick: {lacking}."
    if held:
        text += "\n\n" + ground.table(
            [
                "requests held for the register",
                "all answered, s after a change",
                "a batch meanwhile, ms",
                "collector's RSS, MB",
            ],
            [[str(held[key]) for key in ("held", "all_answered_after_s", "batch_meanwhile_ms", "rss_mb")]],
        )
    stored = f"{median['stored_bytes_per_event']:.0f} bytes are stored for an event of {median['event_bytes']:.0f}; "
    text += f"\n\n{stored}a batch takes {median['batch_ms_median']:.0f} ms (median), {median['batch_ms_p99']:.0f} ms (p99)."
    document |= {"machine": ground.machine(), "rounds": ours, "rsyslog": theirs, "register_polls": held}
    if folder := os.environ.get("SEKISHO_BENCH_OUT"):
        Path(folder, "ingest.md").write_text(text + "\n")
    print(text + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
