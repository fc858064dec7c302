"""Mode "enforce" in the core: what is wished of which medium (tests/cases/stopping.toml), and what is told of it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.contract import show
from agent.contract.event import read
from agent.core import facts
from agent.core.facts import Acted, Device, OpenFile, Refused
from agent.core.refusals import SINGLY
from agent.core.stopping import EnforcePolicy
from tests.workstation import PHONE, ROOT, STICK, Workstation

CASES = tomllib.loads(Path(__file__).with_name("cases").joinpath("stopping.toml").read_text())["case"]
DAY_MS = 86_400_000
KEYBOARD = Device(id="/sys/k", bus="usb", subsystem="usb", vendor_id="1", product_id="2", serial="K1", interfaces=["03:01:01"])
NETWORK = Device(id="/sys/n", bus="usb", subsystem="usb", vendor_id="1", product_id="3", serial="N1", interfaces=["02:0d:00"])
MOUSE = Device(id="/sys/m", bus="usb", subsystem="usb", vendor_id="1", product_id="4", serial="M1", interfaces=["03:01:02"])
TYPING = facts.msgspec.structs.replace(STICK, interfaces=["08:06:50", "03:01:01"])
DEVICES = {"stick": STICK, "phone": PHONE, "keyboard": KEYBOARD, "network": NETWORK, "typing stick": TYPING, "mouse": MOUSE}
KEYS = {
    "stick": "usb:0951:1666:60A44C413F8CF320",
    "typing stick": "usb:0951:1666:60A44C413F8CF320",
    "phone": "usb:18d1:4ee1:28161FDH2000X1",
    "keyboard": "usb:1:2:K1",
    "network": "usb:1:3:N1",
}


def machine(case: dict[str, Any]) -> Workstation:
    policy = EnforcePolicy(on=case.get("mode", "enforce") == "enforce", **case.get("policy", {}))
    ws = Workstation(enforce=policy)
    kind = case.get("device", "stick")
    if not case.get("no_register"):
        day = ws.now - 100 * DAY_MS
        approvals = []
        if "approval" in case:
            row = dict(case["approval"])
            until, since = row.pop("until", None), row.pop("since", 0)
            until_ms = None if until is None else day + until * DAY_MS
            approvals.append(facts.Approval(id="A", key=KEYS[kind], since_ms=day + since * DAY_MS, until_ms=until_ms, **row))
        ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=approvals))
    return ws.plug(DEVICES[kind], mount="" if case.get("mounted", True) else None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tells"])
def test_wish(case: dict[str, Any]) -> None:
    ws = machine(case)
    stops = ws.core.stops(ws.now)
    assert [stop.level for stop in stops] == ([case["level"]] if "level" in case else [])
    if stops:
        assert stops[0].usb is case.get("usb", False)
        assert list(stops[0].roots) == case.get("roots", [])


def enforcing(**policy: Any) -> Workstation:
    return Workstation(enforce=EnforcePolicy(on=True, **policy))


def test_an_approval_releases_and_its_end_stops_while_the_medium_is_there() -> None:
    ws = enforcing()
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[])).plug(STICK)
    assert ws.core.stops(ws.now)
    ws.approve(STICK, version=2, until_ms=ws.now + 60_000)
    assert not ws.core.stops(ws.now)
    ws.wait(61)
    assert ws.core.stops(ws.now)


def test_what_the_hand_did_raises_the_finding_of_the_medium() -> None:
    ws = enforcing()
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[])).login("sato").plug(STICK)
    first = ws.only("medium.unapproved")
    ws.tell(Acted(at_ms=ws.now, id=STICK.id, did=["read_only"], targets=["/media/stick"]))
    stopped = ws.all("medium.unapproved")[-1]
    assert stopped["finding_info"]["uid"] == first["finding_info"]["uid"]
    assert (stopped["activity_id"], stopped["action_id"], stopped["disposition_id"]) == (2, 2, 2)
    assert stopped.detail == {"act": "stopped", "did": ["read_only"], "targets": ["/media/stick"]}
    ws.tell(Acted(at_ms=ws.now, id=STICK.id, did=["read_only"]))  # the same again is no news
    assert len(ws.all("medium.unapproved")) == 2
    ws.tell(Acted(at_ms=ws.now, id=STICK.id, undid=["read_only"]))
    released = ws.all("medium.unapproved")[-1]
    assert (released["action_id"], released["disposition_id"], released["status_id"]) == (1, 9, 4)
    assert released.severity == 1


def test_what_could_not_be_stopped_is_told_with_why() -> None:
    ws = enforcing().plug(STICK)
    ws.tell(Acted(at_ms=ws.now, id=STICK.id, failed=["/media/stick can't be made read-only (Device or resource busy)"]))
    assert "busy" in ws.only("medium.unapproved").detail["failed"][0]


def test_a_refused_copy_says_who_which_file_and_which_medium() -> None:
    ws = enforcing().login("sato").plug(STICK)
    source = ws.file(f"{ROOT}/a.csv", 5_000)
    cp = ws.run("/usr/bin/cp", "cp", source, "/media/Kingston/a.csv")
    cp.seen(files=[OpenFile(source, 5_000, b"k")])
    ws.tell(Refused(at_ms=ws.now, pid=cp.pid, key=b"", path="/media/Kingston/a.csv"))
    event = ws.only("file.written")
    assert event.login_user == "sato"
    assert event.protected["rel"] == "a.csv" and event.source["path"] == source
    assert event.medium["serial"] == STICK.serial and event.confidence == 1.0
    assert (event["action_id"], event["disposition_id"], event["status_id"]) == (2, 2, 2)
    assert event.severity == 3


def test_a_refused_write_of_what_is_not_protected_names_no_file() -> None:
    ws = enforcing().login("sato").plug(STICK)
    cp = ws.run("/usr/bin/cp", "cp", "/home/sato/diary.txt", "/media/Kingston/diary.txt")
    ws.tell(Refused(at_ms=ws.now, pid=cp.pid, key=b"", path="/media/Kingston/diary.txt"))
    event = ws.only("file.written")
    assert "diary" not in str({key: value for key, value in event.items() if key != "story"})
    assert event["file"]["ext"] == "txt" and event.severity == 2


def test_a_program_that_tries_a_thousand_files_is_a_few_events() -> None:
    ws = enforcing().login("sato").plug(STICK)
    cp = ws.run("/usr/bin/cp", "cp")
    for number in range(1_000):
        ws.tell(Refused(at_ms=ws.now, pid=cp.pid, key=b"", path=f"/media/Kingston/{number}.txt"))
    assert len(ws.all("file.written")) == SINGLY
    ws.wait(11)
    told = ws.all("file.written")
    assert len(told) == SINGLY + 1
    assert told[-1]["count"] == 1_000 - SINGLY


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_people_read_what_was_done(lang: Any) -> None:
    ws = enforcing().login("sato").plug(STICK)
    for code in ("read_only", "no_opens", "no_writes", "directories", "deauthorized"):
        ws.tell(Acted(at_ms=ws.now, id=STICK.id, did=[code]))
    ws.tell(Acted(at_ms=ws.now, id=STICK.id, undid=["deauthorized"]))
    said = [show.what(read(facts.msgspec.json.encode(dict(each))), lang) for each in ws.all("medium.unapproved")]
    assert len(set(said)) == 6 and all("Kingston" in each and "{" not in each for each in said)


ACTS = st.lists(
    st.one_of(
        st.builds(
            Acted,
            at_ms=st.integers(0, 1 << 40),
            id=st.sampled_from([STICK.id, "", "gone"]),
            did=st.lists(st.text(max_size=8), max_size=3),
            undid=st.lists(st.text(max_size=8), max_size=3),
            targets=st.lists(st.text(max_size=20), max_size=3),
            failed=st.lists(st.text(max_size=20), max_size=3),
        ),
        st.builds(
            Refused,
            at_ms=st.integers(0, 1 << 40),
            pid=st.integers(-1, 3),
            key=st.just(b""),
            path=st.one_of(st.text(max_size=20), st.text(max_size=8).map(lambda name: f"/media/Kingston/{name}")),
            source=st.booleans(),
        ),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(ACTS)
def test_no_order_of_acts_and_refusals_breaks_the_core(acts: list[facts.Fact]) -> None:
    ws = enforcing().plug(STICK)
    for act in acts:
        ws.core.feed(act)
    ws.core.feed(facts.Stopping(at_ms=1 << 41))
