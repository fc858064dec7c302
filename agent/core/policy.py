"""Is it a finding, how severe, on which evidence?

Question: who must be told? Owns: severities of events, when a medium without approval becomes a finding, and that there is
one finding per incident: once per medium that is plugged in, raised once when protected bytes reach it. Must not know OCSF
or how limits count. Pure judgement; its only memory is which media were told already (kept over a restart, so that a
medium which stays plugged in is not told anew each time).
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from msgspec import Struct

from agent.contract.codes import HIGH, INFO, LOW, MEDIUM, Decision
from agent.core.media import Medium

AT_ATTACH = frozenset({"storage", "phone"})
"""Kinds that are a finding as soon as they are plugged in without approval."""
AT_MOUNT = AT_ATTACH | {"optical", "reader"}
"""Kinds that are one once they hold something: an empty drive or card reader carries nothing."""
BAD = frozenset({"unapproved", "expired", "revoked"})
_MOST_TOLD = 500
STAGED_TOGETHER_MS = 600_000
"""Staged copies that leave within this time of each other, by one person and to one place, are one finding."""
NewUid = Callable[[], str]


class Told(Struct, array_like=True):
    """A finding that was made for a medium which is still plugged in."""

    finding_uid: str
    attached_uid: str
    raised: bool = False


class Raise(NamedTuple):
    """A finding `medium.unapproved` is due. `update`: it raises an earlier one, whose `finding_uid` it keeps."""

    finding_uid: str
    severity: int
    events: list[str]
    update: bool


def copied_out_severity(decision: Decision, require_approval: bool) -> int:
    """Severity of `file.copied_out` onto a medium with this decision."""
    if decision == "approved" or not require_approval:
        return LOW
    return MEDIUM if decision == "unknown" else HIGH


def brought_in_severity(decision: Decision, require_approval: bool, program: bool, how: str) -> int:
    """Severity of `file.brought_in`. `program`: it can be run; one that was run from a medium nobody approved is worst."""
    if not require_approval or decision == "approved":
        return INFO
    if how in ("executed", "script"):
        return HIGH if decision in BAD else MEDIUM
    if program:
        return MEDIUM if decision in BAD else LOW
    return LOW if decision in BAD else INFO


def attached_severity(decision: Decision, require_approval: bool) -> int:
    """Severity of `medium.attached`."""
    return LOW if decision == "approved" or (require_approval and decision in BAD) else INFO


def staged_severity(copied_out: int) -> int:
    """Severity of `copy.staged`, by that of the `file.copied_out` it rests on: a detour is worse than the way it took."""
    return HIGH if copied_out >= MEDIUM else MEDIUM


class StagedOut:
    """Which detours were told: copies that one person takes to one place, one after the other, are one finding."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], int] = {}

    def news(self, person: str, where: str, at_ms: int) -> bool:
        """Whether a staged copy that left now is a finding of its own, and not one more of those just told."""
        before = self._told.pop((person, where), None)
        self._told[(person, where)] = at_ms
        if len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        return before is None or not 0 <= at_ms - before <= STAGED_TOGETHER_MS


class Unapproved:
    """Which media were told as unapproved. `changed` tells that there is something new to keep."""

    def __init__(self) -> None:
        self._told: dict[str, Told] = {}
        self.changed = False

    def judge(
        self, medium: Medium, decision: Decision, attached_uid: str, mounted: bool, new_uid: NewUid, *, lost: bool = False
    ) -> Raise | None:
        """A medium is there with this decision. A finding unless it was made before for this plugging in; one that was reported
        lost and turns up again is HIGH at once, whatever its kind, and raises one that was made before."""
        before = self._told.get(_at(medium))
        if lost and (before is None or not before.raised):
            told = self._told[_at(medium)] = before or Told(new_uid(), attached_uid)
            told.raised = self.changed = True
            return Raise(told.finding_uid, HIGH, [attached_uid] if attached_uid else [], before is not None)
        kinds = AT_MOUNT if mounted else AT_ATTACH
        if decision not in BAD or medium.kind not in kinds or before is not None:
            return None
        told = self._told[_at(medium)] = Told(new_uid(), attached_uid)
        if len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        self.changed = True
        return Raise(told.finding_uid, MEDIUM, [attached_uid] if attached_uid else [], False)

    def copied_onto(self, medium: Medium, decision: Decision, event_uid: str, new_uid: NewUid) -> Raise | None:
        """Protected bytes reached a medium: the finding is raised to HIGH, once."""
        if decision not in BAD:
            return None
        told = self._told.get(_at(medium))
        if told is not None and told.raised:
            return None
        before = told is not None
        told = told or Told(new_uid(), "")
        told.raised = True
        self._told[_at(medium)] = told
        self.changed = True
        return Raise(told.finding_uid, HIGH, [uid for uid in (told.attached_uid, event_uid) if uid], before)

    def incident(self, medium: Medium, new_uid: NewUid) -> tuple[str, bool]:
        """The finding that stands for this plugging in, and whether it was told before; from now on it was."""
        told = self._told.get(_at(medium))
        if told is not None:
            return told.finding_uid, True
        told = self._told[_at(medium)] = Told(new_uid(), "")
        self.changed = True
        return told.finding_uid, False

    def gone(self, medium: Medium) -> None:
        """The medium was pulled: the next time it is a new incident."""
        if self._told.pop(_at(medium), None) is not None:
            self.changed = True

    def to_bytes(self) -> bytes:
        """What is kept over a restart."""
        return msgspec.msgpack.encode(self._told)

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        self._told = msgspec.msgpack.decode(data, type=dict[str, Told])


def _at(medium: Medium) -> str:
    """A medium at its place: another one may be in the same port after a restart."""
    return f"{medium.id}|{medium.key}"
