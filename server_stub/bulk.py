"""A whole list of approvals put into the register: what each row would change, or why it can't be.

Question: what does this row mean for the register as it stands? Owns: which approval a row is about, and that a row which says
what stands already changes nothing, so that a list can be imported twice. Pure: ids and time are handed in. Must not know:
files and their columns (`sheet`), SQL, who may import.
"""

from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from server_stub import rulebook
from server_stub.records import Approval, Change, Record
from server_stub.rulebook import Actor, Ruled

Outcome = Literal["new", "changed", "same", "refused"]


class Row(Struct, kw_only=True, forbid_unknown_fields=True):
    """One approval of a list. `since` 0: as it is, or from now on. `state`: also "lost" (the medium is)."""

    key: str
    id: str = ""
    owner: str = ""
    department: str = ""
    approver: str = ""
    requester: str = ""
    purpose: str = ""
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    once: bool = False
    since: int = 0
    until: int | None = None
    state: Literal["requested", "approved", "denied", "revoked", "lost"] = "approved"
    reason: str = ""


class Told(Struct):
    """What became of a row. `fields` that changed; `column` and `why` of a refusal."""

    outcome: Outcome
    fields: list[str] = []
    column: str = ""
    why: str = ""


_COMPARED = (
    "owner",
    "department",
    "approver",
    "requester",
    "purpose",
    "machines",
    "dirs",
    "read_only",
    "once",
    "until",
    "state",
)


def about(record: Record, row: Row) -> Approval | None:
    """The approval that a row is about: of its id, else the newest for the same machines, directories and kind of pass."""
    for each in record.approvals:
        if row.id and each.id == row.id:
            return each
    same = [each for each in record.approvals if _scope(each) == _scope(row)]
    return same[-1] if same else None


def _scope(each: Approval | Row) -> tuple[frozenset[str], frozenset[str], bool]:
    return frozenset(each.machines), frozenset(each.dirs), each.once


def judge(record: Record, row: Row, actor: Actor, now_ms: int, new_id: Callable[[], str]) -> tuple[Told, Change | None]:
    """What a row does to its medium's record: nothing, a `Change`, or a refusal."""
    try:
        rulebook.valid_key(row.key)
        return _judged(record, row, actor, now_ms, new_id)
    except Ruled as refused:
        column, _, why = refused.why.partition(": ")
        return (Told("refused", [], column, why) if column.isidentifier() else Told("refused", [], "", refused.why)), None


def _judged(record: Record, row: Row, actor: Actor, now_ms: int, new_id: Callable[[], str]) -> tuple[Told, Change | None]:
    held = about(record, row)
    if row.state == "lost":
        if record.lost is not None:
            return Told("same"), None
        return Told("changed", ["state"]), rulebook.lost(record, row.reason or "imported as lost", actor, now_ms)
    made = rulebook.entered(held, row, actor, now_ms, new_id())
    before = held or Approval(id="")
    names = [*_COMPARED, "since"] if row.since else list(_COMPARED)
    names += ["reason"] if row.state in ("revoked", "denied") else []
    fields = [name for name in names if getattr(made, name) != getattr(before, name)]
    if held is not None and not fields:
        return Told("same"), None
    if record.lost is not None:
        raise Ruled(409, f"state: the medium was reported lost ({record.lost.reason}); if it was found: media found KEY")
    change = Change(
        record=rulebook.changed(record, made),
        operation="media.import",
        message=f"{actor.name} imported the medium {record.key} into the register",
        before=held,
        after=made,
    )
    return Told("changed" if held else "new", fields), change


def plan(
    records: dict[str, Record], rows: list[Row], actor: Actor, now_ms: int, new_id: Callable[[], str]
) -> tuple[list[Told], list[Change]]:
    """What rows do, one after the other. `records` of their media; it is left as it is."""
    now = dict(records)
    told, changes = [], []
    for row in rows:
        said, change = judge(now.get(row.key) or Record(key=row.key), row, actor, now_ms, new_id)
        told.append(said)
        if change is not None:
            now[row.key] = change.record
            changes.append(change)
    return told, changes


def rows_of(record: Record) -> list[Row]:
    """The rows that say what a record holds: imported, they change nothing."""
    names = [
        each.name for each in msgspec.structs.fields(Approval) if each.name in Row.__struct_fields__ and each.name != "state"
    ]
    rows = []
    for each in record.approvals:
        given = {name: getattr(each, name) for name in names}
        rows.append(Row(key=record.key, state=each.state, **given))
    if record.lost is not None:
        rows.append(Row(key=record.key, state="lost", reason=record.lost.reason))
    return rows
