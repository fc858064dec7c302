"""Keeping evidence: bundles by network, witnesses, changed keys, erased content, looks on record, backups that restore."""

import base64
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiosmtpd.controller import Controller

from agent.contract import chain
from agent.pytest_plugin import _environment
from server_stub import looks, tree, verify, witness
from tests import second_verifier
from tests.collector_client import Client
from tests.house import Collector, until


@pytest.fixture
def house(tmp_path: Path, store_kind: str) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    made.stop()


def sent(house: Collector, count: int = 6, name: str = "ws-1", agent: Client | None = None) -> Client:
    agent = agent or Client(house.port, name)
    if not agent.lines:
        assert agent.enrol()[0] == 200
    agent.append_some(count)
    assert agent.send(len(agent.lines) - count + 1)[0] == 200
    return agent


def call(*args: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "server_stub.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment() | {"LANG": "C.UTF-8"}, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def configured(house: Collector, text: str) -> None:
    house.stop()
    with house.config_file.open("a") as file:
        file.write(text)
    house.start()


def test_a_bundle_over_the_network_needs_the_right_role_and_is_the_same(house: Collector, tmp_path: Path) -> None:
    agent = sent(house)
    size = agent.send(7, 6)[1]["tree_size"]
    local = tmp_path / "local.zip"
    house.run("export", "-o", str(local), "--size", str(size))
    assert oct(local.stat().st_mode & 0o777) == "0o600"
    for role, code in (("auditor", 0), ("viewer", 1)):
        token = house.run("token", "create", "--role", role).strip()
        far = tmp_path / f"{role}.zip"
        done = call("export", "-o", str(far), "--size", str(size), "--url", house.url, "--token", token)
        assert done[0] == code and far.exists() == (code == 0), done
    assert (tmp_path / "auditor.zip").read_bytes() == local.read_bytes(), "the same log, size and filter: the same bytes"
    with zipfile.ZipFile(local) as file:
        assert file.read("events.ndjson").splitlines() == agent.lines
    house.stop()
    house.run("export", "-o", str(tmp_path / "unserved.zip"), "--size", str(size))
    assert (tmp_path / "unserved.zip").read_bytes() == local.read_bytes()
    house.start()


def test_what_is_no_bundle_or_key_is_said_in_a_sentence(house: Collector, tmp_path: Path) -> None:
    sent(house)
    path, junk = tmp_path / "b.zip", tmp_path / "junk"
    house.run("export", "-o", str(path))
    junk.write_text("hello")
    for args in (
        (str(junk),),
        (str(tmp_path / "none"),),
        (str(path), "--key", str(junk)),
        (str(path), "--checkpoint", str(junk)),
    ):
        code, out, err = call("verify", *args)
        assert (code, out) == (2, "") and err.startswith("sekisho-collector: ") and err.count("\n") == 1
    path.write_bytes(path.read_bytes()[:-200])
    code, out, _ = call("verify", str(path), "--lang", "ja")
    assert code == 1 and out.startswith("不正: 破損")
    told = house.run("key", "show").strip()
    raw = verify.read_keys(str(_written(tmp_path / "k1", told)))
    pem = base64.b64encode(bytes.fromhex("302a300506032b6570032100") + raw[0]).decode()
    forms = [raw[0].hex(), base64.b64encode(raw[0]).decode(), f"-----BEGIN PUBLIC KEY-----\n{pem}\n-----END PUBLIC KEY-----"]
    assert all(verify.read_keys(str(_written(tmp_path / "k2", form))) == raw for form in forms)


def _written(path: Path, text: str) -> Path:
    path.write_text(text + "\n")
    return path


def test_checking_a_bundle_loads_nothing_of_the_collector() -> None:
    heavy = ("starlette", "uvicorn", "sqlite3", "requests", "asyncio")
    code = f"import sys, server_stub.judged; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# -- witnesses ---------------------------------------------------------------------------------------------------------


def test_another_collector_cosigns_what_it_has_seen_grow_and_nothing_else(house: Collector, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Collector(tmp_path / "other")
    with other.config_file.open("a") as file:
        file.write(f'[[collector.cosign]]\nkey = "{house.run("key", "show").strip()}"\n')
    other.start()
    try:
        theirs = json.loads(other.run("key", "show", "-o", "json"))["witness"]
        configured(house, f'witness_every = "1h"\n[[collector.witness]]\nurl = "{other.url}"\nkey = "{theirs}"\n')
        agent = sent(house)
        house.run("witness", "send")
        agent = sent(house, 5, agent=agent)
        assert "has the checkpoint" in house.run("witness", "send")
        note = house.run("witness", "show", "--cosigned")
        name, key = witness.read_vkey(theirs)
        assert witness.check_cosignature(note, note.splitlines()[-1], name, key) > 1_700_000_000
        _rewritten(house)
        sent(house, 2, agent=agent)
        code, _, err = call("witness", "send", "-c", str(house.config_file))
        assert code == 1 and "rewritten" in err
        connection = http.client.HTTPConnection("127.0.0.1", other.port)
        for body, status in ((b"junk", 400), (b"old 0\n\nsekisho/stranger\n1\nAAAA\n\n", 404), (_unsigned(house), 403)):
            connection.request("POST", "/add-checkpoint", body)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
    finally:
        other.stop()


def _rewritten(house: Collector) -> None:
    house.stop()
    with house.store() as store:
        (raw,) = store.execute("SELECT raw FROM events WHERE pos = 2").fetchone()
        store.execute("UPDATE events SET raw = ? WHERE pos = 2", (raw.replace(b"sato", b"mori"),))
    house.start()


def _unsigned(house: Collector) -> bytes:
    note = house.run("witness", "show")
    return b"old 0\n\n" + note.replace("\n—", "\n— x", 1).encode()


def test_a_file_on_write_once_storage_is_only_appended_to(house: Collector, tmp_path: Path) -> None:
    worm = tmp_path / "worm.txt"
    configured(house, f'witness_every = "1h"\n[[collector.witness]]\nfile = "{worm}"\n')
    agent = sent(house)
    house.run("witness", "send")
    before = worm.read_bytes()
    sent(house, 4, agent=agent)
    house.run("witness", "send")
    assert worm.read_bytes().startswith(before) and len(verify.read_notes(str(worm))) >= 2
    path = tmp_path / "b.zip"
    house.run("export", "-o", str(path))
    assert call("verify", str(path), "--checkpoint", str(worm))[0] == 0
    part = tmp_path / "part.zip"
    house.run("export", "-o", str(part), "--user", "sato", "--until", "2001-01-01")
    code, _, err = call("verify", str(part), "--checkpoint", str(worm))
    assert code == 2 and "unfiltered" in err


class Mailbox:
    def __init__(self) -> None:
        self.got: list[Any] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        self.got.append((envelope.rcpt_tos, message_from_bytes(envelope.content)))
        return "250 OK"


def test_a_mail_carries_a_checkpoint_that_verify_takes_as_it_is(house: Collector, tmp_path: Path) -> None:
    box = Mailbox()
    server = Controller(box, hostname="127.0.0.1", port=0)
    server.port = _free()
    server.start()
    try:
        sent(house)
        configured(
            house,
            f'witness_every = "1h"\nsmtp = "smtp://127.0.0.1:{server.port}"\nmail_from = "log@example.org"\n'
            '[[collector.witness]]\nmail = "auditor@example.org"\n',
        )
        until(lambda: box.got, "the mail does not come by itself")
        (to, mail) = box.got[0]
        assert to == ["auditor@example.org"] and "checkpoint" in mail["Subject"]
        text = mail.get_payload(decode=True).decode()
        kept, path = _written(tmp_path / "mail.txt", text), tmp_path / "b.zip"
        house.run("export", "-o", str(path))
        assert call("verify", str(path), "--checkpoint", str(kept))[0] == 0
    finally:
        server.stop()
    sent(house, name="ws-2")
    code, _, err = call("witness", "send", "-c", str(house.config_file))
    assert code == 1 and "did not take" in err


def _free() -> int:
    from tests.house import free_port

    return free_port()


def test_the_printed_block_holds_what_is_needed_to_compare(house: Collector) -> None:
    sent(house)
    note = house.run("witness", "show")
    block = witness.printed(note)
    _, size, root = note.splitlines()[:3]
    assert f"size  {size}" in block and f"root  {root}" in block and max(map(len, block.splitlines())) < 170


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_changed_and_everything_goes_on(house: Collector, tmp_path: Path) -> None:
    agent = sent(house)
    old_key, before = _written(tmp_path / "old", house.run("key", "show")), tmp_path / "before.zip"
    house.run("export", "-o", str(before))
    code, _, err = call("key", "rotate", "-c", str(house.config_file))
    assert code == 2 and "stop it first" in err
    house.stop()
    new_key = _written(tmp_path / "new", house.run("key", "rotate"))
    assert new_key.read_text() != old_key.read_text()
    assert new_key.read_text().split("+")[0] == old_key.read_text().split("+")[0], "the log keeps its name"
    house.start()
    sent(house, 3, agent=agent)
    after = tmp_path / "after.zip"
    house.run("export", "-o", str(after))
    for path, key, whole in ((before, old_key, 0), (after, old_key, 0), (after, new_key, 0), (before, new_key, 1)):
        assert call("verify", str(path), "--key", str(key))[0] == whole
    assert second_verifier.verify(str(after)) == ("whole", None)
    keys = house.get("/v1/log/keys")
    rotations = [wire_rotation(each) for each in keys["rotations"]]
    first = base64.b64decode(keys["keys"][0])
    assert [base64.b64encode(key).decode() for key in chain.successors(first, rotations)] == keys["keys"]
    rotations[0].size += 1
    assert chain.successors(first, rotations) == [first]
    house.stop()
    (house.state_dir / "signing.key").write_bytes((house.state_dir / "signing.key.1").read_bytes())
    code, _, err = call("serve", "-c", str(house.config_file))
    assert code == 1 and "not the one this log is signed with" in err
    house.state_dir.joinpath("signing.key").unlink()
    code, _, err = call("serve", "-c", str(house.config_file))
    assert code == 1 and "restore that key" in err


def wire_rotation(told: dict[str, Any]) -> Any:
    from agent.contract import wire

    return wire.Rotation(**told)


def test_a_change_of_key_that_was_cut_short_is_finished(house: Collector) -> None:
    sent(house)
    house.stop()
    key = house.state_dir / "signing.key"
    old = key.read_bytes()
    house.run("key", "rotate")
    new = key.read_bytes()
    # As if power had gone between the store's commit and the renaming.
    key.with_name("signing.key.next").write_bytes(new)
    key.write_bytes(old)
    house.start()
    assert key.read_bytes() == new and not key.with_name("signing.key.next").exists()
    sent(house, name="ws-2")


# -- retention ---------------------------------------------------------------------------------------------------------


def test_retention_erases_words_and_keeps_proofs(house: Collector, tmp_path: Path) -> None:
    agent = sent(house)
    with_content, without = tmp_path / "with.zip", tmp_path / "without.zip"
    note = _written(tmp_path / "note", house.run("witness", "show"))
    house.run("export", "-o", str(with_content))
    house.stop()
    house.aged(time.time_ns() // 1_000_000 - 401 * 86_400_000)
    house.start()
    sent(house, 2, "ws-2")
    assert "erased the content of" in house.run("retain", "--older-than", "400d")
    told = house.events(event="record.erased")
    assert len(told) == 1 and told[0]["unmapped"]["sekisho"]["detail"]["count"] >= 6
    assert len(house.events(event="file.*")) == 2
    house.stop()
    for path in house.state_dir.glob("collector.db*"):
        data = path.read_bytes()
        assert b"2014-00.csv" not in data or agent.lines[0] not in data
        assert all(line not in data for line in agent.lines), path
    with house.store() as store:
        kept = {bytes(raw) for (raw,) in store.execute("SELECT raw FROM events").fetchall()}
    assert not kept & set(agent.lines)
    house.start()
    house.run("export", "-o", str(without))
    told = json.loads(call("verify", str(without), "-o", "json", "--checkpoint", str(note))[1])
    assert told["whole"] and told["lines"] - told["events"] >= 6
    assert second_verifier.verify(str(without)) == ("whole", None)
    assert call("verify", str(with_content), "--checkpoint", str(note))[0] == 0
    agent.append_some(1)
    assert agent.send(len(agent.lines))[0] == 200, "the chain goes on over what was erased"
    code, _, err = call("retain", "--older-than", "3h", "-c", str(house.config_file))
    assert code == 2 and "1d or more" in err


# -- looks -------------------------------------------------------------------------------------------------------------


def test_every_look_is_on_record_once_for_ten_minutes(house: Collector) -> None:
    agent = sent(house)
    uid = json.loads(agent.lines[0])["metadata"]["uid"]
    for path in (
        "/v1/events?user=sato",
        "/v1/events?user=sato&limit=2",
        "/v1/counts?by=user",
        f"/v1/events/{uid}",
        "/v1/log/checkpoint",
    ):
        house.get(path) if "checkpoint" not in path else None
        house.get(path) if "checkpoint" not in path else None
    house.run("query", "--user", "sato")
    house.run("export", "-o", str(house.root / "b.zip"), "--user", "sato")
    looks_told = [
        (event["api"]["operation"], event["unmapped"]["sekisho"]["detail"]["filter"], event["actor"].get("app_name"))
        for event in house.events(event="record.viewed")
    ]
    token = looks_told[0][2]
    assert looks_told[:3] == [
        ("events.list", {"user": "sato"}, token),
        ("events.count", {}, token),
        ("events.get", {"uid": uid}, token),
    ]
    assert [(operation, "user" in given) for operation, given, _ in looks_told[3:]] == [
        ("events.list", True),
        ("events.export", True),
    ]


def test_repeated_looks_are_counted_when_their_time_is_over(tmp_path: Path) -> None:
    """The window is ten minutes of the collector's clock, which is handed in."""
    from server_stub import acts
    from tests.bundles import Log

    log = Log(tmp_path)
    kept = looks.Looks(log.store)
    by = acts.By("sato", True, "localhost")

    def look(now: int) -> None:
        if not kept.again(by, "events.list", {"user": "ito"}, now):
            kept.opened(log.writer.submit(lambda writer: kept.begin(writer, by, "events.list", {"user": "ito"})).result(10))

    for _ in range(4):
        look(log.now())
    over = log.clock + looks.WINDOW_MS + 1
    log.clock = over
    half = looks.Looks(log.store)
    assert half.open, "an open window outlives a restart"
    due = kept.due(over)
    closed = log.writer.submit(lambda writer: kept.keep(writer, due, over)).result(10)
    assert len(closed) == 1 and looks.Looks(log.store).open == {}
    told = [json.loads(raw)["unmapped"]["sekisho"]["detail"]["count"] for (raw,) in log.store.rows("SELECT raw FROM events")]
    assert told == [1, 3]
    log.close()


# -- backups -----------------------------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_a_backup_made_under_load_restores_to_a_whole_log(house: Collector, tmp_path: Path) -> None:
    agents = [sent(house, name=f"ws-{n}") for n in range(3)]
    stop = threading.Event()

    def load(agent: Client) -> None:
        while not stop.is_set():
            sent(house, 3, agent=agent)

    threads = [threading.Thread(target=load, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    copy = tmp_path / "copy.db"
    house.run("backup", str(copy))
    stop.set()
    for thread in threads:
        thread.join()
    assert oct(copy.stat().st_mode & 0o777) == "0o600"
    code, _, err = call("restore", str(copy), "-c", str(house.config_file))
    assert code == 2 and "stop it first" in err
    house.stop()
    house.run("restore", str(copy))
    assert list(house.state_dir.glob("collector.db.before-restore-*")), "what was there is kept"
    house.start()
    for agent in agents:
        status, problem = agent.send(len(agent.lines) + 1, len(agent.lines))
        if status == 409:
            assert problem["reason"] == "hole"
            for first in range(problem["expected"], len(agent.lines) + 1, 500):
                assert agent.send(first, min(first + 499, len(agent.lines)))[0] == 200
    assert len(house.events(event="file.*")) == sum(len(agent.lines) for agent in agents)
    path = tmp_path / "b.zip"
    house.run("export", "-o", str(path))
    assert call("verify", str(path))[0] == 0, call("verify", str(path))[1]
    damaged = tmp_path / "damaged.db"
    data = bytearray(copy.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    damaged.write_bytes(data)
    house.stop()
    code, _, err = call("restore", str(damaged), "-c", str(house.config_file))
    assert code == 1 and err.count("\n") == 1
    house.start()
    assert house.get("/v1/log/keys")["keys"], "a backup that is not sound changes nothing"


def test_proofs_of_one_event_lead_to_a_checkpoint_after_erasing_too(house: Collector) -> None:
    agent = sent(house, 300)
    uid = json.loads(agent.lines[299])["metadata"]["uid"]
    house.stop()
    house.aged(0, "pos < 290")
    house.start()
    house.run("retain", "--older-than", "400d")
    proof = house.get(f"/v1/events/{uid}/proof")
    key = base64.b64decode(house.get("/v1/log/keys")["keys"][-1])
    size, root = tree.read_checkpoint(proof["checkpoint"], proof["checkpoint"].partition("\n")[0], key)
    assert size == proof["size"]
    tree.check_inclusion(
        tree.leaf_hash(agent.lines[299]), proof["index"], size, [base64.b64decode(s) for s in proof["path"]], root
    )


def test_a_real_agent_follows_a_change_of_key_that_its_pinned_one_vouches_for(house: Collector, tmp_path: Path) -> None:
    from agent import spoolfile
    from agent.config import Agent, CollectorLink, Seconds
    from agent.sender import Sender
    from tests.spooled import Machine, event

    desk = Machine(tmp_path / "agent")

    def happens(count: int) -> None:
        for _ in range(count):
            made = event()
            made.device = msgspec.Raw(json.dumps({"type_id": 2, "uid": desk.identity.agent, "hostname": "ws-1"}).encode())
            desk.spool.append([made])

    link = CollectorLink(url=house.url, token="house-token", heartbeat=Seconds(1.0))
    told: list[Any] = []
    sender = Sender(desk.identity, Agent(name="ws-1", collector=link), desk.spool, told.append)
    happens(3)
    until(lambda: sender.step() and desk.spool.acknowledged == 3, lambda: sender.status()["last_error"])
    house.stop()
    house.run("key", "rotate")
    house.start()
    happens(2)
    until(lambda: sender.step() and desk.spool.acknowledged == 5, lambda: sender.status()["last_error"])
    assert sender.counts["key_changed"] == 1 and sender.counts["bad_signature"] == 0
    pinned = desk.identity.pinned()
    assert pinned is not None and len(pinned.former) == 1
    sender.register.tell_held()
    assert not [fact for fact in told if type(fact).__name__ == "Tampered"], "what the old key signed is still believed"
    sender.close()
    desk.spool.close()
    assert spoolfile.verify(desk.state_dir, desk.identity.public_key)


def test_whoever_leaves_in_the_middle_of_a_bundle_leaves_nothing_behind(house: Collector) -> None:
    """More often than bundles may be made at once: each that is broken off gives its place back."""
    agent = sent(house)
    for _ in range(6):
        sent(house, 400, agent=agent)
    token = house.run("token", "create", "--role", "auditor").strip()

    def asked() -> int:
        with socket.create_connection(("127.0.0.1", house.port)) as line:
            line.sendall(f"GET /v1/export HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            return int(line.recv(64).split()[1])

    for _ in range(5):
        until(lambda: asked() == 200, "no place is given back")
    assert not list(house.state_dir.glob("tmp*")), "temporary files have no name"


def test_an_agent_gets_a_new_key_once_everything_is_sent(house: Collector, tmp_path: Path) -> None:
    from agent.config import Agent, CollectorLink, Seconds
    from agent.sender import Sender
    from tests.spooled import Machine, event

    desk = Machine(tmp_path / "agent")
    made = event()
    made.device = msgspec.Raw(json.dumps({"type_id": 2, "uid": desk.identity.agent, "hostname": "ws-1"}).encode())
    desk.spool.append([made])
    config = _written(tmp_path / "agent.toml", f'[agent]\nname = "ws-1"\nstate_dir = "{desk.state_dir}"\n')
    command = [sys.executable, "-m", "agent.cli", "enroll", house.url, "--token", "house-token", "--new-key", "-c", str(config)]

    def enroll() -> tuple[int, str]:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, said = enroll()
    assert code == 1 and "1 events were not sent yet" in said
    link = CollectorLink(url=house.url, token="house-token", heartbeat=Seconds(1.0))
    sender = Sender(desk.identity, Agent(name="ws-1", collector=link), desk.spool, lambda _fact: None)
    until(lambda: sender.step() and desk.spool.acknowledged == 1, lambda: sender.status()["last_error"])
    sender.close()
    desk.spool.close()
    code, said = enroll()
    assert code == 0 and f"the key of {desk.identity.agent} was put aside" in said
    names = house.get("/v1/agents?only=names")["names"]
    assert len(names) == 2 and set(names.values()) == {"ws-1"}, "a new id under the old name; the former chain stays"
    assert len(house.events(agent=desk.identity.agent, event="file.*")) == 1
