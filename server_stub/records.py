"""The record of a medium in the register: all its approvals and requests, as kept, as agents get it, and the state of each.

Owns: those shapes, and what state time and use make of what is stored. Pure: the time is handed in. Must not know: which act is
allowed (`rulebook`), SQL, HTTP, signatures.
"""

import unicodedata
from typing import Literal

import msgspec
from msgspec import Struct

from agent.contract.wire import ApprovalEntry

State = Literal["requested", "approved", "denied", "revoked"]
STATES = ("requested", "approved", "expiring", "expired", "used", "denied", "revoked", "lost")
"""What `state_of` can say, which is more than is stored: time and use make the rest."""


class Approval(Struct, omit_defaults=True, kw_only=True):
    """One approval of a medium, or a request for one. Times in ms; `until` absent: no end; `machines`, `dirs` empty: all.

    `approver` decided, `recorded_by` entered it where that was somebody else. `told`: which end was put on record ("expiring",
    "expired"). `used_by`: the agent that a one-time pass (`once`) was used on.
    """

    id: str
    state: State = "approved"
    owner: str = ""
    department: str = ""
    approver: str = ""
    recorded_by: str = ""
    requester: str = ""
    purpose: str = ""
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    once: bool = False
    since: int = 0
    until: int | None = None
    reason: str = ""
    asked_at: int = 0
    decided_at: int = 0
    used_by: str = ""
    used_at: int = 0
    told: str = ""


class Lost(Struct):
    """A medium was reported lost."""

    at: int
    by: str
    reason: str


class Record(Struct, omit_defaults=True, kw_only=True):
    """All that the register holds of one medium. `revision` grows with each change of it."""

    key: str
    revision: int = 0
    approvals: list[Approval] = []
    lost: Lost | None = None


class Change(Struct, kw_only=True):
    """What an act did: the record afterwards, the approval before and after (None: there was, or is, none)."""

    record: Record
    operation: str
    message: str
    before: Approval | None = None
    after: Approval | None = None


class Wish(Struct, kw_only=True):
    """What is asked for or approved, as somebody filled it in. None: as it is (of a request), or the default."""

    owner: str | None = None
    department: str | None = None
    purpose: str | None = None
    machines: list[str] | None = None
    dirs: list[str] | None = None
    read_only: bool | None = None
    once: bool | None = None
    since: int | None = None
    until: int | None = None
    requester: str = ""
    approver: str = ""


# -- reading ---------------------------------------------------------------------------------------------------------------


def read_record(key: str, text: str) -> Record:
    """A record as it is kept; the plain entry that earlier versions kept is one, too."""
    kept = msgspec.json.decode(text)
    if "id" not in kept:
        return msgspec.convert(kept, Record)
    entry = msgspec.convert(kept, ApprovalEntry)
    given = {name: getattr(entry, name) for name in ("id", "owner", "approver", "purpose", "machines", "dirs", "read_only")}
    state: State = "revoked" if entry.revoked else "approved"
    return Record(
        key=key, approvals=[Approval(**given, since=entry.since, until=entry.until, reason=entry.reason, state=state)]
    )


def state_of(record: Record, approval: Approval, now_ms: int, warn_ms: int) -> str:
    """One of STATES, as of now; `warn_ms` before its end an approval is expiring."""
    if approval.state in ("denied", "revoked", "requested"):
        return approval.state if record.lost is None or approval.state == "denied" else "lost"
    if record.lost is not None:
        return "lost"
    if approval.used_by:
        return "used"
    if approval.until is None:
        return "approved"
    return "expired" if now_ms >= approval.until else "expiring" if now_ms >= approval.until - warn_ms else "approved"


def entries(record: Record) -> list[ApprovalEntry]:
    """What agents are told of a medium: approvals, what was revoked, and that it is lost; no requests."""
    told = [each for each in record.approvals if each.state in ("approved", "revoked")]
    lost = record.lost
    made = [
        ApprovalEntry(
            id=each.id,
            key=record.key,
            owner=each.owner,
            approver=each.approver,
            purpose=each.purpose,
            since=each.since,
            until=each.until,
            machines=each.machines,
            dirs=each.dirs,
            read_only=each.read_only,
            revoked=each.state == "revoked" or lost is not None,
            reason=lost.reason if lost else each.reason,
            lost=lost is not None,
            once=each.once,
            used_by=each.used_by,
        )
        for each in told
    ]
    if lost and not made:
        made = [ApprovalEntry(id=f"lost-{lost.at}", key=record.key, revoked=True, lost=True, reason=lost.reason)]
    return made


def same_person(one: str, other: str) -> bool:
    """Whether two names are one, however they were typed."""
    return bool(one) and _folded(one) == _folded(other)


def _folded(name: str) -> str:
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())
