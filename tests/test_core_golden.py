"""One event of each code as written, in tests/golden/; renewed by `SEKISHO_REWRITE=1 pytest tests/test_core_golden.py`."""

import json
import os
from pathlib import Path

import pytest
from msgspec.structs import replace
from workstation import PHONE, ROOT, STICK, Workstation

from agent.contract.codes import CODES
from agent.core import facts
from agent.core.pipeline import WindowLimit

GOLDEN = Path(__file__).with_name("golden")
LATER = {"file.brought_in", "access.changed"}
"""Codes of the contract that the agent does not write yet."""
COLLECTORS = {"agent.silent", "agent.back", "review.decided", "register.changed", "record.viewed", "record.erased"}


def _day() -> Workstation:
    """A day on which everything happens that the agent can tell."""
    ws = Workstation(limits=[WindowLimit(name="burst", window_s=600, bytes=400_000, files=100)])
    ws.tell(facts.Started(at_ms=ws.now, boot_id="3c1f", config_digest="d" * 64, previous={"epoch": 1, "head": "ab" * 32}))
    ws.login("sato").approve(STICK).plug().copy("a.csv")
    ws.run("zip", "x.zip").read("b.csv").create(f"{ws.stick}/x.zip").close(f"{ws.stick}/x.zip", 150_000)
    ws.run("cp").create(f"{ws.stick}/letter.odt").close(f"{ws.stick}/letter.odt", 9_000)
    ws.plug(PHONE).wait(1).unplug().unplug(PHONE)
    ws.tell(facts.Coverage(at_ms=ws.now, sensor="fanotify", ok=False, sees=[], blind=["no_privilege"], why="needs root"))
    ws.tell(
        facts.Lost(at_ms=ws.now, reason="spool_full", since_ms=ws.now - 500, until_ms=ws.now, count=3, first_seq=4, last_seq=6)
    )
    ws.tell(facts.Clock(at_ms=ws.now, jump_ms=-3_600_000))
    ws.tell(facts.Tampered(at_ms=ws.now, what="spool_rows", detail={"missing": 2}))
    ws.tell(facts.Summary(at_ms=ws.now, detail={"waiting": 0}))
    return ws.tell(facts.Stopping(at_ms=ws.now, reason="SIGTERM"))


def _detour() -> Workstation:
    """A copy made elsewhere first, as the sensor tells it and finds it to be one; then it leaves."""
    ws = Workstation().login("sato").plug()
    copy = ws.file("/home/sato/holiday.jpg", 200_000)
    cp, key = ws.run("cp", "b.csv", copy).read("b.csv"), ws.keys[copy]
    ws.tell(facts.Closed(at_ms=ws.now, pid=cp.pid, key=key, path=copy, size=200_000, born_ms=ws.now)).wait(1)
    for ask in ws.core.compare():
        ws.tell(facts.Compared(at_ms=ws.now, key=ask.key, path=ask.path, size=200_000, alike="same"))
    ws.mark(copy)
    ws.copy(copy)
    return ws


def _odd() -> Workstation:
    """Somebody's first stick, which also types."""
    return Workstation(first_use=True).login("sato").plug(replace(STICK, interfaces=["08:06:50", "03:01:01"]))


DAY, DETOUR, ODD = _day(), _detour(), _odd()
FIRST = {code: day.all(code)[0] for day in (ODD, DETOUR, DAY) for code in dict.fromkeys(event.code for event in day.events)}


def test_the_day_tells_every_code_that_the_agent_writes():
    assert set(FIRST) == (set(CODES) - LATER - COLLECTORS) | {"copy.burst"}


@pytest.mark.parametrize("code", FIRST)
def test_golden(code):
    path = GOLDEN / f"{code}.json"
    written = json.dumps(FIRST[code], indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    if os.environ.get("SEKISHO_REWRITE"):
        path.write_text(written)
    assert path.read_text() == written, f"{code} is written differently now; read the diff, then SEKISHO_REWRITE=1"


def test_no_golden_is_left_of_a_code_that_is_gone():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(FIRST)
    assert ROOT in json.dumps(FIRST["file.copied_out"])
