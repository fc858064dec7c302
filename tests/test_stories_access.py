"""Who may read a protected directory: the first account, and what of it drifts. Stories told to the core."""

from agent.core import facts
from agent.core.facts import Grant
from tests.workstation import ROOT, Workstation


def look(ws: Workstation, *grants: Grant, files: int = 10, **more: int) -> None:
    ws.tell(facts.Rights(at_ms=ws.now, root=ROOT, grants=list(grants), files=files, **more))


OWNER = Grant("user:sato", "read", ["sato"], 1, 10)
STAFF = Grant("group:staff", "read", ["ito", "sato"], 2, 10)


def test_the_first_account_says_who_may_read_and_is_no_alarm() -> None:
    ws = Workstation()
    look(ws, OWNER, STAFF)
    first = ws.only("access.changed")
    assert first.severity == 1 and first.said["protected"]["label"] == "顧客マスタ"
    assert first.said["detail"]["first"] is True
    assert first.said["detail"]["now"][1] == {
        "who": "group:staff",
        "may": "read",
        "people": 2,
        "names": ["ito", "sato"],
        "files": 10,
    }


def test_a_directory_that_everybody_may_read_is_said_from_the_first() -> None:
    ws = Workstation()
    look(ws, Grant("everyone", "read", [], 0, 3))
    assert ws.only("access.changed").severity == 3


def test_somebody_opens_it_to_everybody_and_is_named() -> None:
    ws = Workstation()
    ws.login("sato")
    look(ws, OWNER)
    chmod = ws.run("/usr/bin/chmod", "-R", "o+r", ROOT)
    for name in ("a.csv", "b.csv"):
        ws.tell(facts.Attributes(at_ms=ws.now, pid=chmod.pid, key=b"k", path=f"{ROOT}/{name}", inode=1, links=1))
    assert ws.core.stirred() == [ROOT] and ws.core.stirred() == []
    look(ws, Grant("everyone", "read", [], 0, 2), OWNER)
    drift = ws.all("access.changed")[-1]
    assert drift.severity == 4 and drift.login_user == "sato"
    assert drift.said["detail"]["gained"] == [{"who": "everyone", "may": "read", "files": 2}]
    assert drift.said["detail"]["changes"] == 2 and not drift.said["detail"]["lost"]
    assert "argv" not in drift.said["process"], "a command line may name any file"


def test_somebody_joins_the_group_and_only_the_newcomer_is_told() -> None:
    ws = Workstation()
    look(ws, STAFF)
    look(ws, Grant("group:staff", "read", ["ito", "mori", "sato"], 3, 10))
    drift = ws.all("access.changed")[-1]
    assert drift.said["detail"]["gained"] == [
        {"who": "group:staff", "may": "read", "people": 1, "names": ["mori"], "files": 10}
    ]
    assert drift.severity == 3 and "user" not in drift["actor"], "usermod was not seen: nobody is named"


def test_files_that_come_with_the_rights_of_the_others_are_no_drift() -> None:
    ws = Workstation()
    look(ws, STAFF)
    look(ws, Grant("group:staff", "read", ["ito", "sato"], 2, 14), files=14)
    assert len(ws.all("access.changed")) == 1


def test_one_more_file_opened_to_those_who_had_some_is_drift() -> None:
    ws = Workstation()
    look(ws, OWNER, Grant("everyone", "read", [], 0, 1))
    look(ws, OWNER, Grant("everyone", "read", [], 0, 2))
    assert ws.all("access.changed")[-1].said["detail"]["gained"] == [{"who": "everyone", "may": "read", "files": 1}]


def test_rights_taken_back_are_told_as_lost() -> None:
    ws = Workstation()
    look(ws, OWNER, STAFF)
    look(ws, OWNER)
    drift = ws.all("access.changed")[-1]
    assert [each["who"] for each in drift.said["detail"]["lost"]] == ["group:staff"] and drift.severity == 2


def test_after_a_restart_what_was_known_is_known() -> None:
    ws = Workstation()
    look(ws, OWNER)
    assert ws.core.state_changed
    again = Workstation()
    again.core.restore(ws.core.state())
    look(again, OWNER)
    assert not again.all("access.changed")
    look(again, OWNER, STAFF)
    assert [each["who"] for each in again.only("access.changed").said["detail"]["gained"]] == ["group:staff"]


def test_a_program_with_anothers_rights_is_told() -> None:
    ws = Workstation()
    look(ws, OWNER)
    look(ws, OWNER, setuid=1)
    assert ws.all("access.changed")[-1].said["detail"]["setuid"] == 1


def test_a_directory_that_is_protected_no_more_is_forgotten() -> None:
    ws = Workstation()
    look(ws, OWNER)
    ws.core.reconfigure(facts.msgspec.structs.replace(ws.config, protect=[]))
    look(ws, STAFF)
    assert len(ws.all("access.changed")) == 1
