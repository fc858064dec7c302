"""The rules of the register of media: who may not decide, how one state follows the other, who comes first."""

import msgspec
import pytest

from server_stub import bulk, records, rulebook
from server_stub.records import Record, Wish, state_of
from server_stub.rulebook import Actor, Ruled

NOW, DAY = 1_795_000_000_000, 86_400_000
KEY = "usb:0951:1666:60A"
MORI, TANAKA, ADMIN = Actor("mori"), Actor("tanaka"), Actor("root", may_record=True)


def wish(**more) -> Wish:
    return Wish(**({"owner": "sato", "purpose": "audit", "until": NOW + 30 * DAY} | more))


def asked(**more) -> Record:
    return rulebook.request(Record(key=KEY), "a" * 16, wish(requester="", **more), Actor("sato"), NOW).record


def why(act) -> tuple[int, str]:
    with pytest.raises(Ruled) as refused:
        act()
    return refused.value.status, refused.value.why


def test_asked_granted_taken_back():
    record = asked()
    assert state_of(record, record.approvals[0], NOW, 7 * DAY) == "requested"
    assert records.entries(record) == [], "agents are not told what was only asked for"
    granted = rulebook.approve_request(record, "a" * 16, Wish(until=NOW + 3 * DAY), MORI, NOW)
    assert (granted.before.state, granted.after.state) == ("requested", "approved")
    assert (granted.after.approver, granted.after.requester, granted.after.until) == ("mori", "sato", NOW + 3 * DAY)
    assert granted.record.revision == record.revision + 1
    (told,) = records.entries(granted.record)
    assert (told.owner, told.revoked, told.until) == ("sato", False, NOW + 3 * DAY)
    gone = rulebook.revoke(granted.record, "left the company", MORI, NOW)
    assert records.entries(gone.record)[0].revoked
    assert (gone.before.state, gone.after.state, gone.after.reason) == ("approved", "revoked", "left the company")


@pytest.mark.parametrize(
    ("at", "state"),
    [(0, "approved"), (22.9, "approved"), (23, "expiring"), (29.9, "expiring"), (30, "expired")],
)
def test_time_makes_the_rest_of_the_states(at, state):
    record = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori"), ADMIN, NOW).record
    assert state_of(record, record.approvals[0], NOW + int(at * DAY), 7 * DAY) == state


def test_each_end_is_told_once():
    record = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori"), ADMIN, NOW).record
    assert rulebook.ending(record, NOW, 7 * DAY) is None
    soon = rulebook.ending(record, NOW + 25 * DAY, 7 * DAY)
    assert soon.operation == "media.expiring"
    assert rulebook.ending(soon.record, NOW + 26 * DAY, 7 * DAY) is None
    over = rulebook.ending(soon.record, NOW + 31 * DAY, 7 * DAY)
    assert over.operation == "media.expired"
    assert rulebook.ending(over.record, NOW + 32 * DAY, 7 * DAY) is None


@pytest.mark.parametrize("owner", ["mori", "Mori", " MORI", "ｍｏｒｉ", "mo ri"])
def test_nobody_approves_what_is_theirs(owner):
    status, said = why(lambda: rulebook.approve(Record(key=KEY), "b" * 16, wish(owner=owner), MORI, NOW))
    assert status == 422
    assert "have somebody else approve it" in said


def test_nobody_decides_what_they_asked_for():
    record = rulebook.request(Record(key=KEY), "a" * 16, wish(requester=""), MORI, NOW).record
    assert record.approvals[0].requester == "mori"
    assert "asked for this approval" in why(lambda: rulebook.approve_request(record, "a" * 16, Wish(), MORI, NOW))[1]
    assert rulebook.approve_request(record, "a" * 16, Wish(), TANAKA, NOW).after.approver == "tanaka"


def test_only_an_administrator_records_what_another_decided():
    status, said = why(lambda: rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="tanaka"), MORI, NOW))
    assert status == 422
    assert "decide in your own name" in said
    done = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="tanaka"), ADMIN, NOW).after
    assert (done.approver, done.recorded_by) == ("tanaka", "root")
    mine = Actor("sato", may_record=True)
    assert "record an approval" in why(lambda: rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori"), mine, NOW))[1]


def test_who_comes_second_is_told():
    record = asked()
    first = rulebook.approve_request(record, "a" * 16, Wish(), MORI, NOW).record
    status, said = why(lambda: rulebook.approve_request(first, "a" * 16, Wish(), TANAKA, NOW))
    assert status == 409
    assert 'approved by "mori"' in said
    assert why(lambda: rulebook.deny(first, "a" * 16, "no", TANAKA, NOW))[0] == 409
    assert why(lambda: rulebook.held_at(first, record.revision))[0] == 412
    rulebook.held_at(first, first.revision)
    rulebook.held_at(first, None)


def test_several_approvals_stand_beside_each_other_and_one_is_taken_back():
    one = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori", machines=["ws-1"]), ADMIN, NOW).record
    both = rulebook.approve(one, "c" * 16, wish(approver="mori", machines=["ws-2"]), ADMIN, NOW, beside=True).record
    assert [each.machines for each in records.entries(both)] == [["ws-1"], ["ws-2"]]
    less = rulebook.revoke(both, "moved", MORI, NOW, id="b" * 16).record
    assert [each.revoked for each in records.entries(less)] == [True, False]
    instead = rulebook.approve(both, "d" * 16, wish(approver="mori"), ADMIN, NOW)
    assert [each.id for each in instead.record.approvals] == ["d" * 16], "without beside it stands in the place of what stood"


def test_lost_and_found():
    record = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori"), ADMIN, NOW).record
    gone = rulebook.lost(record, "on a train", MORI, NOW).record
    assert state_of(gone, gone.approvals[0], NOW, 0) == "lost"
    assert [(each.lost, each.revoked, each.reason) for each in records.entries(gone)] == [(True, True, "on a train")]
    assert why(lambda: rulebook.approve(gone, "c" * 16, wish(approver="mori"), ADMIN, NOW))[0] == 409
    back = rulebook.found(gone, "lost-property office", MORI, NOW).record
    assert state_of(back, back.approvals[0], NOW, 0) == "revoked", "what was on it meanwhile nobody knows"
    assert rulebook.approve(back, "c" * 16, wish(approver="mori"), ADMIN, NOW).after.state == "approved"


def test_a_medium_that_nobody_approved_may_be_lost_too():
    gone = rulebook.lost(Record(key=KEY), "on a train", MORI, NOW).record
    assert [(each.key, each.lost) for each in records.entries(gone)] == [(KEY, True)]


def test_a_pass_is_used_once():
    record = rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori", once=True), ADMIN, NOW).record
    done = rulebook.used(record, "b" * 16, "agent-1", "ws-1", NOW)
    assert state_of(done.record, done.after, NOW, 0) == "used"
    assert records.entries(done.record)[0].used_by == "agent-1"
    assert rulebook.used(done.record, "b" * 16, "agent-2", "ws-2", NOW) is None
    assert rulebook.used(record, "f" * 16, "agent-2", "ws-2", NOW) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"owner": ""}, "owner: is missing"),
        ({"owner": "a\nb"}, "owner: holds a line break"),
        ({"purpose": "x" * 1001}, "purpose: is longer"),
        ({"until": NOW - 1}, "until: the approval would end"),
        ({"until": 10**30}, "until: is no time"),
        ({"since": -1}, "since: is no time"),
        ({"since": NOW + DAY, "until": NOW + DAY}, "until: the approval would end"),
        ({"machines": [f"ws-{n:05}" for n in range(2000)]}, "machines: are more than"),
    ],
)
def test_what_can_not_be_filled_in(wrong, said):
    assert said in why(lambda: rulebook.approve(Record(key=KEY), "b" * 16, wish(approver="mori", **wrong), ADMIN, NOW))[1]


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "a\nb"])
def test_keys_that_are_none(key):
    assert why(lambda: rulebook.valid_key(key))[0] == 422


def test_what_earlier_versions_kept_is_read():
    kept = '{"id":"1","key":"k","owner":"sato","approver":"mori","until":5,"revoked":true,"reason":"left"}'
    record = records.read_record("k", kept)
    assert [(each.owner, each.state, each.until, each.reason) for each in record.approvals] == [("sato", "revoked", 5, "left")]
    again = records.read_record("k", msgspec.json.encode(record).decode())
    assert again == record


# -- lists -----------------------------------------------------------------------------------------------------------------


def ids():
    numbers = iter(range(1000))
    return lambda: f"{next(numbers):016x}"


ROW = bulk.Row(key=KEY, owner="sato", approver="mori", purpose="audit", until=NOW + DAY)


def told(record: Record, *rows: bulk.Row):
    return bulk.plan({KEY: record}, list(rows), ADMIN, NOW, ids())


def test_a_list_can_be_imported_twice():
    said, changes = told(Record(key=KEY), ROW)
    assert [each.outcome for each in said] == ["new"]
    said, changes = told(changes[0].record, ROW)
    assert [each.outcome for each in said] == ["same"]
    assert changes == []


def test_a_row_changes_the_approval_it_is_about():
    _, changes = told(Record(key=KEY), ROW)
    said, changes = told(changes[0].record, msgspec.structs.replace(ROW, purpose="more", until=NOW + 2 * DAY))
    assert [(each.outcome, each.fields) for each in said] == [("changed", ["purpose", "until"])]
    assert [each.purpose for each in changes[0].record.approvals] == ["more"]
    said, changes = told(changes[0].record, msgspec.structs.replace(ROW, machines=["ws-1"]))
    assert [each.outcome for each in said] == ["new"], "for other machines it is another approval"


def test_rows_break_no_rule_of_people_either():
    said, _ = told(Record(key=KEY), msgspec.structs.replace(ROW, approver="Sato"), ROW)
    assert [each.outcome for each in said] == ["refused", "new"]
    said, _ = told(Record(key=KEY), msgspec.structs.replace(ROW, owner=""))
    assert (said[0].column, said[0].why) == ("owner", "is missing; say who may use the medium")


@pytest.mark.parametrize("state", ["requested", "approved", "denied", "revoked", "lost"])
def test_every_state_comes_back_the_same(state):
    row = msgspec.structs.replace(ROW, state=state, reason="because" if state != "approved" else "", requester="kato")
    _, changes = told(Record(key=KEY), row)
    record = changes[-1].record
    said, changes = told(record, *bulk.rows_of(record))
    assert {each.outcome for each in said} == {"same"}, said
