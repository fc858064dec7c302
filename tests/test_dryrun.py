"""`enforce --dry-run`: what would have been stopped, from what was recorded; and its table, into which strangers' names go."""

import json
from pathlib import Path
from typing import Any

import pytest

from agent import cli, config, dryrun
from agent.core import facts
from tests.workstation import PHONE, ROOT, STICK, Workstation

SITE = """
[agent]
state_dir = "/nowhere"
[[agent.protect]]
path = "/srv/customers"
[agent.enforce]
"""


def judged(ws: Workstation, policy: str = "", since_ms: int = 0) -> list[dict[str, Any]]:
    site = config.parse(SITE + policy)
    return [row.as_dict() for row in dryrun.judge(site.agent, ws.raw, since_ms)]


def a_week(ws: Workstation) -> Workstation:
    """A stick that nobody approved, used twice by one person; a phone; and an approved stick."""
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[])).login("sato")
    ws.file(f"{ROOT}/a.csv", 5_000)
    ws.plug(STICK).copy("a.csv")
    ws.unplug(STICK).wait(3_600)
    ws.plug(STICK).copy("a.csv")
    return ws.unplug(STICK).wait(3_600).plug(PHONE, mount=None).wait(30)


def test_a_week_as_enforce_would_have_had_it() -> None:
    rows = judged(a_week(Workstation()))
    stick, phone = rows
    assert (stick["would"], stick["plugged"], stick["copies"]) == ("read_only", 2, 2)
    assert stick["people"] == ["sato"] and stick["bytes"] == 10_000
    assert (phone["would"], phone["plugged"], phone["copies"]) == ("deauthorize", 1, 0)


def test_the_policy_of_today_is_what_counts() -> None:
    ws = a_week(Workstation())
    assert [row["would"] for row in judged(ws, 'unapproved = "refuse"\nphones = "allow"')] == ["refuse", "refuse"]
    assert judged(ws, 'unapproved = "allow"') == []


def test_what_is_older_than_asked_for_is_not_counted() -> None:
    ws = a_week(Workstation())
    assert [row["kind"] for row in judged(ws, since_ms=ws.now - 60_000)] == ["phone"]


def test_an_approval_for_reading_and_one_for_other_directories_are_kept_to() -> None:
    ws = Workstation().login("sato")
    ws.file(f"{ROOT}/a.csv", 5_000)
    ws.approve(STICK, read_only=True).plug(STICK).copy("a.csv")
    ws.wait(30)
    assert [(row["would"], row["copies"]) for row in judged(ws, 'unapproved = "allow"')] == [("read_only", 1)]
    ws = Workstation().login("sato")
    ws.file(f"{ROOT}/a.csv", 5_000)
    ws.approve(STICK, dirs=["drawings"]).plug(STICK).copy("a.csv")
    ws.wait(30)
    assert [(row["would"], row["copies"]) for row in judged(ws)] == [("directories", 1)]
    assert judged(ws, 'directories = "allow"') == []


def test_facts_that_were_recorded_are_judged_like_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    recorded, site = tmp_path / "facts", tmp_path / "config.toml"
    recorded.write_text("\n".join(a_week(Workstation()).story))
    site.write_text(SITE)
    given = ["enforce", "--dry-run", "--since", "all", "--facts", str(recorded), "-c", str(site)]
    assert cli.main(given) == 0
    assert "Kingston DataTraveler 3.0" in (said := capsys.readouterr().out) and "read-only" in said
    assert cli.main([*given, "-o", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["key"] for row in rows] == ["usb:0951:1666:60A44C413F8CF320", "usb:18d1:4ee1:28161FDH2000X1"]
    with pytest.raises(SystemExit) as left:
        cli.main(["enforce", "--dry-run", "--since", "yesterday", "-c", str(site)])
    assert left.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["enforce", "-c", str(site)])


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_a_stick_that_calls_itself_an_escape_sequence_is_shown_harmlessly(lang: Any) -> None:
    ws = Workstation().login("sato")
    ws.tell(facts.Register(at_ms=ws.now, version=1, approvals=[]))
    ws.plug(facts.msgspec.structs.replace(STICK, vendor="\x1b[2J", model="=cmd()|'<script>", serial="\x9b31m"))
    site = config.parse(SITE)
    rows = dryrun.judge(site.agent, ws.raw, 0)
    shown = "\n".join(dryrun.table(rows, lang, "7d"))
    assert rows and "\x1b" not in shown and "\x9b" not in shown
    assert list(dryrun.table([], lang, "7d"))
