"""What left, and what is plugged in, told as events and judged: approved or not, over a limit or not, whom it concerns.

Question: what is said of an arrival or a medium, and is it a finding? Owns: the register, the limits and the memory of
findings, and the order in which they are asked for one file. Must not know how a join was graded, the shape of events
(`ocsf`), or the severities and rules themselves (`policy`). From `pipeline` (arrivals, media) to `ocsf`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Raw

from agent.contract.codes import CODES, LOW, MEDIUM
from agent.contract.event import Event, ProtectedInfo
from agent.contract.form import AnyEvent
from agent.core.grading import Left
from agent.core.inbound import Brought
from agent.core.joins import Arrival
from agent.core.limits import Limits
from agent.core.media import Media, Medium, Mount
from agent.core.ocsf import Writer
from agent.core.people import Entry, People
from agent.core.places import Places, ProtectedDir, below
from agent.core.policy import (
    Raise,
    StagedOut,
    Unapproved,
    attached_severity,
    brought_in_severity,
    copied_out_severity,
    staged_severity,
)
from agent.core.reads import ReadStaged
from agent.core.register import MediaRegister, Verdict
from agent.core.staging import Copy
from agent.core.ways import Departure


class Judging:
    """`left` for each source that left, `attached` and `review` for media. Set `require_approval`, `record_names` at will."""

    def __init__(
        self, people: People, media: Media, places: Places, register: MediaRegister, writer: Writer, new_uid: Callable[[], str]
    ) -> None:
        self._people, self._media, self._places, self._writer, self._new_uid = people, media, places, writer, new_uid
        self.register, self.limits, self.unapproved = register, Limits([]), Unapproved()
        self.require_approval, self.record_names = True, False
        self.ways_severity = MEDIUM
        self._attached: dict[str, Event] = {}
        self._staged_out = StagedOut()

    def decide(self, medium: Medium, at_ms: int) -> Verdict:
        """What the register says of a medium."""
        return self.register.decide(medium.key, at_ms)

    def left(self, arrival: Arrival | Departure | Brought, left: Left | None, events: list[AnyEvent]) -> None:
        """One source that left, or one unprotected file that was written: decide, tell, count, judge. Adds to `events`."""
        if not isinstance(arrival, Arrival):
            if isinstance(arrival, Brought):
                events.append(self._brought(arrival))
            elif left is not None:
                self._sent(arrival, left, events)
            return
        mount, entry = arrival.mount, self._people.who(arrival.pid)
        far = mount.way == "network"
        if left is None:
            if far:
                return  # what else people keep on a server is no concern of ours
            verdict = self.register.decide(mount.medium.key, arrival.at_ms, (), True)
            events.append(self._writer.written(arrival, entry, verdict, self.record_names))
            return
        read = left.read
        at = read.root
        root = self._places.root(at) or ProtectedDir(path=at, label=at)
        verdict = self.register.decide(mount.medium.key, arrival.at_ms, (root.path, root.label), True)
        severity = self.ways_severity if far else copied_out_severity(verdict.decision, self.require_approval)
        event = self._writer.copied_out(arrival, left, root, entry, verdict, severity)
        events.append(event)
        uid = event.uid
        if self.require_approval and arrival.pid >= 0 and not far:
            due = self.unapproved.copied_onto(mount.medium, verdict.decision, uid, self._new_uid)
            if due is not None:
                events.append(self._finding(due, mount.medium, mount, verdict, event, arrival.at_ms))
        self._count(entry, arrival.at_ms, left, event, mount.way, events)

    def staged(self, copy: Copy) -> Iterator[AnyEvent]:
        """A copy of protected content was made elsewhere: one event a source."""
        entry = self._people.who(copy.written.pid)
        for left in copy.left:
            at = left.read.root
            root = self._places.root(at) or ProtectedDir(path=at, label=at)
            yield self._writer.staged(copy.written, left, root, entry)

    def _brought(self, brought: Brought) -> AnyEvent:
        """A file that came from a medium: onto the machine, or to be run from there."""
        verdict = self.decide(brought.mount.medium, brought.at_ms)
        severity = brought_in_severity(verdict.decision, self.require_approval, brought.program, brought.how)
        root = self._places.of(brought.path)[0] if brought.path else None
        protected = None
        if root is not None:
            protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, brought.path))
        entry = self._people.who(brought.pid)
        return self._writer.brought_in(brought, entry, verdict, severity, protected, self.record_names)

    def _sent(self, departure: Departure, left: Left, events: list[AnyEvent]) -> None:
        """One source that left by a way that is no mount; onto a device that is a medium, the register is asked as well."""
        entry, at_ms = self._people.who(left.pid), departure.at_ms
        path, at = left.read.path, left.read.root
        root = self._places.root(at) or ProtectedDir(path=at, label=at)
        protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, path))
        medium = self._media.present.get(departure.device)
        verdict, severity = None, self.ways_severity
        if medium is not None:
            verdict = self.register.decide(medium.key, at_ms, (root.path, root.label), True)
            severity = copied_out_severity(verdict.decision, self.require_approval)
        if left.link == "time":
            severity = min(severity, LOW)
        event = self._writer.sent_out(departure, left, protected, entry, medium, verdict, severity)
        events.append(event)
        if medium is not None and verdict is not None and self.require_approval and left.link != "time":
            due = self.unapproved.copied_onto(medium, verdict.decision, event.metadata.uid, self._new_uid)
            if due is not None:
                events.append(self._finding(due, medium, None, verdict, event, at_ms))
        self._count(entry, at_ms, left, event, departure.way, events)

    def _count(self, entry: Entry | None, at_ms: int, left: Left, event: AnyEvent, way: str, events: list[AnyEvent]) -> None:
        """Add to what this person carried out; a limit that is passed is a finding."""
        person = "unknown"
        if entry is not None:
            person = f"login:{entry.login_uid}" if entry.login_uid is not None else f"uid:{entry.process.uid}"
        read, said = left.read, event.unmapped.sekisho
        if isinstance(read, ReadStaged) and left.link != "time":
            where = (bytes(said.medium) if isinstance(said.medium, Raw) else b"").decode()
            where = where or f"{way} {said.dest.peer if said.dest else ''}"
            if self._staged_out.news(person, where, at_ms):
                events.append(self._writer.staged_out(event, read.told, staged_severity(event.severity_id), at_ms))
        for passed in self.limits.add(person, at_ms, left.bytes or 0, left.read.path, event.uid, way):
            events.append(self._writer.limit_passed(passed, event, at_ms))

    def attached(self, medium: Medium, at_ms: int, cold: bool, story: dict[str, Any]) -> Event:
        """A medium was plugged in. `story`: what else is known of it, fields of `event.MediumInfo`."""
        self.register.plugged(medium.key, at_ms)
        verdict = self.decide(medium, at_ms)
        severity = attached_severity(verdict.decision, self.require_approval)
        event = self._writer.attached(medium, verdict, severity, self._people.session, at_ms, cold, story)
        self._attached[medium.id] = event
        return event

    def detached(self, medium: Medium, at_ms: int, story: dict[str, Any]) -> Event:
        """It is gone; the next time it is a new incident."""
        self.unapproved.gone(medium)
        self._attached.pop(medium.id, None)
        event = self._writer.detached(medium, self.decide(medium, at_ms), self._people.session, at_ms, story)
        self.register.unplugged(medium.key)
        return event

    def review(self, medium: Medium, at_ms: int) -> Iterator[Event]:
        """Whether a medium that is there is a finding (now: it was plugged in, the register changed, an approval ended)."""
        attached = self._attached.get(medium.id)
        if not self.require_approval or attached is None:
            return
        self.register.plugged(medium.key, at_ms)
        mounts, verdict = self._media.of(medium), self.decide(medium, at_ms)
        uid, lost = attached.metadata.uid, verdict.reason == "lost"
        due = self.unapproved.judge(medium, verdict.decision, uid, bool(mounts), self._new_uid, lost=lost)
        if due is not None:
            yield self._finding(due, medium, mounts[0] if mounts else None, verdict, attached, at_ms)

    def _finding(self, due: Raise, medium: Medium, mount: Mount | None, verdict: Verdict, by: AnyEvent, at_ms: int) -> Event:
        types = [CODES["medium.attached"].type_uid] * (len(due.events) - 1) + [by.type_uid]
        return self._writer.unapproved(due, medium, mount, verdict, by, types, at_ms)
