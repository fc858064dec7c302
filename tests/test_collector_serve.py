"""The collector over its real listener: what agents, programs and readers of the stream may rely on."""

import asyncio
import base64
import http.client
import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from jsonschema import Draft202012Validator
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from agent.contract import chain, wire
from server_stub import app, query, tail, tree
from server_stub.commands import sse
from tests.collector_client import Client, copied, draft
from tests.house import Collector, until


@pytest.fixture
def collector(tmp_path: Path, store_kind: str) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def agent(collector: Collector) -> Client:
    made = Client(collector.port)
    assert made.enrol()[0] == 200
    return made


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def checked(collector: Collector, agent: Client, receipt: Any) -> wire.Receipt:
    got = wire.Receipt(**receipt)
    chain.check(chain.receipt_bytes(got), got.sig, collector_key(collector, agent))
    return got


def collector_key(_collector: Collector, agent: Client) -> bytes:
    return base64.b64decode(agent.enrol()[1]["key"])


def test_what_is_receipted_is_there_to_the_byte(collector: Collector, agent: Client) -> None:
    agent.append_some(5)
    status, receipt = agent.send()
    assert status == 200
    got = checked(collector, agent, receipt)
    assert (got.agent, got.epoch, got.last, got.hash, got.tree_size) == (agent.id, 1, 5, agent.hashes[5].hex(), 5)
    assert [json.dumps(event) for event in collector.events()] == [json.dumps(json.loads(line)) for line in agent.lines]
    uid = json.loads(agent.lines[2])["metadata"]["uid"]
    connection = http.client.HTTPConnection("127.0.0.1", collector.port)
    connection.request("GET", f"/v1/events/{uid}", headers=bearer(collector._token))
    assert connection.getresponse().read() == agent.lines[2]
    connection.close()


def test_a_repeat_gets_the_same_receipt_and_is_kept_once(collector: Collector, agent: Client) -> None:
    agent.append_some(4)
    first = agent.send(1, 2)
    second = agent.send(3, 4)
    assert first[0] == second[0] == 200
    assert agent.send(1, 2) == first
    assert agent.send(3, 4) == second
    assert agent.send(2, 3)[1]["last"] == 3
    assert len(collector.events()) == 4


def test_a_batch_that_begins_in_what_is_held_adds_only_the_rest(collector: Collector, agent: Client) -> None:
    agent.append_some(6)
    agent.send(1, 4)
    status, receipt = agent.send(2, 6)
    assert (status, receipt["last"], receipt["tree_size"]) == (200, 6, 6)
    assert [event["metadata"]["sequence"] for event in collector.events()] == [1, 2, 3, 4, 5, 6]


def test_a_hole_is_told_with_what_is_expected(collector: Collector, agent: Client) -> None:
    agent.append_some(6)
    status, problem = agent.send(4, 6)
    assert (status, problem["reason"], problem["expected"], problem["hash"]) == (409, "hole", 1, agent.hashes[0].hex())
    assert agent.content_type == "application/problem+json"
    agent.send(1, 2)
    status, problem = agent.send(4, 6)
    assert (status, problem["reason"], problem["expected"], problem["hash"]) == (409, "hole", 3, agent.hashes[2].hex())
    assert agent.send(3, 6)[0] == 200


def test_a_forked_chain_is_refused_and_the_first_one_stands(collector: Collector, agent: Client) -> None:
    agent.append_some(3)
    agent.send()
    clone = Client(collector.port, key=agent.key)
    clone.append_some(5)
    for part in ((1, 2), (1, 3), (1, 5), (4, 5)):
        status, problem = clone.send(*part)
        assert (status, problem["reason"], problem["expected"], problem["hash"]) == (409, "fork", 4, agent.hashes[3].hex())
    assert len(collector.events()) == 3
    agent.append_some(1)
    assert agent.send(4)[0] == 200


def test_a_heartbeat_is_a_receipt_without_an_event(collector: Collector, agent: Client) -> None:
    assert agent.send(1, 0)[1]["last"] == 0
    agent.append_some(2)
    receipt = agent.send()
    assert agent.send(3, 2) == receipt
    assert len(collector.events()) == 2
    clone = Client(collector.port, key=agent.key)
    clone.append_some(2)
    assert clone.send(3, 2)[0] == 409


def test_a_new_epoch_is_a_chain_of_its_own(collector: Collector, agent: Client) -> None:
    agent.append_some(3)
    agent.send()
    reborn = Client(collector.port, key=agent.key, epoch=2)
    reborn.append_some(2)
    assert reborn.send()[0] == 200
    agent.append_some(1)
    assert agent.send(4)[0] == 200, "what the old spool still held may follow"
    assert len(collector.events()) == 6


def test_every_event_has_a_proof_that_leads_to_a_signed_checkpoint(collector: Collector, agent: Client) -> None:
    agent.append_some(300)
    agent.send()
    public = collector_key(collector, agent)
    origin = f"sekisho/{chain.agent_id(public)}"
    old_note = collector_text(collector, "/v1/log/checkpoint")
    old_size, old_root = tree.read_checkpoint(old_note, origin, public)
    agent.append_some(33)
    agent.send(301)
    for number in (0, 255, 256, 299, 332):
        uid = json.loads(agent.lines[number])["metadata"]["uid"]
        proof = collector.get(f"/v1/events/{uid}/proof")
        size, root = tree.read_checkpoint(proof["checkpoint"], origin, public)
        path = [base64.b64decode(step) for step in proof["path"]]
        tree.check_inclusion(tree.leaf_hash(agent.lines[number]), proof["index"], size, path, root)
    new_size, new_root = tree.read_checkpoint(collector_text(collector, "/v1/log/checkpoint"), origin, public)
    steps = collector.get(f"/v1/log/consistency?from={old_size}&to={new_size}")["path"]
    tree.check_consistency(old_size, new_size, old_root, new_root, [base64.b64decode(step) for step in steps])


def collector_text(collector: Collector, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", collector.port)
    connection.request("GET", path, headers=bearer(collector._token))
    text = connection.getresponse().read().decode()
    connection.close()
    return text


ROUTES = {
    ("GET", "/v1/events"): "read",
    ("GET", "/v1/events/nothing"): "read",
    ("GET", "/v1/events/nothing/proof"): "read",
    ("GET", "/v1/counts?by=user"): "read",
    ("GET", "/v1/agents"): "read",
    ("GET", "/v1/media"): "read",
    ("GET", "/v1/media/usb:x"): "read",
    ("GET", "/v1/log/checkpoint"): "read",
    ("GET", "/v1/log/consistency"): "read",
    ("GET", "/v1/log/keys"): "open",
    ("GET", "/v1/events/stream?max_behind=0"): "read",
    ("GET", "/v1/export"): "export",
    ("POST", "/v1/log/witness"): "export",
    ("POST", "/v1/retention?before=2020-01-01"): "erase",
    ("POST", "/add-checkpoint"): "open",
    ("PUT", "/v1/media/usb:x"): "register",
    ("DELETE", "/v1/media/usb:x"): "register",
    ("POST", "/v1/media"): "request",
    ("GET", "/v1/groups"): "read",
    ("PUT", "/v1/groups/none"): "bulk",
    ("DELETE", "/v1/groups/none"): "bulk",
    ("GET", "/v1/tokens"): "tokens",
    ("POST", "/v1/tokens"): "tokens",
    ("DELETE", "/v1/tokens/nothing"): "tokens",
    ("GET", "/healthz"): "open",
    ("GET", "/readyz"): "open",
    ("GET", "/metrics"): "open",
    ("GET", "/"): "open",
}


def test_no_route_is_missing_in_the_table_of_roles() -> None:
    """Agents' own routes are not for tokens: signatures open them (test_collector_hostile)."""
    signed = {("POST", "/v1/enroll"), ("POST", "/v1/batches"), ("GET", "/v1/register")}
    routes = {(method, path) for method, path, _ in app.table(cast(Any, None), local=False)} - signed
    asked = {(method, path.partition("?")[0]) for method, path in ROUTES}
    patterns = {route: re.compile(re.sub(r"\{[^}]*\}", "[^/]+", route[1])) for route in routes}
    assert not [route for route in routes if not any(m == route[0] and patterns[route].fullmatch(p) for m, p in asked)]


def test_each_role_may_do_its_own_and_nothing_else(collector: Collector) -> None:
    tokens = {
        role: collector.run("token", "create", "--role", role).strip() for role in ("viewer", "reviewer", "admin", "auditor")
    }
    tokens["enrolment token"] = collector.run("token", "create", "--enroll").strip()
    tokens["unknown"] = "x" * 43
    tokens["nobody"] = ""
    wrong = []
    for (method, path), right in ROUTES.items():
        for who, token in tokens.items():
            connection = http.client.HTTPConnection("127.0.0.1", collector.port, timeout=20)
            connection.request(method, path, b"{}" if method in ("PUT", "POST") else None, bearer(token) if token else {})
            answer = connection.getresponse()
            status, body = answer.status, answer.read()
            connection.close()
            known = who in ("viewer", "reviewer", "admin", "auditor")
            may = right == "open" or (right == "read" and known) or who == "admin" or (right, who) == ("export", "auditor")
            may = may or (right, who) in (("register", "reviewer"), ("request", "reviewer"), ("request", "viewer"))
            expected = "let in" if may else 403 if known else 401
            got: Any = status if status in (401, 403) else "let in"
            if got != expected or status >= 500:
                wrong.append((method, path, who, status))
            if status >= 400:
                assert answer.headers["content-type"] == "application/problem+json"
                assert json.loads(body)["status"] == status and json.loads(body)["detail"]
    assert not wrong


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("POST", "/v1/events", 405), ("PUT", "/", 405)]
)
def test_what_is_not_there_is_a_problem_too(collector: Collector, method: str, path: str, status: int) -> None:
    client = Client(collector.port)
    got, problem = client.ask(method, path)
    assert (got, problem["status"], client.content_type) == (status, status, "application/problem+json")


def test_enrolment_tokens_are_used_up_but_not_by_a_repeat(collector: Collector) -> None:
    token = collector.run("token", "create", "--enroll").strip()
    first, second = Client(collector.port, "a"), Client(collector.port, "b")
    status, answer = first.enrol(token)
    assert (status, answer["agent"]) == (200, first.id)
    assert json.loads(answer["register"]["body"])["approvals"] == []
    assert first.enrol(token)[0] == 200, "its answer may have been lost on the way"
    assert second.enrol(token)[0] == 401
    assert second.enrol("wrong")[0] == 401
    assert second.enrol("")[0] == 401
    assert {row["name"] for row in collector.get("/v1/agents")["agents"]} == {"a"}


def test_the_register_comes_at_once_when_it_changes(collector: Collector, agent: Client) -> None:
    status, signed = agent.ask("GET", "/v1/register", headers=agent.signed("/v1/register"))
    assert status == 200
    public = collector_key(collector, agent)
    chain.check(b"sekisho/register/v1\n" + signed["body"].encode(), signed["sig"], public)
    version = json.loads(signed["body"])["version"]
    target = f"/v1/register?after={version}"
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(agent.ask("GET", target, headers=agent.signed(target))))
    waiting.start()
    collector.run(
        "media", "approve", "usb:1:2:3", "--owner", "sato", "--approver", "mori", "--purpose", "x", "--until", "2099-01-01"
    )
    waiting.join(10)
    assert got and got[0][0] == 200
    body = json.loads(got[0][1]["body"])
    assert body["version"] > version
    assert [(entry["key"], entry["owner"]) for entry in body["approvals"]] == [("usb:1:2:3", "sato")]
    assert agent.ask("GET", target, headers=agent.signed("/v1/register"))[0] == 401, "another target was signed"
    old = agent.signed(target, int(time.time() * 1000) - 3_600_000)
    status, problem = agent.ask("GET", target, headers=old)
    assert status == 401 and "clock" in problem["detail"]


def test_many_agents_may_wait_for_the_register_at_once(collector: Collector, agent: Client) -> None:
    """Far more than a process may have descriptors by default (1024), each held until the register changes."""
    many = 1500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < many + 200:
        pytest.skip(f"needs RLIMIT_NOFILE of {many + 200}, this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    version = json.loads(agent.ask("GET", "/v1/register", headers=agent.signed("/v1/register"))[1]["body"])["version"]
    target = f"/v1/register?after={version}"
    held = []
    try:
        for _ in range(many):
            held.append(sock := socket.create_connection(("127.0.0.1", collector.port), timeout=60))
            lines = [f"GET {target} HTTP/1.1", "Host: x", *(f"{name}: {text}" for name, text in agent.signed(target).items())]
            sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        agent.append_some(1)
        assert agent.send()[0] == 200, "batches go through meanwhile"
        approval = ("--owner", "sato", "--approver", "mori", "--purpose", "x", "--until", "never")
        collector.run("media", "approve", "usb:1", *approval)
        answered = [sock.recv(1 << 16) for sock in held]
    finally:
        for sock in held:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(text.startswith(b"HTTP/1.1 200") for text in answered)


class Reader:
    """A live reader: collects frames in a thread until closed."""

    def __init__(self, collector: Collector, query: str = "", last_id: str = "") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", collector.port, timeout=30)
        headers = bearer(collector._token) | ({"Last-Event-ID": last_id} if last_id else {})
        self.connection.request("GET", f"/v1/events/stream{query}", headers=headers)
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.frames: list[tuple[str, bytes, str]] = []
        self.began = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()
        assert self.began.wait(10)

    def _read(self) -> None:
        def lines() -> Iterator[bytes]:
            try:
                while line := self.answer.readline():
                    yield line.rstrip(b"\r\n")
            except (OSError, ValueError, AttributeError):
                return

        for frame in sse(lines()):
            self.frames.append(frame)
            self.began.set()

    def events(self) -> list[Any]:
        return [json.loads(data) for kind, data, _ in list(self.frames) if kind == "message"]

    def sequences(self) -> list[int]:
        """Of machines' events: what the collector notes about its readers is none of them."""
        return [event["metadata"]["sequence"] for event in self.events() if event["class_uid"] not in (6003, 6008)]

    def gaps(self) -> list[Any]:
        return [json.loads(data) for kind, data, _ in list(self.frames) if kind == "gap"]

    def close(self) -> None:
        sock = self.connection.sock or self.answer.fp.raw._sock  # type: ignore[union-attr]
        sock.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.answer.close()
        self.connection.close()


def test_readers_see_everything_in_order_while_many_write(collector: Collector) -> None:
    readers = [Reader(collector, "?event=file.*"), Reader(collector, "?event=file.*")]
    agents = [Client(collector.port, f"ws-{n}") for n in range(4)]
    for each in agents:
        each.enrol()
        each.append_some(100)

    def write(agent: Client) -> None:
        for first in range(1, 100, 10):
            assert agent.send(first, first + 9)[0] == 200

    threads = [threading.Thread(target=write, args=(each,)) for each in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reader in readers:
        until(lambda r=reader: len(r.events()) == 400, lambda r=reader: f"only {len(r.events())} came")
    orders = [[event["metadata"]["uid"] for event in reader.events()] for reader in readers]
    assert orders[0] == orders[1] == [event["metadata"]["uid"] for event in collector.events(event="file.*")]
    for each in agents:
        own = [event["metadata"]["sequence"] for event in readers[0].events() if event["device"]["uid"] == each.id]
        assert own == list(range(1, 101))
    for reader in readers:
        reader.close()


def test_a_reader_that_comes_back_misses_nothing_and_sees_nothing_twice(collector: Collector, agent: Client) -> None:
    agent.append_some(9)
    agent.send(1, 3)
    reader = Reader(collector, "?last=2")
    until(lambda: reader.sequences() == [2, 3], lambda: f"{reader.frames}")
    cursor = reader.frames[-1][2]
    reader.close()
    agent.send(4, 6)
    again = Reader(collector, "?last=2", cursor)
    until(lambda: again.sequences() == [4, 5, 6], lambda: f"{again.frames}")
    agent.send(7, 9)
    until(lambda: again.sequences() == [4, 5, 6, 7, 8, 9], lambda: f"{again.frames}")
    again.close()


def test_no_gap_is_silent(collector: Collector, agent: Client) -> None:
    agent.append_some(6)
    reader = Reader(collector)
    lines = [*agent.lines]
    for n in (2, 3):
        lines[n] = wire.folded_line(n + 1, chain.digest(lines[n]))
    assert agent.post(wire.batch_body(agent.head(1, 6), lines), Content_Encoding="identity")[0] == 200
    until(lambda: reader.sequences() == [1, 2, 5, 6], lambda: f"{reader.frames}")
    assert reader.gaps() == [{"reason": "folded", "count": 2, "agent": agent.id}]
    reader.close()
    assert len(collector.events()) == 4, "what was folded is in the chain, but is no event to show"
    behind = Reader(collector, "?max_behind=3", "1")
    until(lambda: behind.gaps(), lambda: f"{behind.frames}")
    assert behind.gaps()[0]["reason"] == "behind" and behind.gaps()[0]["count"] >= 5
    behind.close()
    beyond = Reader(collector, "", "999999")
    until(lambda: beyond.gaps(), lambda: f"{beyond.frames}")
    assert "restored" in beyond.gaps()[0]["reason"]
    beyond.close()


def test_a_reader_of_rare_things_hears_that_the_line_is_alive() -> None:
    """Time is handed in: a minute of a busy log with nothing for this reader."""

    class Loop(asyncio.SelectorEventLoop):
        ahead_s = 0.0

        def time(self) -> float:
            return super().time() + self.ahead_s

    async def follow(loop: Loop) -> list[bytes]:
        size, bell, got = 1, tail.Bell(), []

        async def read(_sql: str, _values: list[Any]) -> list[tuple[Any, ...]]:
            nonlocal size
            size += 1
            loop.ahead_s += 1
            return []

        frames = tail.follow(
            query.Filter(user="nobody"), read=read, size=lambda: size, bell=bell, stopping=lambda: size > 61, cursor=0
        )
        async for frame in frames:
            got.append(frame)
        return got

    loop = Loop()
    try:
        frames = loop.run_until_complete(follow(loop))
    finally:
        loop.close()
    assert 4 <= len(frames) <= 6
    assert set(frames) == {tail.cursor_frame(int(frame.split()[-1])) for frame in frames}


def test_the_stream_takes_the_same_filters(collector: Collector, agent: Client) -> None:
    reader = Reader(collector, "?user=ito&event=file.*")
    for user in ("sato", "ito", "sato", "ito"):
        agent.append(draft(agent=agent.id, **copied("a.csv", user=user)))
    agent.append(draft("agent.started", agent=agent.id))
    agent.send()
    until(lambda: reader.sequences() == [2, 4], lambda: f"{reader.frames}")
    reader.close()


def test_pages_follow_each_other_to_the_end(collector: Collector, agent: Client) -> None:
    agent.append_some(25)
    agent.send()
    for order, expected in (("asc", list(range(1, 26))), ("desc", list(range(25, 0, -1)))):
        seen, after = [], ""
        while True:
            page = collector.get(f"/v1/events?event=file.*&limit=10&order={order}&after={after}")
            seen += [event["metadata"]["sequence"] for event in page["events"]]
            after = page["next"]
            if after is None:
                break
        assert seen == expected
    connection = http.client.HTTPConnection("127.0.0.1", collector.port)
    connection.request("GET", "/v1/events?event=file.*", headers=bearer(collector._token) | {"Accept": "application/x-ndjson"})
    answer = connection.getresponse()
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.read().splitlines() == agent.lines
    connection.close()


def test_a_silent_machine_is_an_event_and_so_is_its_return(tmp_path: Path, store_kind: str) -> None:
    house = Collector(tmp_path)
    house.config_file.write_text(house.config_file.read_text().replace('"5s"', '"400ms"'))
    house.start()
    try:
        agent = Client(house.port, "ws-7")
        agent.enrol()
        agent.send(1, 0)
        until(lambda: house.events(event="agent.silent"), "its silence is not told")
        assert house.get("/v1/agents")["agents"][0]["state"] == "silent"
        agent.append_some(1)
        agent.send()
        until(lambda: house.events(event="agent.back"), "its return is not told")
        told = house.events(event="agent.*", agent="ws-7")
        assert [event["metadata"]["event_code"] for event in told][:2] == ["agent.silent", "agent.back"]
        assert told[0]["device"]["hostname"] == "ws-7"
        assert told[0]["severity_id"] == 4
        until(lambda: len(house.events(event="agent.silent")) >= 2, "a second silence is told anew")
    finally:
        house.stop()


def test_a_machine_is_blind_as_long_as_one_of_its_sensors_is(collector: Collector, agent: Client) -> None:
    def tell(code: str, **detail: Any) -> dict[str, Any]:
        agent.append(draft(code, agent=agent.id, detail=detail))
        assert agent.send(len(agent.lines))[0] == 200
        row: dict[str, Any] = collector.get("/v1/agents")["agents"][0]
        return row

    tell("agent.started")
    assert tell("agent.sensors", sensor="fanotify", ok=False, blind=["exfat"])["state"] == "blind"
    row = tell("agent.sensors", sensor="udev", ok=True, blind=[])
    assert (row["state"], row["blind"], row["version"]) == ("blind", ["exfat"], "0.1.0")
    assert tell("agent.sensors", sensor="fanotify", ok=True, blind=[])["state"] == "ok"
    row = tell("agent.sensors", sensor="mounts", ok=True, blind=["other_namespaces_until_used"])
    assert (row["state"], row["blind"], row["known_limits"]) == ("ok", [], ["other_namespaces_until_used"])
    row = tell("agent.sensors", sensor="inotify", ok=False, blind=["process", "login_user"])
    assert (row["state"], row["blind"]) == ("blind", ["login_user", "process"])
    assert tell("agent.heartbeat", waiting=3)["waiting"] == 3
    tell("agent.sensors", sensor="mtp", ok=False, blind=["mtp"])
    assert tell("agent.started")["state"] == "ok", "what the last run could not see says nothing of this one"


def test_the_collectors_own_events_are_ocsf_and_a_whole_chain(tmp_path: Path, store_kind: str) -> None:
    house = Collector(tmp_path)
    house.config_file.write_text(house.config_file.read_text().replace('"5s"', '"300ms"'))
    house.start()
    try:
        agent = Client(house.port, "ws-7")
        own = chain.agent_id(collector_key(house, agent))
        until(lambda: house.events(event="agent.silent"), "its silence is not told")
        agent.send(1, 0)
        until(lambda: house.events(event="agent.back"), "its return is not told")
        house.run("media", "approve", "usb:1", "--owner", "sato", "--approver", "mori", "--purpose", "x", "--until", "never")
        house.run("media", "revoke", "usb:1", "--reason", "lost")
        house.events()
        lines = raw_events(house, own)
    finally:
        house.stop()
    events = [json.loads(line) for line in lines]
    schemas = OcsfJsonSchemaEmbedded(get_ocsf_schema(version="1.8.0"))
    codes = set()
    for event in events:
        codes.add(event["metadata"]["event_code"])
        name = schemas.lookup_class_name_from_uid(event["class_uid"])
        schema = schemas.get_class_schema(name, event["metadata"]["profiles"])
        errors = [error.message for error in Draft202012Validator(schema).iter_errors(event)]
        assert not errors, (event, errors)
    assert codes == {"agent.silent", "agent.back", "register.changed", "record.viewed"}
    epoch = events[0]["unmapped"]["sekisho"]["epoch"]
    head = chain.genesis(own, epoch)
    for number, line in enumerate(lines, 1):
        ours = json.loads(line)["unmapped"]["sekisho"]
        assert (ours["seq"], ours["prev"]) == (number, head.hex())
        head = chain.link(head, chain.digest(line))


def raw_events(collector: Collector, agent: str) -> list[bytes]:
    with collector.store() as store:
        rows = store.execute("SELECT raw FROM readable WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
    return [raw.encode() if isinstance(raw, str) else raw for (raw,) in rows]


def test_health_and_metrics_say_what_is(collector: Collector, agent: Client) -> None:
    agent.append_some(7)
    agent.send()
    agent.send()
    text = collector_text(collector, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["sekisho_events_accepted_total"] == "7"
    assert values['sekisho_batches_total{result="accept"}'] == "1.0"
    assert values['sekisho_batches_total{result="repeat"}'] == "1.0"
    assert values["sekisho_agents"] == "1"
    assert values["sekisho_log_size"] == "7"
    assert int(values["sekisho_store_bytes"]) > 1000
    assert "house-token" not in text and agent.name not in text
    status, _ = agent.ask("GET", "/healthz")
    assert status == 200
