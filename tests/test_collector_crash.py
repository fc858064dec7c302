"""What was receipted is there: after kill -9 at any moment, and after a backup was put back."""

import asyncio
import contextlib
import http.client
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from nacl.signing import SigningKey
from starlette.requests import Request

from agent.contract import chain
from server_stub import acts, tree
from server_stub.answers import Refused
from server_stub.app import Health
from server_stub.collector import opened
from server_stub.commit import Writer
from server_stub.config import Settings
from server_stub.fleet import Change, Machine
from server_stub.store import StoreError
from server_stub.store.sqlite import SqliteStore
from tests.collector_client import Client
from tests.house import Collector

ROUNDS = 10


@pytest.fixture
def collector(tmp_path: Path, store_kind: str) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    made.stop()


def stored(collector: Collector, agent: str) -> list[tuple[int, bytes, bytes]]:
    with collector.store() as store:
        rows = store.execute("SELECT seq, raw, hash FROM readable WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
    return [(seq, raw.encode() if isinstance(raw, str) else raw, link) for seq, raw, link in rows]


def test_killed_again_and_again_under_load_it_loses_and_doubles_nothing(collector: Collector) -> None:
    agents = [Client(collector.port, f"ws-{n}") for n in range(3)]
    for each in agents:
        assert each.enrol()[0] == 200
    acknowledged = dict.fromkeys((each.id for each in agents), 0)
    stopping = threading.Event()
    odd: list[object] = []

    def work(agent: Client) -> None:
        """As a real agent does: send, and again until there is a receipt; on a hole, from where it is told."""
        chance = random.Random(agent.id)
        sent = 0
        while not stopping.is_set():
            if len(agent.lines) == sent:
                agent.append_some(chance.randint(1, 40))
            try:
                status, answer = agent.send(sent + 1)
            except (OSError, ValueError, http.client.HTTPException):
                time.sleep(0.01)
                continue
            if status == 200:
                sent = acknowledged[agent.id] = answer["last"]
            elif status == 409 and answer["reason"] == "hole" and answer["expected"] > acknowledged[agent.id]:
                sent = answer["expected"] - 1
            elif status not in (429, 503):
                odd.append((status, answer))
                return

    threads = [threading.Thread(target=work, args=(each,)) for each in agents]
    for thread in threads:
        thread.start()
    chance = random.Random(7)
    for _ in range(ROUNDS):
        goal = sum(acknowledged.values()) + chance.randint(50, 300)
        deadline = time.monotonic() + 30
        while sum(acknowledged.values()) < goal and not odd and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        collector.stop(signal.SIGKILL)
        before = {each.id: acknowledged[each.id] for each in agents}
        for each in agents:
            rows = stored(collector, each.id)
            assert len(rows) >= before[each.id], "something acknowledged is lost"
        collector.start()
    stopping.set()
    for thread in threads:
        thread.join()
    assert not odd
    collector.stop()
    for each in agents:
        rows = stored(collector, each.id)
        assert [seq for seq, _, _ in rows] == list(range(1, len(rows) + 1))
        assert [raw for _, raw, _ in rows] == each.lines[: len(rows)]
        assert [link for _, _, link in rows] == each.hashes[1 : len(rows) + 1]
    check_tree(collector)
    collector.start()


def check_tree(collector: Collector) -> None:
    with collector.store() as store:
        rows = store.execute("SELECT pos, raw FROM events ORDER BY pos").fetchall()
        kept = {(level, n): node for level, n, node in store.execute("SELECT level, n, hash FROM nodes")}
    assert [pos for pos, _ in rows] == list(range(1, len(rows) + 1))
    frontier, expected = tree.Frontier(), {}
    for _, raw in rows:
        expected |= {(level, n): node for level, n, node in frontier.add(tree.leaf_hash(raw))}
    assert kept == expected


@pytest.mark.sqlite
def test_a_collector_put_back_from_a_backup_is_filled_again(collector: Collector, tmp_path: Path) -> None:
    agent = Client(collector.port)
    agent.enrol()
    agent.append_some(10)
    assert agent.send(1, 4)[0] == 200
    collector.stop()
    shutil.copytree(collector.state_dir, tmp_path / "backup")
    collector.start()
    assert agent.send(5, 10)[0] == 200
    collector.stop()
    shutil.rmtree(collector.state_dir)
    shutil.copytree(tmp_path / "backup", collector.state_dir)
    collector.start()
    agent.append_some(2)
    status, problem = agent.send(11)
    assert (status, problem["reason"], problem["expected"], problem["hash"]) == (409, "hole", 5, agent.hashes[4].hex())
    assert agent.send(5)[0] == 200
    assert [raw for _, raw, _ in stored(collector, agent.id)] == agent.lines


def test_a_collector_that_lost_everything_but_its_key_starts_from_the_first(collector: Collector) -> None:
    agent = Client(collector.port)
    key = agent.enrol()[1]["key"]
    agent.append_some(6)
    assert agent.send()[0] == 200
    collector.stop()
    collector.forget()
    collector.start()
    status, problem = agent.send(7, 6)
    assert status == 401 and "enroll" in problem["detail"]
    assert agent.enrol()[1]["key"] == key
    status, problem = agent.send(7, 6)
    assert (status, problem["reason"], problem["expected"]) == (409, "hole", 1)
    assert problem["hash"] == chain.genesis(agent.id, 1).hex()
    assert agent.send()[0] == 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB that can be filled, and mounted read-only."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "sekisho-test", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs root to mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


@pytest.mark.sqlite
def test_on_a_truly_full_disk_nothing_is_half_accepted_and_all_goes_on_when_there_is_room(
    small_disk: Path, store_kind: str
) -> None:
    house = Collector(small_disk)
    house.start()
    agent = Client(house.port)
    try:
        agent.enrol()
        agent.append_some(100)
        assert agent.send()[0] == 200
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        acknowledged, refused = 100, 0
        for _ in range(200):
            agent.append_some(50)
            connection = http.client.HTTPConnection("127.0.0.1", house.port, timeout=30)
            headers = {"Sekisho-Agent": agent.id, "Content-Encoding": "gzip"}
            connection.request("POST", "/v1/batches", agent.batch(acknowledged + 1, acknowledged + 50), headers)
            answer = connection.getresponse()
            text = json.loads(answer.read())
            connection.close()
            if answer.status == 200:
                acknowledged += 50
                continue
            assert answer.status == 503 and answer.headers["Retry-After"] and "make room on its disk" in text["detail"]
            refused += 1
            if refused == 3:
                break
        assert refused == 3, "4 MB hold everything?"
        status, problem = agent.ask("GET", "/readyz")
        assert status == 503 and "not writable" in problem["detail"] and "make room" in problem["detail"]
        assert agent.ask("GET", "/healthz")[0] == 200, "it lives, and says why it does not work"
        with pytest.raises(urllib.error.HTTPError, match="503"):
            house.events(event="file.*")  # a look that can't be put on record is not answered
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        status, receipt = agent.send(acknowledged + 1)
        assert (status, receipt["last"]) == (200, len(agent.lines))
        assert agent.ask("GET", "/readyz")[0] == 200
        assert [json.dumps(each) for each in house.events(event="file.*")] == [
            json.dumps(json.loads(line)) for line in agent.lines
        ]
    finally:
        house.stop()
    assert house.state_dir.exists()
    check_tree(house)


def test_whoever_gives_up_waiting_does_not_stop_the_writer(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "collector.db")
    entered, go_on = threading.Event(), threading.Event()
    writer = Writer(store, SigningKey.generate(), "test", now=lambda: 1, woken=lambda _size: None)

    def hold(_writer: Writer) -> None:
        entered.set()
        go_on.wait(10)

    first = writer.submit(hold)
    assert entered.wait(10)
    given_up = writer.submit(lambda _writer: pytest.fail("nobody waits for this any more"))
    assert given_up.cancel() and not first.cancel()
    go_on.set()
    assert first.result(10) is None
    assert writer.submit(lambda writer: writer.size).result(10) == 0
    writer.close()
    store.close()


@pytest.mark.sqlite
def test_a_full_or_broken_disk_is_said_and_forgotten_once_mended(collector: Collector) -> None:
    agent = Client(collector.port)
    agent.enrol()
    agent.append_some(4)
    assert agent.send(1, 1)[0] == 200
    db = sqlite3.connect(collector.state_dir / "collector.db")
    db.execute("CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT raise(ABORT, 'database or disk is full'); END")
    db.commit()
    status, problem = agent.send(2, 3)
    assert status == 503 and "make room" in problem["detail"]
    assert agent.send(2, 3)[0] == 503
    db.execute("DROP TRIGGER full")
    db.commit()
    db.close()
    assert agent.send(2, 4)[0] == 200
    assert [seq for seq, _, _ in stored(collector, agent.id)] == [1, 2, 3, 4]
    collector.stop()
    check_tree(collector)
    collector.start()


@pytest.mark.sqlite
def test_one_store_has_one_writer(collector: Collector, tmp_path: Path) -> None:
    import subprocess
    import sys

    second = tmp_path / "second.toml"
    second.write_text(collector.config_file.read_text().replace(str(collector.port), "0"))
    done = subprocess.run(
        [sys.executable, "-m", "server_stub.cli", "serve", "-c", str(second)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "another collector" in done.stderr
    agent = Client(collector.port)
    assert agent.enrol()[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_collector_whose_writer_ended_says_so_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def story() -> None:
        where = {"state_dir": tmp_path / "collector", "key_file": tmp_path / "signing.key"}
        more = {"host": "127.0.0.1", "port": 0, "tls_cert": "", "tls_key": "", "enroll_token": "", "silent_after_ms": 300_000}
        async with opened(Settings(**where, **more)) as collector:
            health = Health(collector)
            assert (await health.healthz(Request({"type": "http"}))).status_code == 200

            def fault(_size: int) -> None:
                raise MemoryError

            collector.writer.woken = fault
            await collector.change(lambda writer: acts.note_change(writer, Change(Machine("a" * 32, "ws", 1, False), "silent")))
            while collector.writer.running():
                await asyncio.sleep(0.001)
            with pytest.raises(Refused) as unwell:
                await health.healthz(Request({"type": "http"}))
            assert unwell.value.status == 503
            with pytest.raises(StoreError, match="restart the collector"):
                await asyncio.wait_for(collector.change(lambda writer: writer.size), 10)
            with pytest.raises(Refused):
                await health.readyz(Request({"type": "http"}))

    asyncio.run(story())
