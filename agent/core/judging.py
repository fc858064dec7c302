"""What left, and what is plugged in, told as events and judged: approved or not, over a limit or not, whom it concerns.

Question: what is said of an arrival or a medium, and is it a finding? Owns: the register, the limits and the memory of
findings, and the order in which they are asked for one file. Must not know how a join was graded, the shape of events
(`ocsf`), or the severities and rules themselves (`policy`). From `pipeline` (arrivals, media) to `ocsf`.
"""

from collections.abc import Callable, Iterator

from agent.contract.codes import CODES
from agent.contract.event import Event, ProtectedInfo
from agent.core.grading import Left
from agent.core.joins import Arrival
from agent.core.limits import Limits
from agent.core.media import Media, Medium, Mount
from agent.core.ocsf import Writer
from agent.core.people import People
from agent.core.places import Places, ProtectedDir, below
from agent.core.policy import Raise, Unapproved, attached_severity, copied_out_severity
from agent.core.register import MediaRegister, Verdict


class Judging:
    """`left` for each source that left, `attached` and `review` for media. Set `require_approval`, `record_names` at will."""

    def __init__(
        self, people: People, media: Media, places: Places, register: MediaRegister, writer: Writer, new_uid: Callable[[], str]
    ) -> None:
        self._people, self._media, self._places, self._writer, self._new_uid = people, media, places, writer, new_uid
        self.register, self.limits, self.unapproved = register, Limits([]), Unapproved()
        self.require_approval, self.record_names = True, False
        self._attached: dict[str, Event] = {}

    def decide(self, medium: Medium, at_ms: int) -> Verdict:
        """What the register says of a medium."""
        return self.register.decide(medium.key, at_ms)

    def left(self, arrival: Arrival, left: Left | None, events: list[Event]) -> None:
        """One source that left, or one unprotected file that was written: decide, tell, count, judge. Adds to `events`."""
        mount, entry = arrival.mount, self._people.who(arrival.pid)
        if left is None:
            verdict = self.register.decide(mount.medium.key, arrival.at_ms, (), True)
            events.append(self._writer.written(arrival, entry, verdict, self.record_names))
            return
        read = left.read
        path, at = read.path, read.root
        root = self._places.root(at) or ProtectedDir(path=at, label=at)
        verdict = self.register.decide(mount.medium.key, arrival.at_ms, (root.path, root.label), True)
        severity = copied_out_severity(verdict.decision, self.require_approval)
        protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, path))
        event = self._writer.copied_out(arrival, left, protected, entry, verdict, severity)
        events.append(event)
        uid = event.metadata.uid
        if self.require_approval and arrival.pid >= 0:
            due = self.unapproved.copied_onto(mount.medium, verdict.decision, uid, self._new_uid)
            if due is not None:
                events.append(self._finding(due, mount.medium, mount, verdict, event, arrival.at_ms))
        person = "unknown"
        if entry is not None:
            person = f"login:{entry.login_uid}" if entry.login_uid is not None else f"uid:{entry.process.uid}"
        for passed in self.limits.add(person, arrival.at_ms, left.bytes or 0, path, uid):
            events.append(self._writer.limit_passed(passed, event, arrival.at_ms))

    def attached(self, medium: Medium, at_ms: int, cold: bool) -> Event:
        """A medium was plugged in."""
        verdict = self.decide(medium, at_ms)
        severity = attached_severity(verdict.decision, self.require_approval)
        event = self._writer.attached(medium, verdict, severity, self._people.session, at_ms, cold)
        self._attached[medium.id] = event
        return event

    def detached(self, medium: Medium, at_ms: int) -> Event:
        """It is gone; the next time it is a new incident."""
        self.unapproved.gone(medium)
        self._attached.pop(medium.id, None)
        return self._writer.detached(medium, self.decide(medium, at_ms), self._people.session, at_ms)

    def review(self, medium: Medium, at_ms: int) -> Iterator[Event]:
        """Whether a medium that is there is a finding (now: it was plugged in, the register changed, an approval ended)."""
        attached = self._attached.get(medium.id)
        if not self.require_approval or attached is None:
            return
        mounts, verdict = self._media.of(medium), self.decide(medium, at_ms)
        due = self.unapproved.judge(medium, verdict.decision, attached.metadata.uid, bool(mounts), self._new_uid)
        if due is not None:
            yield self._finding(due, medium, mounts[0] if mounts else None, verdict, attached, at_ms)

    def _finding(self, due: Raise, medium: Medium, mount: Mount | None, verdict: Verdict, by: Event, at_ms: int) -> Event:
        types = [CODES["medium.attached"].type_uid] * (len(due.events) - 1) + [by.type_uid]
        return self._writer.unapproved(due, medium, mount, verdict, by, types, at_ms)
