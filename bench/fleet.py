"""A fleet of simulated agents on one machine: what collectors and their store take to hear them, and how soon they answer.

    python -m bench.fleet [--agents 10000] [--seconds 30] [--rate 350] [--store sqlite|postgresql] [--collectors 1]

Every agent is real as far as a collector can see: a key of its own, an enrolment, a held request for the register on a
connection of its own, a heartbeat every minute, and signed batches of one to five events, `--rate` events a second in all
(10,000 workstations make about 35 on average, 350 at their peak). At the end the register changes, and all must have it.
PostgreSQL is started here by the tests' own means. Prints a table, and one JSON object on the last line.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench import ground
from tests import postgres
from tests.collector_client import Client
from tests.house import TOKEN, Collector

HEARTBEAT_S = 60.0
ENROLLING = 32


def address(agent: Client) -> tuple[str, int]:
    """A machine's own loopback address: a collector limits what comes at once from one."""
    return f"127.{1 + int(agent.id[:2], 16) % 200}.{int(agent.id[2:4], 16)}.{1 + int(agent.id[4:6], 16) % 250}", 0


async def ask(agent: Client, method: str, target: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", agent.port, local_addr=address(agent))
    try:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}".encode())
        writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        return int(answer[9:12]), answer.partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


class Fleet:
    """The agents, spread over the collectors' ports."""

    def __init__(self, ports: list[int], count: int) -> None:
        self.agents = [Client(ports[n % len(ports)], f"ws-{n:05}") for n in range(count)]
        self.versions: dict[str, int] = {}
        self.latencies: list[float] = []
        self.refused: dict[int, int] = {}
        self.told = 0
        self.busy: set[str] = set()
        self.polling = 0

    async def enrol(self) -> float:
        """Seconds until all are enrolled."""
        waiting = list(self.agents)

        async def work() -> None:
            while waiting:
                agent = waiting.pop()
                asked = {"token": TOKEN, "name": agent.name, "key": base64.b64encode(agent.public).decode()}
                status, answer = await ask(agent, "POST", "/v1/enroll", json.dumps(asked).encode(), {})
                if status != 200:
                    raise SystemExit(f"an enrolment is refused: {status} {answer!r}")
                self.versions[agent.id] = json.loads(json.loads(answer)["register"]["body"])["version"]

        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(ENROLLING)))
        return time.perf_counter() - began

    async def poll(self, agent: Client) -> None:
        """Hold a request for a newer register, again and again, until there is one."""
        await asyncio.sleep(random.random() * 10)
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port, local_addr=address(agent))
        self.polling += 1
        with contextlib.closing(writer):
            while True:
                target = f"/v1/register?after={self.versions[agent.id]}"
                head = "".join(f"{name}: {value}\r\n" for name, value in agent.signed(target).items())
                writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
                said = await reader.readuntil(b"\r\n\r\n")
                if said.startswith(b"HTTP/1.1 200"):
                    self.told += 1
                    return
                if not said.startswith(b"HTTP/1.1 204"):
                    self.refused[int(said[9:12])] = self.refused.get(int(said[9:12]), 0) + 1
                    return

    async def send(self, agent: Client, events: int) -> None:
        """A batch, or a heartbeat, until it has its receipt."""
        first = len(agent.lines) + 1
        agent.append_some(events)
        body = agent.batch(first)
        headers = {"Sekisho-Agent": agent.id, "Content-Encoding": "gzip"}
        began, status = time.perf_counter(), 0
        while status != 200:
            status, _ = await ask(agent, "POST", "/v1/batches", body, headers)
            if status != 200:
                self.refused[status] = self.refused.get(status, 0) + 1
                await asyncio.sleep(1)
        self.latencies.append(time.perf_counter() - began)
        self.busy.discard(agent.id)

    async def run(self, seconds: float, rate: float) -> float:
        """Heartbeats and events, evenly at random, for so long; events that were sent in a second."""
        beats, chance = len(self.agents) / HEARTBEAT_S, random.Random(3)
        batches, count = rate / 3, 0
        began, due, tasks = time.perf_counter(), 0.0, set[asyncio.Task[None]]()
        while due < seconds:
            due += chance.expovariate(beats + batches)
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            events = chance.randint(1, 5) if chance.random() < batches / (beats + batches) else 0
            count += events
            while (agent := chance.choice(self.agents)).id in self.busy:
                pass
            self.busy.add(agent.id)
            task = asyncio.create_task(self.send(agent, events))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return count / (time.perf_counter() - began)


async def measure(houses: list[Collector], args: argparse.Namespace) -> dict[str, Any]:
    """One run over served collectors."""
    served = [psutil.Process(house._process.pid) for house in houses if house._process]
    before_mb = [each.memory_info().rss / 1e6 for each in served]
    fleet = Fleet([house.port for house in houses], args.agents)
    enrolled_s = await fleet.enrol()
    polls = [asyncio.create_task(fleet.poll(agent)) for agent in fleet.agents]
    while fleet.polling < len(fleet.agents):
        await asyncio.sleep(0.1)
    held_mb = [each.memory_info().rss / 1e6 for each in served]
    cpu = [sum(each.cpu_times()[:2]) for each in served]
    began = time.perf_counter()
    rate = await fleet.run(args.seconds, args.rate)
    taken = time.perf_counter() - began
    cpu_share = [(sum(each.cpu_times()[:2]) - was) / taken for each, was in zip(served, cpu, strict=True)]
    approval = ["--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never"]
    command = [
        sys.executable,
        "-m",
        "server_stub.cli",
        "media",
        "approve",
        "usb:1",
        *approval,
        "-c",
        str(houses[0].config_file),
    ]
    done = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    await done.wait()
    changed = time.perf_counter()
    await asyncio.wait(polls, timeout=60)
    quantiles = statistics.quantiles(fleet.latencies, n=100)
    return {
        "store": args.store, "collectors": len(houses), "agents": args.agents, "enrolled_s": round(enrolled_s, 1),
        "events_per_s": round(rate), "heartbeats_per_s": round(args.agents / HEARTBEAT_S), "acknowledged": len(fleet.latencies),
        "refused": fleet.refused, "ack_ms_median": round(quantiles[49] * 1000, 1), "ack_ms_p99": round(quantiles[98] * 1000, 1),
        "cpu_share": [round(each, 2) for each in cpu_share], "rss_mb": [round(each, 1) for each in held_mb],
        "kb_per_held_poll": round((sum(held_mb) - sum(before_mb)) / args.agents * 1000, 1),
        "register_held": fleet.told, "register_held_after_s": round(time.perf_counter() - changed, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=350.0)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--collectors", type=int, default=1)
    args = parser.parse_args()
    if args.store == "sqlite" and args.collectors != 1:
        raise SystemExit("a SQLite store has one collector; ask for --store postgresql")
    if args.store == "postgresql" and (lacking := postgres.missing()):
        raise SystemExit(lacking)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    args.agents = min(args.agents, hard - 1000)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started here is ended here
    root = Path(tempfile.mkdtemp(prefix="sekisho-fleet-"))
    node = postgres.Node(postgres.room()) if args.store == "postgresql" else None
    houses: list[Collector] = []
    try:
        if node:
            node.make()
            node.start()
        database = node.database() if node else "sqlite"
        for number in range(args.collectors):
            place = root / str(number)
            place.mkdir()
            houses.append(Collector(place, database, f'key_file = "{root}/signing.key"\n'))
            houses[-1].config_file.write_text(houses[-1].config_file.read_text().replace('"5s"', '"5m"'))
            houses[-1].start()
        result = asyncio.run(measure(houses, args))
    finally:
        for house in houses:
            house.stop()
        if node:
            node.stop()
            shutil.rmtree(node.root)
        shutil.rmtree(root)
    print(ground.table(["what", "measured"], [[name, str(value)] for name, value in result.items()]) + "\n")
    print(json.dumps(result | {"machine": ground.machine()}))


if __name__ == "__main__":
    main()
