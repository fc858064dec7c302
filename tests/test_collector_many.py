"""Several collectors over one PostgreSQL: one order of events, whoever writes, stops, is killed or comes back."""

import base64
import contextlib
import http.client
import itertools
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from nacl.signing import SigningKey

from agent.contract import chain, wire
from server_stub import query, tree
from server_stub.commit import Writer
from server_stub.query import Filter
from server_stub.store import StoreError
from server_stub.store.pgsession import WRITE_LOCK
from server_stub.store.postgres import PostgresStore
from tests import postgres
from tests.bundles import COLLECTOR, Machine
from tests.collector_client import Client
from tests.house import Collector, until

if lacking := postgres.missing():
    pytest.skip(lacking, allow_module_level=True)

FAIL_OVER_S = 5.0


class Balancer:
    """Passes connections on to the collectors in turn, past those that are not there: what stands before a real site."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = itertools.cycle(ports)
        self.count = len(ports)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self._pass, args=(near,), daemon=True).start()

    def _pass(self, near: socket.socket) -> None:
        with near:
            for _ in range(self.count):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", next(self.ports)), timeout=5) as far:
                    far.settimeout(None)
                    back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
                    back.start()
                    self._pump(near, far)
                    back.join()
                    return

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.listener.close()


class Site:
    """Collectors over one database and one signing key."""

    def __init__(self, root: Path, database: str, count: int = 2) -> None:
        self.database, self.collectors = database, list[Collector]()
        for number in range(count):
            place = root / f"c{number}"
            place.mkdir()
            self.collectors.append(Collector(place, database, f'key_file = "{root}/signing.key"\n'))

    def start(self) -> None:
        for each in self.collectors:
            each.start()

    def stop(self) -> None:
        for each in self.collectors:
            each.stop()

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database) as db:
            return db.execute(sql.encode(), values).fetchall()


@pytest.fixture
def site(tmp_path: Path, postgres_node: postgres.Node) -> Iterator[Site]:
    made = Site(tmp_path, postgres_node.database())
    made.start()
    yield made
    made.stop()


def check_log(site: Site) -> None:
    """Positions without a hole, and the tree that the store keeps is that of its events."""
    rows = site.rows("SELECT pos, raw FROM events ORDER BY pos")
    assert [pos for pos, _ in rows] == list(range(1, len(rows) + 1))
    frontier, expected = tree.Frontier(), {}
    for _, raw in rows:
        expected |= {(level, n): node for level, n, node in frontier.add(tree.leaf_hash(raw))}
    assert {(level, n): node for level, n, node in site.rows("SELECT level, n, hash FROM nodes")} == expected
    assert site.rows("SELECT size, roots FROM tip") == [(len(rows), b"".join(frontier.roots))]


class Load:
    """Agents that send through one address as real ones do, until they are stopped; what they have receipts for."""

    def __init__(self, agents: list[Client], key: bytes) -> None:
        self.agents, self.key = agents, key
        self.acknowledged = dict.fromkeys((each.id for each in agents), 0)
        self.stopping = threading.Event()
        self.odd: list[object] = []
        self.receipts: list[tuple[float, float, wire.Receipt]] = []
        """With when their batch was sent first, and when they came (s, monotonic)."""
        self.threads = [threading.Thread(target=self._work, args=(each,)) for each in agents]
        for thread in self.threads:
            thread.start()

    def _work(self, agent: Client) -> None:
        chance, sent, began = random.Random(agent.id), 0, 0.0
        while not self.stopping.is_set():
            if len(agent.lines) == sent:
                agent.append_some(chance.randint(1, 40))
                began = time.monotonic()
            try:
                status, answer = agent.send(sent + 1)
            except (OSError, ValueError, http.client.HTTPException):
                time.sleep(0.01)
                continue
            if status == 200:
                receipt = wire.Receipt(**answer)
                chain.check(chain.receipt_bytes(receipt), receipt.sig, self.key)
                self.receipts.append((began, time.monotonic(), receipt))
                sent = self.acknowledged[agent.id] = answer["last"]
            elif status == 409 and answer["reason"] == "hole" and answer["expected"] > self.acknowledged[agent.id]:
                sent = answer["expected"] - 1
            elif status not in (429, 503):
                self.odd.append((status, answer))
                return

    @property
    def total(self) -> int:
        return sum(self.acknowledged.values())

    def more(self, events: int, within_s: float = 30.0) -> None:
        goal = self.total + events
        until(lambda: self.total >= goal or self.odd, lambda: f"{self.total} of {goal}", within_s)
        assert not self.odd

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        assert not self.odd

    def held_by(self, site: Site) -> None:
        """All that has a receipt is there, once, in its order and to the byte."""
        before = dict(self.acknowledged)
        for agent in self.agents:
            sql = "SELECT seq, raw FROM readable WHERE agent = %s ORDER BY pos"
            rows = site.rows(sql, agent.id)
            assert len(rows) >= before[agent.id], "something acknowledged is lost"
            assert [seq for seq, _ in rows] == list(range(1, len(rows) + 1))
            assert [raw for _, raw in rows] == agent.lines[: len(rows)]


def enrolled(port: int, count: int) -> tuple[list[Client], bytes]:
    agents = [Client(port, f"ws-{n}") for n in range(count)]
    keys = [base64.b64decode(each.enrol()[1]["key"]) for each in agents]
    return agents, keys[0]


def test_an_agent_may_send_to_any_and_all_show_one_log(site: Site) -> None:
    one, two = site.collectors
    agents, key = enrolled(one.port, 2)
    for turn in range(6):
        for agent in agents:
            agent.port = site.collectors[turn % 2].port
            agent.append_some(5)
            status, receipt = agent.send(len(agent.lines) - 4)
            assert status == 200
            got = wire.Receipt(**receipt)
            chain.check(chain.receipt_bytes(got), got.sig, key)
            assert got.tree_size == (turn * 2 + agents.index(agent) + 1) * 5, "one tree"
    assert agents[0].send(1, 5)[1]["tree_size"] == 5, "a repeat gets the receipt of the collector that took it"
    assert one.events(event="file.*") == two.events(event="file.*")
    assert one.get("/v1/log/keys") == two.get("/v1/log/keys")
    assert one.get("/v1/agents")["agents"][0]["name"] == two.get("/v1/agents")["agents"][0]["name"] == "ws-0"


def test_what_is_changed_at_one_collector_holds_at_the_other(site: Site) -> None:
    one, two = site.collectors
    agent = Client(two.port)
    version = json.loads(agent.enrol()[1]["register"]["body"])["version"]
    target = f"/v1/register?after={version}"
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(agent.ask("GET", target, None, agent.signed(target))))
    waiting.start()
    approval = ["--owner", "a", "--approver", "b", "--purpose", "c", "--until", "never"]
    one.run("media", "approve", "usb:1", *approval)
    waiting.join(10)
    assert answers and answers[0][0] == 200 and "usb:1" in answers[0][1]["body"], "an agent that waits at the other is told"
    token = one.run("token", "create", "--role", "viewer").strip()
    connection = http.client.HTTPConnection("127.0.0.1", two.port)
    connection.request("GET", "/v1/events", headers={"Authorization": f"Bearer {token}"})
    assert connection.getresponse().status == 200
    connection.close()


def test_one_persons_looks_are_one_record_wherever_they_were(site: Site) -> None:
    one, two = site.collectors
    token = one.run("token", "create", "--role", "viewer", "--note", "siem").strip()
    for house in (one, two, two, one):
        house._token = token
        house.get("/v1/events?user=sato")
    looks = [each for each in one.events(event="record.viewed") if "user=sato" in each["message"]]
    assert len(looks) == 1


def test_silence_is_said_once_and_not_while_another_collector_hears(tmp_path: Path, postgres_node: postgres.Node) -> None:
    site = Site(tmp_path, postgres_node.database())
    for each in site.collectors:
        each.config_file.write_text(each.config_file.read_text().replace('silent_after = "5s"', 'silent_after = "1500ms"'))
    site.start()
    try:
        agent = Client(site.collectors[0].port)
        agent.enrol()
        site.collectors[1].get("/v1/agents")
        agent.port = site.collectors[1].port
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert agent.send(1, 0)[0] == 200
        assert not site.rows("SELECT 1 FROM readable WHERE code = 'agent.silent'"), "the first has not heard it for 4 s"
        count = "SELECT count(*) FROM readable WHERE code = %s"
        until(lambda: site.rows(count, "agent.silent") == [(1,)], "it is said")
        agent.port = site.collectors[0].port
        assert agent.send(1, 0)[0] == 200
        until(lambda: site.rows(count, "agent.back") == [(1,)], "it is back")
        assert site.rows(count, "agent.silent") == [(1,)]
    finally:
        site.stop()


def test_killed_one_after_the_other_they_lose_and_double_nothing(site: Site) -> None:
    balancer = Balancer([each.port for each in site.collectors])
    agents, key = enrolled(balancer.port, 4)
    load, chance = Load(agents, key), random.Random(11)
    for turn in range(10):
        load.more(chance.randint(50, 200))
        time.sleep(chance.random() * 0.02)
        victim = site.collectors[turn % 2]
        victim.stop(signal.SIGKILL)
        load.more(50, FAIL_OVER_S)
        load.held_by(site)
        victim.start()
    load.stop()
    load.held_by(site)
    check_log(site)
    placed = {(agent, seq): pos for agent, seq, pos in site.rows("SELECT agent, seq, pos FROM readable")}
    order = sorted((began, receipt.tree_size) for began, _, receipt in load.receipts)
    done = sorted((ended, receipt.tree_size) for _, ended, receipt in load.receipts)
    for _, _, receipt in load.receipts:
        assert receipt.tree_size == placed[receipt.agent, receipt.last], "also a repeat's tree is that of when it was taken"
    highest, at = 0, 0
    for began, size in order:
        while at < len(done) and done[at][0] < began:
            highest, at = max(highest, done[at][1]), at + 1
        assert size > highest, "a receipt's tree has all that was receipted before its batch was first sent"
    balancer.close()


def test_a_collector_that_is_stopped_while_it_holds_the_order_is_fenced(site: Site) -> None:
    one, two = site.collectors
    agents, key = enrolled(one.port, 4)
    load = Load(agents, key)
    assert one._process is not None
    holds = (
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = %s AND objid = %s"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    for _ in range(300):
        load.more(1)
        one._process.send_signal(signal.SIGSTOP)
        time.sleep(0.05)  # what its backend had begun by itself is over
        if site.rows(holds, WRITE_LOCK >> 32, WRITE_LOCK & 0xFFFFFFFF) == [(1,)]:
            break
        one._process.send_signal(signal.SIGCONT)
    else:
        pytest.fail("it was never stopped within a transaction")
    other = Client(two.port, "ws-other")
    began = time.monotonic()
    until(lambda: other.enrol()[0] == 200, "the other goes on", 15)
    other.append_some(3)
    assert other.send()[0] == 200
    taken = time.monotonic() - began
    print(f"the other collector goes on after {taken:.2f} s")
    assert taken <= FAIL_OVER_S
    one._process.send_signal(signal.SIGCONT)
    load.more(50)
    load.stop()
    load.held_by(site)
    check_log(site)


def _writer(url: str) -> tuple[PostgresStore, Writer]:
    store = PostgresStore(url)
    return store, Writer(store, COLLECTOR, "c", now=lambda: time.time_ns() // 1_000_000, woken=lambda _size: None)


@pytest.mark.parametrize("how", ["between statements", "within a copy"])
def test_whoever_keeps_the_lock_and_says_nothing_is_ended(postgres_node: postgres.Node, how: str) -> None:
    url = postgres_node.database()
    store, writer = _writer(url)
    held = psycopg.connect(url, autocommit=True)
    held.execute("BEGIN")
    held.execute("SELECT pg_advisory_xact_lock(%s)", (WRITE_LOCK,))
    if how == "within a copy":
        copying = held.cursor().copy("COPY nodes FROM STDIN")
        copying.__enter__().write(b"8\t0\t\\\\x00\n")
    began = time.monotonic()
    machine = Machine(COLLECTOR, "ws")
    machine.event()
    batch = machine.batch(1, 1)
    assert writer.submit(lambda it: it.take(batch)).result(20)[0] == "accept"
    assert time.monotonic() - began <= FAIL_OVER_S
    with pytest.raises(psycopg.Error):
        if how == "within a copy":
            copying.__exit__(None, None, None)
        held.execute("COMMIT")
    held.close()
    writer.close()
    store.close()


def test_a_tail_skips_and_doubles_nothing_under_many_writers_and_aborts(postgres_node: postgres.Node) -> None:
    url = postgres_node.database()
    sites = [_writer(url) for _ in range(4)]
    machines = [Machine(SigningKey(bytes([n + 1]) * 32), f"ws-{n}") for n in range(8)]
    stopping, written, odd = threading.Event(), threading.Event(), list[object]()
    taken = [0] * len(machines)

    def write(number: int) -> None:
        chance, machine = random.Random(number), machines[number]
        while not stopping.is_set():
            for _ in range(chance.randint(1, 30)):
                machine.event()
            batch = machine.batch(taken[number] + 1, len(machine.lines))

            def work(writer: Writer, batch: Any = batch) -> Any:
                done = writer.take(batch)
                if chance.random() < 0.1:
                    raise ZeroDivisionError  # all that was written in this group is dropped, others' too
                if chance.random() < 0.05:
                    writer.session.execute("SELECT pg_terminate_backend(pg_backend_pid())")
                return done

            while not stopping.is_set():
                try:
                    chance.choice(sites)[1].submit(work).result(30)
                    taken[number] = len(machine.lines)
                    break
                except StoreError:
                    continue
                except Exception as error:
                    odd.append(error)
                    return

    def read(seen: list[tuple[int, bytes]], store: PostgresStore) -> None:
        cursor = 0
        while True:
            last = written.is_set()
            sql, values = query.tail(Filter(), after=cursor, upto=1 << 53, limit=500, dialect=store.dialect)
            rows = store.rows(sql, values)
            seen += [(pos, raw) for pos, raw, _, _ in rows]
            cursor = rows[-1][0] if rows else cursor
            if last and not rows:
                return

    readers = [PostgresStore(url) for _ in range(3)]
    seen: list[list[tuple[int, bytes]]] = [[] for _ in readers]
    jobs: list[Callable[[], None]] = [lambda n=n: write(n) for n in range(len(machines))]  # type: ignore[misc]
    jobs += [lambda s=s, r=r: read(s, r) for s, r in zip(seen, readers, strict=True)]  # type: ignore[misc]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    until(lambda: sum(taken) > 4000 or odd, lambda: f"{taken}", 60)
    stopping.set()
    for thread in threads[: len(machines)]:
        thread.join()
    written.set()
    for thread in threads:
        thread.join()
    assert not odd
    with psycopg.connect(url) as db:
        stored = db.execute("SELECT pos, raw FROM events ORDER BY pos").fetchall()
    assert [pos for pos, _ in stored] == list(range(1, len(stored) + 1)) and len(stored) >= sum(taken)
    for each in seen:
        assert each == stored[: len(each)] and len(each) >= sum(taken), "what was seen is the log, in its order"
    for store in readers:
        store.close()
    for store, writer in sites:
        writer.close()
        store.close()


def test_the_primary_is_killed_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    room = postgres.room()
    nodes = [postgres.Node(room, "one")]
    try:
        nodes[0].make()
        nodes[0].start()
        nodes[0].sql("CREATE DATABASE site ENCODING 'UTF8' TEMPLATE template0")
        nodes += [nodes[0].standby("two"), nodes[0].standby("three")]
        nodes[0].sql("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (two, three)'")
        nodes[0].sql("SELECT pg_reload_conf()")
        count = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'"
        until(lambda: nodes[0].sql(count) == [(2,)], "both follow")
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        site = Site(tmp_path, f"postgresql://sekisho@{hosts}/site?target_session_attrs=read-write")
        site.start()
        try:
            balancer = Balancer([each.port for each in site.collectors])
            agents, key = enrolled(balancer.port, 4)
            load = Load(agents, key)
            load.more(300)
            nodes[0].stop(signal.SIGKILL)
            received = "SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn"
            ahead = max(nodes[1:], key=lambda node: node.sql(received)[0][0])
            began, before = time.monotonic(), load.total
            ahead.promote()
            load.more(50, 30)
            print(f"{before} were acknowledged; {time.monotonic() - began:.1f} s after the order to promote, 50 more were")
            load.stop()
            load.held_by(site)
            check_log(site)
            balancer.close()
        finally:
            site.stop()
    finally:
        for node in nodes:
            node.stop()
        import shutil

        shutil.rmtree(room)
