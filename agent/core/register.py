"""medium × approvals × time × machine → decision and reason.

Question: was this medium allowed here, now, for this directory? Owns: the register as the collector last gave it (it outlives
restarts within the core's state) and the order of its reasons. Must not know where the register comes from, nor what a
decision leads to. Of several approvals for one key the best one counts: approved before expired before revoked.
"""

from typing import NamedTuple

import msgspec
from msgspec import Struct

from agent.contract.codes import Decision
from agent.core.facts import Approval, Register
from agent.core.media import clean, clean_path

REASONS = {
    "approved": "an approval covers medium, machine, directory and time",
    "not_registered": "no approval names this medium",
    "expired": "the approval ended",
    "not_yet_valid": "the approval begins later",
    "revoked": "the approval was taken back",
    "other_machine": "the approval is for other machines",
    "other_directory": "the approval is for other protected directories",
    "read_only_approval": "the approval is for reading only",
    "no_register": "this agent never had a register",
}
"""Stable codes (`medium.decision_reason`), each with what it means."""

_DECISIONS: dict[str, Decision] = {
    "approved": "approved",
    "expired": "expired",
    "not_yet_valid": "unapproved",
    "revoked": "revoked",
    "no_register": "unknown",
}
_BEST_FIRST = (
    "approved",
    "read_only_approval",
    "other_directory",
    "other_machine",
    "not_yet_valid",
    "expired",
    "revoked",
)


class Verdict(NamedTuple):
    """The decision on a medium, its stable reason, and the id of the approval it rests on ("" if none)."""

    decision: Decision
    reason: str
    approval: str


class _Kept(Struct):
    version: int
    approvals: list[Approval]


class MediaRegister:
    """The approvals in force. `machine_names` are the agent id and the machine's name."""

    def __init__(self, *machine_names: str) -> None:
        self._machine = frozenset(name for name in machine_names if name)
        self.version: int | None = None
        self._approvals: dict[str, list[Approval]] = {}

    def replace(self, fact: Register) -> bool:
        """Take a newer register; an older one is not taken. True if it changed anything."""
        if self.version is not None and fact.version <= self.version:
            return False
        self._take(fact.version, fact.approvals)
        return True

    def decide(self, key: str, at_ms: int, dirs: tuple[str, ...] = (), writing: bool = False) -> Verdict:
        """What holds for medium `key` at `at_ms`. `dirs`: path and label of the protected directory that is copied from;
        `writing`: something is written to it, which a read-only approval does not cover."""
        if self.version is None:
            return Verdict("unknown", "no_register", "")
        entries = self._approvals.get(key)
        if not entries:
            return Verdict("unapproved", "not_registered", "")
        judged = [(self._judge(entry, at_ms, dirs, writing), entry) for entry in entries]
        reason, entry = min(judged, key=lambda pair: _BEST_FIRST.index(pair[0]))
        return Verdict(_DECISIONS.get(reason, "unapproved"), reason, entry.id)

    def _judge(self, entry: Approval, at_ms: int, dirs: tuple[str, ...], writing: bool) -> str:
        if entry.revoked:
            return "revoked"
        if entry.machines and not self._machine.intersection(entry.machines):
            return "other_machine"
        if entry.until_ms is not None and at_ms >= entry.until_ms:
            return "expired"
        if at_ms < entry.since_ms:
            return "not_yet_valid"
        if entry.dirs and dirs and not set(dirs).intersection(entry.dirs):
            return "other_directory"
        if entry.read_only and writing:
            return "read_only_approval"
        return "approved"

    def _take(self, version: int, approvals: list[Approval]) -> None:
        self.version = version
        self._approvals = {}
        for entry in approvals:
            kept = Approval(
                id=clean(entry.id),
                key=clean(entry.key),
                since_ms=entry.since_ms,
                until_ms=entry.until_ms,
                machines=[clean(each) for each in entry.machines],
                dirs=[clean_path(each).rstrip("/") or "/" for each in entry.dirs],
                read_only=entry.read_only,
                revoked=entry.revoked,
            )
            self._approvals.setdefault(kept.key, []).append(kept)

    def to_bytes(self) -> bytes:
        """The register as it is kept over a restart; empty if there never was one."""
        if self.version is None:
            return b""
        return msgspec.msgpack.encode(_Kept(self.version, [each for many in self._approvals.values() for each in many]))

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if data:
            kept = msgspec.msgpack.decode(data, type=_Kept)
            self._take(kept.version, kept.approvals)
