"""The yardstick for ingest: rsyslog on the same disk, fed over RELP by as many connections, each with as much under way.

Owns: a RELP client (https://www.rsyslog.com/doc/relp.html: `TXNR COMMAND LENGTH DATA`), and an rsyslogd of our own with its
own configuration, pid file and directories, on loopback. Two of rsyslog's promises are measured:

    disk      queue.type="Disk", queue.syncQueueFiles="on": a message is on the disk when it is acknowledged, as with us
    assisted  queue.type="LinkedList" that spills to disk, a synced file behind it: acknowledged from memory
"""

import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

QUEUES = {
    "disk": 'queue.type="Disk" queue.filename="in" queue.syncQueueFiles="on" queue.checkpointInterval="1"',
    "assisted": 'queue.type="LinkedList" queue.filename="in" queue.syncQueueFiles="on" queue.size="200000"',
}
CONFIG = """
global(workDirectory="{root}" maxMessageSize="64k")
module(load="imrelp")
template(name="raw" type="string" string="%msg%\\n")
ruleset(name="kept" {queue}) {{
    action(type="omfile" file="{root}/out.log" template="raw" sync="on" asyncWriting="off")
}}
input(type="imrelp" port="{port}" address="127.0.0.1" ruleset="kept" maxDataSize="64k")
"""


def missing() -> str:
    """Why the yardstick can't be laid; empty if it can."""
    if shutil.which("rsyslogd") is None:
        return "rsyslogd is not installed (packages rsyslog, rsyslog-relp)"
    return "" if list(Path("/usr/lib").glob("*/rsyslog/imrelp.so")) else "imrelp is not installed (package rsyslog-relp)"


def _frame(number: int, command: bytes, data: bytes) -> bytes:
    return b"%d %s %d%s\n" % (number, command, len(data), b" " + data if data else b"")


def _answer(stream: Any) -> None:
    """Read one response; a trailing newline ends it."""
    head = b""
    while head.count(b" ") < 3:
        byte = stream.read(1)
        if not byte:
            raise ConnectionError("rsyslogd closed the connection")
        head += byte
        if byte == b"\n":
            return
    rest = stream.read(int(head.split(b" ")[2]) + 1)
    if not rest.startswith(b"200"):
        raise ConnectionError(f"rsyslogd refused: {rest!r}")


def send(port: int, messages: list[bytes], window: int) -> None:
    """One session: `window` messages at once, then their acknowledgements."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock, sock.makefile("rb") as stream:
        sock.sendall(_frame(1, b"open", b"relp_version=0\nrelp_software=bench,1,local\ncommands=syslog"))
        _answer(stream)
        number = 1
        for first in range(0, len(messages), window):
            part = messages[first : first + window]
            sock.sendall(b"".join(_frame(number + n, b"syslog", message) for n, message in enumerate(part, 1)))
            number += len(part)
            for _ in part:
                _answer(stream)
        sock.sendall(_frame(number + 1, b"close", b""))
        stream.read()  # its answer and its own close, until it hangs up


def measure(root: Path, port: int, kind: str, lines: list[list[bytes]], window: int) -> dict[str, Any]:
    """Feed each of `lines` over a connection of its own; events a second until acknowledged, and until in the file."""
    root.mkdir()
    config, out = root / "rsyslog.conf", root / "out.log"
    config.write_text(CONFIG.format(root=root, queue=QUEUES[kind], port=port))
    messages = [[b"<134>1 - ws sekisho - - - " + line for line in each] for each in lines]
    count = sum(map(len, lines))
    with (root / "log").open("wb") as log:
        served = subprocess.Popen(["rsyslogd", "-n", "-f", str(config), "-i", str(root / "pid")], stdout=log, stderr=log)
    try:
        _wait_for(lambda: _listens(port), "rsyslogd does not listen")
        process = psutil.Process(served.pid)
        before = process.cpu_times()
        began = time.perf_counter()
        failed: list[str] = []

        def run(each: list[bytes]) -> None:
            try:
                send(port, each, window)
            except (OSError, ValueError) as error:
                failed.append(str(error))

        threads = [threading.Thread(target=run, args=(each,)) for each in messages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise SystemExit(f"rsyslog: {failed[0]}")
        acked = time.perf_counter() - began
        wanted = sum(len(line) + 1 for each in lines for line in each)
        _wait_for(lambda: out.exists() and out.stat().st_size >= wanted, "rsyslogd lost some")
        stored = time.perf_counter() - began
        after = process.cpu_times()
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(60)
    return {
        "events": count,
        "acked_per_s": round(count / acked),
        "stored_per_s": round(count / stored),
        "cpu_s_per_100k": round((after.user + after.system - before.user - before.system) * 100_000 / count, 2),
    }


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_for(holds: Any, otherwise: str) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(0.02)
