"""The register of media with a real collector and real agents: asked for, granted, used up, lost, taken back, unlocked."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import identity
from agent.contract import unlock
from agent.pytest_plugin import Agent, Media, _environment
from tests.collector_client import Client, draft
from tests.house import Collector, link_config, none_is_bad_ocsf, until

STICK, SERIAL = "usb:0951:1666:60A44C413F8CF320", "60A44C413F8CF320"
APPROVED = ("--owner", "sato", "--approver", "mori", "--purpose", "month-end", "--until", "2099-01-31")


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    made = Collector(tmp_path)
    made.start()
    yield made
    if not made.running:
        made.start()
    none_is_bad_ocsf(made.events())
    made.stop()


@pytest.fixture
def agent(tmp_path: Path, sekisho_media: Media, collector: Collector) -> Iterator[Agent]:
    made = Agent(tmp_path, sekisho_media, link_config(collector))
    made.start()
    try:
        until(lambda: made.status()["collector"]["enrolled"], "the agent does not enrol")
        yield made
    finally:
        made.stop()


def run(collector: Collector, *args: str, code: int = 0) -> tuple[str, str]:
    command = [sys.executable, "-m", "server_stub.cli", *args, "-c", str(collector.config_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout, done.stderr


def version(agent: Agent) -> int:
    return int(agent.status()["collector"]["register"]["version"])


def decided(agent: Agent) -> tuple[str, str]:
    """What the agent says of the stick that is plugged in."""
    command = [sys.executable, "-m", "agent.cli", "media", "--json", "-c", str(agent.config_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return next(((row["decision"], row["reason"]) for row in rows if row["serial"] == SERIAL), ("", ""))


def becomes(agent: Agent, decision: str, reason: str) -> None:
    until(lambda: decided(agent) == (decision, reason), lambda: f"{decided(agent)}, not {decision} ({reason})", 60.0)


def changes(collector: Collector) -> list[tuple[str, dict[str, Any]]]:
    events = collector.events(event="register.changed")
    return [(each["api"]["operation"], each["unmapped"]["sekisho"]["detail"]) for each in events]


def listed(collector: Collector, *filters: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(collector, "media", "list", "--json", *filters)[0].splitlines()]


def as_token(collector: Collector, role: str, name: str) -> tuple[str, ...]:
    """Options for a command by somebody with a token of their own."""
    token = collector.run("token", "create", "--role", role, "--note", name).strip()
    return ("--url", collector.url, "--token", token)


def test_asked_from_an_event_granted_and_taken_back(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    """The whole life of an approval, each act by who may do it, each on record with before and after."""
    sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "unapproved", "not_registered")
    (attached,) = until(lambda: collector.events(event="medium.attached"), "no event of the stick")
    uid = attached["metadata"]["uid"]
    sato, mori = as_token(collector, "viewer", "sato"), as_token(collector, "reviewer", "mori")
    wish = ("--purpose", "month-end", "--until", "2099-01-31", "--department", "accounting")
    asked = run(collector, "media", "request", "--from-event", uid, *wish, *sato)[0].strip()
    assert [(row["state"], row["requester"], row["owner"]) for row in listed(collector)] == [("requested", "sato", "sato")]
    assert "may not do this" in run(collector, "media", "approve", asked, *sato, code=1)[1]
    assert decided(agent)[0] == "unapproved", "asking changes nothing"
    run(collector, "media", "approve", asked, "--read-only", *mori)
    becomes(agent, "approved", "approved")
    second = run(collector, "media", "approve", asked, *as_token(collector, "reviewer", "kato"), code=1)[1]
    assert 'decided already: approved by "mori"' in second
    run(collector, "media", "revoke", STICK, "--reason", "left the company", *mori)
    becomes(agent, "revoked", "revoked")
    told = changes(collector)
    assert [name for name, _ in told] == ["media.request", "media.approve", "media.revoke"]
    granted = told[1][1]
    assert granted["before"]["state"] == "requested"
    assert (granted["after"]["approver"], granted["after"]["requester"], granted["after"]["read_only"]) == (
        "mori",
        "sato",
        True,
    )
    by = [event["actor"]["app_name"] for event in collector.events(event="register.changed")]
    assert by == ["token sato", "token mori", "token mori"]
    history = run(collector, "media", "history", STICK)[0]
    assert "state: requested → approved" in history
    assert "reason: - → left the company" in history


def test_a_revocation_reaches_a_waiting_agent_at_once(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    """With 300 others that wait as well. Five seconds are promised."""
    run(collector, "media", "approve", STICK, *APPROVED)
    sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "approved", "approved")
    other = Client(collector.port, "other")
    other.enrol()
    held = version(agent)
    target = f"/v1/register?after={held}"
    waiting = []
    try:
        for _ in range(300):
            waiting.append(sock := socket.create_connection(("127.0.0.1", collector.port), timeout=60))
            lines = [f"GET {target} HTTP/1.1", "Host: x", *(f"{name}: {text}" for name, text in other.signed(target).items())]
            sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        began = time.monotonic()
        run(collector, "media", "revoke", STICK, "--reason", "x")
        until(lambda: version(agent) > held, "the revocation does not arrive", within_s=5.0)
        until(lambda: decided(agent)[0] == "revoked", "the revocation is not obeyed", within_s=5.0)
        assert time.monotonic() - began < 5.0
    finally:
        for sock in waiting:
            sock.close()


def test_a_lost_medium_that_turns_up_is_a_high_finding(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    run(collector, "media", "approve", STICK, *APPROVED)
    run(collector, "media", "lost", STICK, "--reason", "on a train")
    until(lambda: version(agent) > 0 and changes(collector)[-1][1]["version"] == version(agent), "the loss does not arrive")
    sekisho_media.plug("stick1", serial=SERIAL)
    finding = agent.wait_for("medium.unapproved")
    said = finding["unmapped"]["sekisho"]["medium"]
    assert (finding["severity_id"], said["decision"], said["decision_reason"]) == (4, "revoked", "lost")
    assert "reported lost" in run(collector, "media", "approve", STICK, *APPROVED, code=1)[1]
    run(collector, "media", "found", STICK, "--reason", "lost-property office")
    run(collector, "media", "approve", STICK, *APPROVED)
    becomes(agent, "approved", "approved")


def test_a_pass_is_used_up_by_one_plugging_in(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    """Here at once; everywhere as soon as the collector heard of it."""
    run(collector, "media", "approve", STICK, *APPROVED, "--once")
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the pass does not arrive")
    stick = sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "approved", "approved")
    until(lambda: changes(collector)[-1][0] == "media.used", "the collector does not hear of it")
    assert listed(collector)[0]["state"] == "used"
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the agent is not told")
    assert decided(agent) == ("approved", "approved"), "for as long as it stays"
    sekisho_media.unplug(stick)
    until(lambda: decided(agent) == ("", ""), "it is still there")
    sekisho_media.plug("stick2", serial=SERIAL)
    becomes(agent, "expired", "pass_used")


def test_a_pass_is_held_to_without_a_network(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    run(collector, "media", "approve", STICK, *APPROVED, "--once")
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the pass does not arrive")
    collector.stop()
    stick = sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "approved", "approved")
    agent.stop()
    agent.start()
    becomes(agent, "approved", "approved")
    sekisho_media.unplug(stick)
    until(lambda: decided(agent) == ("", ""), "it is still there")
    sekisho_media.plug("stick2", serial=SERIAL)
    becomes(agent, "expired", "pass_used")
    collector.start()
    until(lambda: changes(collector)[-1][0] == "media.used", "the collector does not hear of it later")


def test_groups_of_machines(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    name = collector.get("/v1/agents")["agents"][0]["name"]
    run(collector, "media", "group", "set", "accounting", "ws-other")
    run(collector, "media", "approve", STICK, *APPROVED, "--machines", "@accounting")
    sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "unapproved", "other_machine")
    run(collector, "media", "group", "set", "accounting", "ws-other", name)
    becomes(agent, "approved", "approved")
    assert changes(collector)[-1][1]["added"] == [name]
    run(collector, "media", "group", "remove", "accounting")
    becomes(agent, "unapproved", "other_machine")


def test_an_older_register_put_in_place_is_refused_and_told(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    """Somebody with root keeps the signed register of before the revocation, and brings it back while the agent is stopped."""
    run(collector, "media", "approve", STICK, *APPROVED)
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the approval does not arrive")
    kept = Path(agent.state_dir, "register.json").read_bytes()
    run(collector, "media", "revoke", STICK, "--reason", "x")
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the revocation does not arrive")
    sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "revoked", "revoked")
    agent.stop()
    collector.stop()
    Path(agent.state_dir, "register.json").write_bytes(kept)
    agent.start()
    tampered = agent.wait_for("agent.tampered")
    assert tampered["unmapped"]["sekisho"]["detail"]["what"] == "register_rollback"
    becomes(agent, "revoked", "revoked")


def test_the_age_of_the_register_is_said(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    run(collector, "media", "approve", STICK, *APPROVED)
    until(lambda: version(agent) == changes(collector)[-1][1]["version"], "the approval does not arrive")
    assert agent.status()["collector"]["register"]["age_s"] < 60
    agent.stop()
    collector.stop()
    file = Path(agent.state_dir, "register.json")
    old = time.time() - 3 * 86_400 - 100
    os.utime(file, (old, old))
    agent.start()
    assert agent.status()["collector"]["register"]["age_s"] >= 3 * 86_400


def test_a_code_for_one_medium_on_one_machine(agent: Agent, collector: Collector) -> None:
    """Made at the collector and on record there; the machine can check it without a network."""
    known = collector.get("/v1/agents")["agents"][0]
    args = ("media", "unlock", STICK, "--machine", known["name"], "--for", "4h", "--reason", "on site, no network")
    code, said = run(collector, *args)
    assert f"sekisho-agent unlock {code.strip()}" in said
    me = identity.load(agent.state_dir)
    pinned = me.pinned()
    assert pinned is not None
    secret, now = unlock.shared_secret(me.key, pinned.public_key), int(time.time() * 1000)
    got = unlock.check(secret, me.agent, [STICK], code, now_ms=now, seen_ms=now, used=())
    (operation, detail) = changes(collector)[-1]
    assert (operation, detail["unlock"], detail["agent"]) == ("media.unlock", got.id, me.agent)
    assert code.strip() not in json.dumps(collector.events()), "who reads the log can't use it"
    run(collector, "media", "lost", STICK, "--reason", "x")
    assert "no code opens it" in run(collector, *args, code=1)[1]
    assert "no machine has" in run(collector, *args[:4], "nobody", *args[5:], code=1)[1]
    assert "no span of time" in run(collector, *args[:6], "soon", *args[7:], code=2)[1]


def test_a_code_opens_its_medium_on_a_machine_without_network(agent: Agent, sekisho_media: Media, collector: Collector) -> None:
    """Logged at both ends by the same id; a second time it opens nothing."""
    name = collector.get("/v1/agents")["agents"][0]["name"]
    code = run(collector, "media", "unlock", STICK, "--machine", name, "--for", "4h", "--reason", "on site")[0].strip()
    collector.stop()
    sekisho_media.plug("stick1", serial=SERIAL)
    becomes(agent, "unapproved", "not_registered")
    command = [sys.executable, "-m", "agent.cli", "unlock", code.lower().replace("-", " "), "-c", str(agent.config_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    becomes(agent, "approved", "unlocked")
    assert subprocess.run(command, capture_output=True, env=_environment(), timeout=60).returncode != 0, "it was used"
    collector.start()
    until(lambda: used_codes(collector), "the collector does not hear of it")
    assert used_codes(collector) == [changes(collector)[-1][1]["unlock"]]


def used_codes(collector: Collector) -> list[str]:
    details = [each["unmapped"]["sekisho"].get("detail", {}) for each in collector.events(event="medium.unapproved")]
    return [each["unlock"] for each in details if each.get("act") == "unlocked"]


def test_what_ends_this_week_and_who_asked(collector: Collector) -> None:
    day = 86_400
    for name, days in (("usb:1", 3), ("usb:2", 30), ("usb:3", 5)):
        until_then = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + days * day))
        who = ("--owner", "sato", "--approver", "mori", "--requester", f"asker{days}", "--purpose", "x", "--until", until_then)
        run(collector, "media", "approve", name, *who)
    text = run(collector, "media", "expiring")[0]
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["usb:1", "usb:3"]
    assert "asker3" in text and "asker30" not in text
    assert "usb:2" in run(collector, "media", "expiring", "--within", "60d", "-o", "csv")[0]
    assert {row["state"] for row in listed(collector, "--key", "usb:1")} == {"expiring"}


def test_two_who_decide_at_once(collector: Collector) -> None:
    run(collector, "media", "approve", STICK, *APPROVED)
    seen = listed(collector)[0]["version"]
    run(collector, "media", "approve", STICK, *APPROVED, "--if-version", str(seen))
    late = run(collector, "media", "approve", STICK, *APPROVED, "--if-version", str(seen), code=1)[1]
    assert "was changed meanwhile" in late


def test_a_list_into_the_register_and_back(collector: Collector, tmp_path: Path) -> None:
    file = tmp_path / "media.csv"
    rows = "".join(f"usb:0951:1666:{n:04},佐藤{n},mori,監査,2099-01-31,ws-1;ws-2\r\n" for n in range(700))
    file.write_bytes("\ufeff媒体キー,所有者,承認者,目的,期限,端末\r\n".encode() + rows.encode())
    out, said = run(collector, "media", "import", str(file), "--dry-run")
    assert "would import 700 media: 700 new" in said and len(out.splitlines()) == 700
    assert listed(collector) == []
    assert "700 new" in run(collector, "media", "import", str(file))[1]
    assert "700 as they were" in run(collector, "media", "import", str(file))[1]
    assert len(changes(collector)) == 700
    saved = tmp_path / "saved.csv"
    run(collector, "media", "export", "-o", str(saved), "--bom", "--lang", "ja")
    assert "700 as they were" in run(collector, "media", "import", str(saved))[1]
    file.write_bytes(b"key,owner,approver,until\r\nusb:x,a,b,never\r\nusb:y,sato,Sato,never\r\nusb:z,a,b,never\r\n")
    why = run(collector, "media", "import", str(file), code=1)[1]
    assert "media.csv:3: " in why and "of their own" in why and "nothing was imported" in why
    assert len(changes(collector)) == 700, "all of it, or nothing"
    file.write_bytes("媒体キー,所有者,承認者\r\nusb:x,佐藤,b".encode("cp932"))
    assert "--encoding cp932" in run(collector, "media", "import", str(file), code=1)[1]
    assert "1 new" in run(collector, "media", "import", str(file), "--encoding", "cp932")[1]


def test_rules_of_usbguard_into_the_register(collector: Collector, tmp_path: Path) -> None:
    file = tmp_path / "rules.conf"
    file.write_text(
        'allow id 0951:1666 serial "A1" name "DataTraveler" via-port "1-2"\nblock id 0951:1666 serial "B2"\nallow id 0951:*\n'
    )
    who = ("--owner", "sato", "--approver", "mori", "--until", "2099-01-31")
    assert "give --owner and --approver" in run(collector, "media", "import", "--format", "usbguard", str(file), code=2)[1]
    _, said = run(collector, "media", "import", "--format", "usbguard", str(file), *who)
    assert "rules.conf:1: not carried over: the port it is in" in said
    assert "rules.conf:3: is for all devices of a maker" in said
    assert [(row["key"], row["state"], row.get("purpose")) for row in listed(collector)] == [
        ("usb:0951:1666:A1", "approved", "DataTraveler"),
        ("usb:0951:1666:B2", "revoked", None),
    ]
    file.write_text("allow id 0951:1666 serial A1\n")
    assert "rules.conf:1: column 27" in run(collector, "media", "import", "--format", "usbguard", str(file), *who, code=1)[1]


ACTS: list[tuple[str, str, dict[str, Any] | None, set[str]]] = [
    ("GET", "/v1/media", None, {"viewer", "reviewer", "admin", "auditor"}),
    ("POST", "/v1/media", {"act": "request", "key": "k", "purpose": "x"}, {"viewer", "reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "approve", "id": "0" * 16}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "deny", "id": "0" * 16, "reason": "x"}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "revoke", "key": "k", "reason": "x"}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "lost", "key": "k2", "reason": "x"}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "found", "key": "k2", "reason": "x"}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "unlock", "key": "k", "machine": "m", "for_ms": 1, "reason": "x"}, {"reviewer", "admin"}),
    ("POST", "/v1/media", {"act": "import", "rows": []}, {"admin"}),
    ("PUT", "/v1/media/k", {"owner": "sato"}, {"reviewer", "admin"}),
    ("DELETE", "/v1/media/k?reason=x", None, {"reviewer", "admin"}),
    ("GET", "/v1/groups", None, {"viewer", "reviewer", "admin", "auditor"}),
    ("PUT", "/v1/groups/g", {"machines": []}, {"admin"}),
    ("DELETE", "/v1/groups/g", None, {"admin"}),
]


def test_which_role_may_do_which_act(collector: Collector) -> None:
    wrong = []
    for role in ("viewer", "reviewer", "admin", "auditor"):
        token = collector.run("token", "create", "--role", role).strip()
        for method, path, body, may in ACTS:
            connection = http.client.HTTPConnection("127.0.0.1", collector.port, timeout=20)
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Authorization": f"Bearer {token}"})
            status = connection.getresponse().status
            connection.close()
            if (status != 403) != (role in may) or status >= 500:
                wrong.append((role, method, path, body, status))
    assert not wrong


def test_an_agent_can_not_use_up_what_is_no_pass(collector: Collector) -> None:
    """What an agent says of an approval changes only one-time passes of that very medium."""
    run(collector, "media", "approve", STICK, *APPROVED)
    id = listed(collector)[0]["id"]
    client = Client(collector.port, "ws-1")
    client.enrol()
    medium = {"key": STICK, "decision": "approved", "approval": id}
    made = draft("medium.attached", agent=client.id, name="ws-1", medium=medium)
    made.peripheral_device = {"name": "stick", "uid": STICK, "type_id": 99, "type": "Storage"}
    client.append(made)
    assert client.send()[0] == 200
    assert [name for name, _ in changes(collector)] == ["media.approve"]
