"""medium × approvals × time × machine → decision and reason.

Question: was this medium allowed here, now, for this directory? Owns: the register as the collector last gave it (it outlives
restarts within the core's state), the one-time passes used up here, the break-glass codes in force, and the order of its
reasons. Must not know where the register comes from, how a code was checked, nor what a decision leads to. Of several approvals
for one key the best one counts: approved before expired before revoked; but a medium reported lost is lost.

A one-time pass is used up by the first plugging in: `plugged` takes it, `unplugged` ends it. How approvals are kept is in
`approvals`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from msgspec import Struct

from agent.contract.codes import Decision
from agent.contract.unlock import SKEW_MS
from agent.core.approvals import Approvals, Entry, packed
from agent.core.facts import Approval, Register, Unlocked
from agent.core.media import clean, clean_path

REASONS = {
    "approved": "an approval covers medium, machine, directory and time",
    "unlocked": "a break-glass code covers medium, machine and time",
    "not_registered": "no approval names this medium",
    "expired": "the approval ended",
    "not_yet_valid": "the approval begins later",
    "revoked": "the approval was taken back",
    "lost": "the medium was reported lost",
    "pass_used": "the approval was for one plugging in, and that is over",
    "other_machine": "the approval is for other machines",
    "other_directory": "the approval is for other protected directories",
    "read_only_approval": "the approval is for reading only",
    "no_register": "this agent never had a register",
}
"""Stable codes (`medium.decision_reason`), each with what it means."""

_DECISIONS: dict[str, Decision] = {
    "approved": "approved",
    "unlocked": "approved",
    "expired": "expired",
    "pass_used": "expired",
    "not_yet_valid": "unapproved",
    "revoked": "revoked",
    "lost": "revoked",
    "no_register": "unknown",
}
_BEST_FIRST = (
    "lost",
    "approved",
    "unlocked",
    "read_only_approval",
    "other_directory",
    "other_machine",
    "not_yet_valid",
    "pass_used",
    "expired",
    "revoked",
)
_STALE_STEP_S = 3600
_MAX_UNLOCKS = 100
_FOR_EVER_MS = 1 << 53


class Verdict(NamedTuple):
    """The decision on a medium, its stable reason, and the id of the approval (or code) it rests on ("" if none).

    `stale_s`: how long ago the collector last said that the register is in force, in whole hours; 0 within an hour.
    """

    decision: Decision
    reason: str
    approval: str
    stale_s: int = 0


class _Code(Struct, array_like=True):
    """A break-glass code in force."""

    key: str
    until_ms: int
    read_only: bool


class _Kept(Struct):
    version: int | None
    entries: bytes
    confirmed_ms: int = 0
    in_use: dict[str, str] = {}
    spent: set[str] = set()
    codes: dict[str, _Code] = {}
    codes_used: dict[str, int] = {}
    seen_ms: int = 0


class MediaRegister:
    """The approvals in force. `machine_names` are the agent id and the machine's name."""

    def __init__(self, *machine_names: str) -> None:
        self._machine = frozenset(name for name in machine_names if name)
        self.version: int | None = None
        self.confirmed_ms = 0
        self._approvals = Approvals()
        self._in_use: dict[str, str] = {}
        self._spent: set[str] = set()
        self._codes: dict[str, _Code] = {}
        self.unlocks_used: dict[str, int] = {}
        """Ids of break-glass codes that were used here, each with its end (ms)."""
        self._seen_ms = 0
        self.changed = False
        """There is something new to keep."""

    def replace(self, fact: Register) -> bool:
        """Take a register; one that is older than what is held is not taken. True if it was."""
        if self.version is not None and fact.version < self.version:
            return False
        self.version = fact.version
        self.confirmed(fact.confirmed_ms)
        groups = {name for name, members in fact.groups.items() if self._machine.intersection(members)}
        mine = self._machine | {f"@{name}" for name in groups}
        self._approvals = Approvals(packed(self._entry(each, mine) for each in fact.approvals))
        passes = {clean(each.id) for each in fact.approvals if each.once}
        self._spent &= passes
        self._in_use = {id: key for id, key in self._in_use.items() if id in passes}
        return True

    def confirmed(self, at_ms: int) -> None:
        """The collector said at `at_ms` that what is held is in force."""
        self.confirmed_ms = max(self.confirmed_ms, at_ms)

    def _entry(self, told: Approval, mine: frozenset[str]) -> Entry:
        return Entry(
            id=clean(told.id),
            key=clean(told.key),
            since_ms=min(max(told.since_ms, 0), _FOR_EVER_MS),
            until_ms=None if told.until_ms is None else min(max(told.until_ms, 0), _FOR_EVER_MS),
            here=not told.machines or not mine.isdisjoint(told.machines),
            read_only=told.read_only,
            revoked=told.revoked,
            lost=told.lost,
            once=told.once,
            used_by=told.used_by,
            dirs=tuple(clean_path(each).rstrip("/") or "/" for each in told.dirs),
        )

    # -- decisions -----------------------------------------------------------------------------------------------------

    def decide(self, key: str, at_ms: int, dirs: tuple[str, ...] = (), writing: bool = False) -> Verdict:
        """What holds for medium `key` at `at_ms`. `dirs`: path and label of the protected directory that is copied from;
        `writing`: something is written to it, which a read-only approval does not cover."""
        judged = [(self._judge(entry, at_ms, dirs, writing), entry.id) for entry in self._approvals.of(key)]
        if self._codes:
            judged += self._unlocked(key, at_ms, writing)
        if not judged:
            if self.version is None:
                return Verdict("unknown", "no_register", "")
            return Verdict("unapproved", "not_registered", "", self._stale_s(at_ms))
        reason, by = judged[0] if len(judged) == 1 else min(judged, key=lambda pair: _BEST_FIRST.index(pair[0]))
        return Verdict(_DECISIONS.get(reason, "unapproved"), reason, by, self._stale_s(at_ms))

    def _judge(self, entry: Entry, at_ms: int, dirs: tuple[str, ...], writing: bool) -> str:
        if entry.lost:
            return "lost"
        if entry.revoked:
            return "revoked"
        if not entry.here:
            return "other_machine"
        if entry.until_ms is not None and at_ms >= entry.until_ms:
            return "expired"
        if at_ms < entry.since_ms:
            return "not_yet_valid"
        if entry.once and entry.id not in self._in_use and (entry.used_by or entry.id in self._spent):
            return "pass_used"
        if entry.dirs and dirs and not set(dirs).intersection(entry.dirs):
            return "other_directory"
        if entry.read_only and writing:
            return "read_only_approval"
        return "approved"

    def _unlocked(self, key: str, at_ms: int, writing: bool) -> Iterator[tuple[str, str]]:
        for id, code in self._codes.items():
            if code.key == key and at_ms < code.until_ms:
                yield "read_only_approval" if code.read_only and writing else "unlocked", id

    def _stale_s(self, at_ms: int) -> int:
        age_s = (at_ms - self.confirmed_ms) // 1000 if self.confirmed_ms else 0
        return max(age_s // _STALE_STEP_S * _STALE_STEP_S, 0)

    # -- one-time passes -----------------------------------------------------------------------------------------------

    def plugged(self, key: str, at_ms: int) -> bool:
        """A medium is there: a one-time pass that covers it is taken for as long as it stays. True if one was."""
        before = len(self._in_use)
        for entry in self._approvals.of(key):
            if entry.once and self._judge(entry, at_ms, (), False) == "approved":
                self._in_use[entry.id] = key
        self.changed = self.changed or len(self._in_use) > before
        return len(self._in_use) > before

    def unplugged(self, key: str) -> bool:
        """It is gone: the passes that it was there with are used up. True if there were any."""
        gone = {id for id, of in self._in_use.items() if of == key}
        self._spent |= gone
        for id in gone:
            del self._in_use[id]
        self.changed = self.changed or bool(gone)
        return bool(gone)

    # -- break-glass codes ---------------------------------------------------------------------------------------------

    def unlock(self, fact: Unlocked) -> None:
        """A code was taken; it holds from now on, and is never taken again (`unlocks_used`)."""
        held = {id: until for id, until in self.unlocks_used.items() if until + SKEW_MS > fact.at_ms}
        self.unlocks_used = held | {fact.id: fact.until_ms}
        self._codes[fact.id] = _Code(clean(fact.key), fact.until_ms, fact.read_only)
        while len(self._codes) > _MAX_UNLOCKS:
            del self._codes[next(iter(self._codes))]
        self.passed(fact.at_ms)

    def passed(self, at_ms: int) -> None:
        """Time passes. Where the clock was set back, also while the agent was down, codes end by as much earlier."""
        if self._codes and 0 < at_ms < self._seen_ms:
            for code in self._codes.values():
                code.until_ms -= self._seen_ms - at_ms
        self._seen_ms = at_ms

    # -- over a restart ------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """What is kept over a restart; empty if there is nothing."""
        if self.version is None and not self.unlocks_used:
            return b""
        kept = _Kept(
            version=self.version,
            entries=self._approvals.blob,
            confirmed_ms=self.confirmed_ms,
            in_use=self._in_use,
            spent=self._spent,
            codes=self._codes,
            codes_used=self.unlocks_used,
            seen_ms=self._seen_ms,
        )
        return msgspec.msgpack.encode(kept)

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if not data:
            return
        kept = msgspec.msgpack.decode(data, type=_Kept)
        self._approvals = Approvals(kept.entries)
        self.version, self.confirmed_ms, self._seen_ms = kept.version, kept.confirmed_ms, kept.seen_ms
        self._in_use, self._spent, self._codes, self.unlocks_used = kept.in_use, kept.spent, kept.codes, kept.codes_used
