"""How long from close(2) on the medium until the line is out of `sekisho-collector tail -f`?

A real collector and a real agent on this machine, joined over loopback. One program copies a protected file onto the
medium, notes the moment its close(2) returns, and waits for the tail to print the event that names it; then the next,
after a pause of varying length, so that no timer of ours is met in step.

    python -m bench.latency [-n COPIES]
"""

import argparse
import contextlib
import json
import os
import queue
import random
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench import ground
from bench.ground import CannotMeasure, Ground, Sekisho

DEADLINE_S = 30.0


@contextlib.contextmanager
def collector(place: Ground) -> Iterator[tuple[int, Path]]:
    """A collector that serves; its port and configuration."""
    folder = place.root / "collector"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "collector.toml"
    config.write_text(f'[collector]\nlisten = "127.0.0.1:{port}"\nstate_dir = "{folder}/state"\nenroll_token = "bench"\n')
    with (folder / "log").open("wb") as log:
        serving = subprocess.Popen(
            [sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if serving.poll() is not None or time.monotonic() > deadline:
                    raise CannotMeasure(f"the collector does not start: {(folder / 'log').read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield port, config
    finally:
        serving.terminate()
        serving.wait(30)


def joined(port: int) -> type[Sekisho]:
    """An agent that sends to the collector at `port` of this machine."""

    class Joined(Sekisho):
        more = (
            f'[agent.collector]\nurl = "http://127.0.0.1:{port}"\ntoken = "bench"\n'
            '[[agent.limit]]\nname = "burst"\nfiles = 1000000\nwindow = "10m"\n'
        )

    return Joined


class Tail:
    """`sekisho-collector tail -f -o json`, each line with the moment it came out."""

    def __init__(self, config: Path) -> None:
        command = [sys.executable, "-m", "server_stub.cli", "tail", "-f", "-o", "json", "-c", str(config)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.lines: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put((time.monotonic_ns(), line))

    def wait_for(self, name: str) -> int:
        """When the copy of the file `name` was told, in monotonic ns."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                at, line = self.lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise CannotMeasure(f"the copy of {name} was not told within {DEADLINE_S:.0f} s") from None
            event = json.loads(line)
            if event.get("metadata", {}).get("event_code") != "file.copied_out":
                continue
            if event["unmapped"]["sekisho"]["source"]["path"].endswith(f"/{name}"):
                return at

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


def copy(source: Path, target: Path) -> int:
    """As cp does it; the moment close(2) of the copy returned, in monotonic ns."""
    data = source.read_bytes()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.close(fd)
    return time.monotonic_ns()


def main() -> None:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("-n", "--copies", type=int, default=100)
    args.add_argument("-r", "--rounds", type=int, default=1, help="accepted for the sake of `python -m bench`; not used")
    given = args.parse_args()
    chance = random.Random(8)
    took: list[float] = []
    with ground.ground("latency", 1, 1) as place, collector(place) as (port, config):
        for number in range(given.copies + 5):
            (place.protected / f"n{number}.csv").write_bytes(chance.randbytes(4000))

        with ground.watching("sekisho", place, joined(port)):
            tail = Tail(config)
            try:
                for number in range(given.copies + 5):
                    time.sleep(chance.uniform(0.02, 0.25))
                    closed = copy(place.protected / f"n{number}.csv", place.medium / f"n{number}.csv")
                    told = tail.wait_for(f"n{number}.csv")
                    if number >= 5:  # the first ones find cold caches and the tail's beginning
                        took.append((told - closed) / 1e6)
            finally:
                tail.close()
    cells = [f"{ground.percentile(took, share):.0f}" for share in (0.5, 0.9, 0.99, 1)]
    rows = [[str(len(took)), f"{min(took):.0f}", *cells, f"{statistics.fmean(took):.0f}"]]
    head = ["copies", "least ms", "median ms", "p90 ms", "p99 ms", "most ms", "mean ms"]
    ground.report("latency", {"close(2) on the medium → line of the tail": ground.table(head, rows)}, took)


if __name__ == "__main__":
    ground.main(main)
