"""Hostile input gets the contract's error, and harms nobody else: another agent's batch goes through meanwhile."""

import gzip
import http.client
import json
import socket
import time
from collections.abc import Iterator

import pytest

from agent.contract import chain, wire
from tests.collector_client import Client, copied, draft
from tests.house import Collector, until


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory, store_kind: str) -> Iterator[Collector]:
    made = Collector(tmp_path_factory.mktemp("house"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def agent(collector: Collector) -> Client:
    made = Client(collector.port, "hostile")
    assert made.enrol()[0] == 200
    return made


@pytest.fixture(autouse=True)
def others_are_unharmed(collector: Collector) -> Iterator[None]:
    other = Client(collector.port, "other")
    other.enrol()
    other.append_some(2)
    assert other.send(1, 1)[0] == 200
    yield
    began = time.monotonic()
    assert other.send(2, 2)[0] == 200
    assert time.monotonic() - began < 5
    assert other.ask("GET", "/readyz")[0] == 200


def signed_body(agent: Client, lines: list[bytes]) -> bytes:
    """A truly signed batch of whatever `lines` are: what a subverted agent could send."""
    link = chain.genesis(agent.id, 1)
    for line in lines:
        link = chain.link(link, chain.digest(line))
    head = wire.Head(agent.id, 1, 1, len(lines), chain.genesis(agent.id, 1).hex(), link.hex(), 0)
    head.sig = chain.sign(chain.head_bytes(head), agent.key)
    return gzip.compress(wire.batch_body(head, lines), 1, mtime=0)


def raw(agent: Client, **replaced: str) -> bytes:
    """A good first event, with parts of its text replaced."""
    made = Client(agent.port, key=agent.key)
    line = made.append(draft(agent=agent.id, **copied("a.csv"))).decode()
    for old, new in replaced.items():
        line = line.replace(old, new)
    return line.encode("utf-8", "surrogatepass")


def test_a_body_of_a_gigabyte_is_refused_by_its_announcement(collector: Collector, agent: Client) -> None:
    with socket.create_connection(("127.0.0.1", collector.port), timeout=10) as sock:
        head = f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nSekisho-Agent: {agent.id}\r\nContent-Length: {1 << 30}\r\n\r\n"
        sock.sendall(head.encode())
        assert b" 413 " in sock.makefile("rb").readline()


def test_a_body_without_announcement_is_cut_off_at_the_limit(collector: Collector, agent: Client) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", collector.port), timeout=10) as sock:
        head = f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nSekisho-Agent: {agent.id}\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        try:
            for _ in range(1 << 14):
                sock.sendall(chunk)
                sent += 0x10000
        except OSError:
            pass
    assert wire.MAX_BODY_BYTES <= sent < 64 << 20


def test_a_gzip_bomb_is_refused_without_unpacking_it(agent: Client) -> None:
    bomb = gzip.compress(wire.batch_body(agent.head(1, 0), []) + b"\0" * (1 << 30), 9)
    assert len(bomb) < wire.MAX_BODY_BYTES
    began = time.monotonic()
    assert agent.post(bomb)[0] == 413
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("where", ["line", "detail", "unknown", "head"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_million_brackets(agent: Client, where: str, closed: bool) -> None:
    deep = b"[" * 1_000_000 + (b"]" * 1_000_000 if closed else b"")
    if where == "head":
        body = gzip.compress(b'{"agent":' + deep + b"}\n")
        assert agent.post(body)[0] == 422
        return
    good = raw(agent)
    shallow = b"[" * 30_000 + b"]" * 30_000
    spoiled = {
        "line": deep,
        "detail": good.replace(b'"seq":1', b'"detail":{"a":' + shallow + b'},"seq":1'),
        "unknown": good.replace(b'"seq":1', b'"a":' + shallow + b',"seq":1'),
    }[where]
    status, problem = agent.post(signed_body(agent, [spoiled]))
    assert status in (413, 422)
    assert problem["status"] == status and problem["detail"]


@pytest.mark.parametrize(
    "spoiled",
    [
        b"\xff\xfe not utf-8",
        b"null",
        b"{}",
        b"",
        b'{"class_uid":1e999}',
        b'{"seq":1,"digest":"00"}',
        b'{"seq":1,"digest":5}',
    ],
)
def test_lines_that_are_no_events(agent: Client, spoiled: bytes) -> None:
    assert agent.post(signed_body(agent, [spoiled]))[0] == 422


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("customers", "\udcff"),
        ("sato", "\\ud800"),
        ('"time":', '"time":-'),
        ('"severity_id":2', '"severity_id":1000000000000000000000'),
        ('"event_code":"file.copied_out"', '"event_code":""'),
    ],
)
def test_values_that_no_store_should_hold(agent: Client, old: str, new: str) -> None:
    assert agent.post(signed_body(agent, [raw(agent, **{old: new})]))[0] == 422


def test_odd_but_honest_values_are_kept(collector: Collector, agent: Client) -> None:
    names = ["a\0b", "x\u202egpj.exe", "' OR 1=1 --", "\U0001f600", "line\nbreak", "\x1b[2J"]
    for name in names:
        agent.append(draft(agent=agent.id, name="odd", **copied(name)))
    assert agent.send()[0] == 200
    kept = [event["unmapped"]["sekisho"]["protected"]["rel"] for event in collector.events(agent=agent.id, event="file.*")]
    assert kept == names


def test_a_clock_of_1970_is_accepted_and_does_not_hide_the_event(collector: Collector, agent: Client) -> None:
    agent.append(draft(agent=agent.id, at=0, **copied("old.csv")))
    agent.append(draft(agent=agent.id, at=(1 << 53), **copied("future.csv")))
    assert agent.send()[0] == 200
    assert len(collector.events(agent=agent.id, event="file.*")) == 2
    assert "1970-01-01" in collector.run("tail", "-n", "10", "--agent", agent.id, "--event", "file.*")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sekisho_Agent": ""}, 401),
        ({"Sekisho_Agent": "0" * 32}, 401),
        ({"Content_Encoding": "br"}, 415),
        ({"Content_Encoding": "identity"}, 422),
    ],
)
def test_headers_that_do_not_fit(agent: Client, headers: dict[str, str], status: int) -> None:
    agent.append_some(1)
    assert agent.post(agent.batch(), **headers)[0] == status


def test_another_agents_name_or_signature_opens_nothing(collector: Collector, agent: Client) -> None:
    victim = Client(collector.port, "victim")
    victim.enrol()
    victim.append_some(2)
    assert agent.post(victim.batch())[0] == 401, "the head is not of the agent in the header"
    assert agent.post(victim.batch(), Sekisho_Agent=victim.id)[0] == 200, "whoever carries it, the signature counts"
    thief = Client(collector.port, key=agent.key)
    thief.id = victim.id
    thief.append_some(3)
    assert thief.post(thief.batch())[0] == 401


@pytest.mark.parametrize(
    "code", ["agent.silent", "agent.back", "review.decided", "register.changed", "record.viewed", "x.y", "copy."]
)
def test_no_agent_speaks_as_the_collector_or_in_words_nobody_knows(agent: Client, code: str) -> None:
    line = raw(agent, **{'"event_code":"file.copied_out"': f'"event_code":"{code}"'})
    status, problem = agent.post(signed_body(agent, [line]))
    assert status == 422
    assert "event 1 " in problem["detail"]


@pytest.mark.parametrize("uid", ["", '"uid":"another",'])
def test_no_agent_speaks_of_another_machine(agent: Client, uid: str) -> None:
    line = raw(agent).decode()
    assert f'"uid": "{agent.id}", ' in line
    status, problem = agent.post(signed_body(agent, [line.replace(f'"uid": "{agent.id}", ', uid).encode()]))
    assert status == 422
    assert "event 1 " in problem["detail"] and "device.uid" in problem["detail"]


def test_a_limit_may_have_any_name(agent: Client) -> None:
    line = raw(agent, **{'"event_code":"file.copied_out"': '"event_code":"copy.顧客 at night"'})
    assert agent.post(signed_body(agent, [line]))[0] == 200


def test_a_machine_that_calls_itself_another_is_found_under_its_own_name(collector: Collector) -> None:
    agent = Client(collector.port, "ws-042")
    agent.enrol()
    agent.append(draft("file.written", agent=agent.id, name="ws-boss"))
    assert agent.send()[0] == 200
    assert collector.events(agent="ws-042") and not collector.events(agent="ws-boss")
    for form in ("short", "csv", "table"):
        told = collector.run("query", "--agent", agent.id, "-o", form)
        assert "ws-042" in told and "ws-boss" not in told


def test_a_machine_made_anew_enrols_under_its_old_name(collector: Collector) -> None:
    before, after = Client(collector.port, "ws-reborn"), Client(collector.port, "ws-reborn")
    assert before.enrol()[0] == after.enrol()[0] == 200
    rows = [row for row in collector.get("/v1/agents")["agents"] if row["name"] == "ws-reborn"]
    assert sorted(row["agent"] for row in rows) == sorted([before.id, after.id])


def test_cut_and_mixed_bodies(agent: Client) -> None:
    agent.append_some(3)
    whole = agent.batch()
    assert agent.post(whole[: len(whole) // 2])[0] == 422
    assert agent.post(whole + whole)[0] == 422
    assert agent.post(b"")[0] == 422
    assert agent.post(gzip.compress(b""))[0] == 422
    many = agent.post(gzip.compress(wire.batch_body(agent.head(1, 3), agent.lines + agent.lines)))
    assert many[0] == 422


def test_an_event_or_batch_above_the_limits(agent: Client) -> None:
    agent.append(draft(agent=agent.id, **copied("x" * (wire.MAX_EVENT_BYTES + 1))))
    assert agent.send()[0] == 413
    fresh = Client(agent.port, key=agent.key, epoch=2)
    fresh.append_some(wire.MAX_EVENTS + 1, "agent.heartbeat", attribution="exact")
    assert fresh.send()[0] == 413
    assert fresh.send(1, wire.MAX_EVENTS)[0] == 200


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token":"house-token","name":"x","key":"AAAA"}', b"[" * 50_000, b"\xff", b'{"token":1}']
)
def test_enrolments_that_are_none(agent: Client, body: bytes) -> None:
    assert agent.ask("POST", "/v1/enroll", body)[0] == 422


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=99999999",
        "limit=x",
        "after=x",
        "after=-1",
        "order=up",
        "severity=huge",
        "since=soon",
        "q=%00",
        "until=" + "9" * 30,
        "event=,",
        "event=%20,%20",
    ],
)
def test_questions_that_make_no_sense(collector: Collector, agent: Client, query: str) -> None:
    status, problem = agent.ask("GET", f"/v1/events?{query}", headers={"Authorization": f"Bearer {collector._token}"})
    assert status == 400
    assert problem["detail"]


def test_one_agent_cannot_take_all_the_places(collector: Collector, agent: Client) -> None:
    held = []
    try:
        for _ in range(4):
            sock = socket.create_connection(("127.0.0.1", collector.port), timeout=10)
            head = f"POST /v1/batches HTTP/1.1\r\nHost: x\r\nSekisho-Agent: {agent.id}\r\nContent-Length: 1000\r\n\r\nx"
            sock.sendall(head.encode())
            held.append(sock)
        agent.append_some(1)
        until(lambda: agent.send()[0] == 429, "a fifth batch at once is let in")
    finally:
        for sock in held:
            sock.close()
    until(lambda: agent.send()[0] == 200, "its places are not given back")


def test_a_head_that_drips_does_not_hold_a_connection_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    import uvicorn

    from server_stub import serve

    monkeypatch.setattr(serve, "HEAD_TIMEOUT_S", 0.3)

    async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def story() -> None:
        config = uvicorn.Config(app, http=serve.Protocol, ws="none", lifespan="off", log_config=None)
        server = serve.Server(config)
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        running = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.005)
        for said in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            async with asyncio.timeout(5):
                await reader.read()  # to its end: the server closed
            writer.close()
            await writer.wait_closed()
        server.should_exit = True
        await running

    asyncio.run(story())


def test_no_plain_http_where_others_can_reach(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import subprocess
    import sys

    config = tmp_path / "c.toml"
    config.write_text(f'[collector]\nlisten = "0.0.0.0:0"\nstate_dir = "{tmp_path}/s"\n')
    done = subprocess.run([sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tls_cert" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_problems_have_one_shape(collector: Collector, agent: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", collector.port)
    for method, path in (
        ("GET", "/v1/events"),
        ("GET", "/nowhere"),
        ("PATCH", "/v1/events"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/enroll"),
    ):
        connection.request(method, path, b"")
        answer = connection.getresponse()
        body = json.loads(answer.read())
        assert answer.headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail"} <= set(body)
        assert body["status"] == answer.status
    connection.close()
