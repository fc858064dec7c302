"""What was stopped and refused, told as events: the other half of `stopping`, which says what should be.

Question: who was kept from what, and what must a medium put up with now? Owns: the policy in force, what holds for each
medium, and the merging of refused opens (a thousand files tried by a program are a few events). Must not know how a thing is
stopped. A stop or release raises the medium's finding (`medium.unapproved`) and says so in `detail.act`; a refused open is a
`file.written` that was denied, with the protected file that was to be copied, if its opener had one in hand or read one just
before.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agent.contract.codes import HIGH, INFO, LOW, MEDIUM
from agent.contract.event import Event, ProtectedInfo
from agent.core import stopping
from agent.core.facts import Acted, Refused, Unlocked
from agent.core.judging import Judging
from agent.core.media import Media, Medium, Mount, clean_path
from agent.core.ocsf import Attempt, Writer
from agent.core.people import People
from agent.core.places import Places, ProtectedDir, below
from agent.core.reads import Reads
from agent.core.register import Verdict
from agent.core.stopping import EnforcePolicy, Stop

SINGLY, WINDOW_MS = 20, 10_000
"""So many refused opens of one program and medium are told each by itself within a window; the others in one event."""
_LATELY_MS = 60_000
_MOST_KEPT = 1_000


class _Many:
    """Refused opens of one process on one medium within a window."""

    def __init__(self, since_ms: int) -> None:
        self.since_ms = since_ms
        self.paths: dict[str, None] = {}
        self.untold = 0
        self.last: tuple[Refused, Mount] | None = None


class Refusals:
    """Set `policy` and `protect` at will. `stops` is the wish; `acted`, `refused` and `unlocked` take what became of it."""

    def __init__(
        self,
        people: People,
        media: Media,
        places: Places,
        reads: Reads,
        judging: Judging,
        writer: Writer,
        uid: Callable[[], str],
    ) -> None:
        self._people, self._media, self._places, self._reads = people, media, places, reads
        self._judging, self._writer, self._new_uid = judging, writer, uid
        self.policy = EnforcePolicy()
        self.protect: list[ProtectedDir] = []
        self._held: dict[str, list[str]] = {}
        self._many: dict[tuple[int, str], _Many] = {}

    def stops(self, at_ms: int) -> list[Stop]:
        """Which media must be stopped at `at_ms`, all of them."""
        if not self.policy.on or not self._judging.require_approval:
            return []
        return list(stopping.stops(self.policy, self._media, self._judging.register, self.protect, at_ms))

    def held(self, medium: Medium) -> list[str]:
        """What holds of a medium now, as `Acted.did`."""
        return self._held.get(medium.id, [])

    def acted(self, fact: Acted) -> Iterator[Event]:
        """A medium was stopped, further or less so, or released."""
        medium = self._media.present.get(fact.id)
        if medium is None:
            self._held.pop(fact.id, None)
            return
        before = self._held.pop(fact.id, [])
        if fact.did:
            self._held[fact.id] = list(fact.did)
        if before == fact.did and not fact.failed:
            return
        act = "stopped" if fact.did or fact.failed else "released"
        detail: dict[str, Any] = {"act": act, "did": fact.did, "undid": fact.undid}
        detail |= {"targets": [clean_path(each) for each in fact.targets], "failed": [clean_path(each) for each in fact.failed]}
        severity = INFO if act == "released" else MEDIUM
        yield self._told(medium, detail, severity, fact.at_ms)

    def unlocked(self, fact: Unlocked) -> Iterator[Event]:
        """A break-glass code was used: somebody decided past the register, so it is looked at afterwards."""
        detail = {"act": "unlocked", "unlock": fact.id, "until": fact.until_ms, "read_only": fact.read_only}
        for medium in self._media.present.values():
            if medium.key == fact.key:
                yield self._told(medium, detail, HIGH, fact.at_ms)

    def refused(self, fact: Refused) -> Iterator[Event]:
        """An open was refused."""
        fact.path = clean_path(fact.path)
        mount = self._source_for(fact.path, fact.at_ms) if fact.source else self._media.at(fact.path)
        if mount is None:
            return
        at = (fact.pid, mount.medium.id)
        if len(self._many) >= _MOST_KEPT:
            yield from self.due(fact.at_ms + WINDOW_MS)
        many = self._many.get(at)
        if many is None or not 0 <= fact.at_ms - many.since_ms < WINDOW_MS:
            yield from self._rest(at)
            many = self._many[at] = _Many(fact.at_ms)
        if fact.path in many.paths:
            return
        many.paths[fact.path] = None
        if len(many.paths) <= SINGLY:
            yield self._refusal(fact, mount, 1)
        else:
            many.untold, many.last = many.untold + 1, (fact, mount)
            if len(many.paths) > 10 * SINGLY:
                del many.paths[next(iter(many.paths))]

    def due(self, at_ms: int) -> Iterator[Event]:
        """What was merged and can be told by now."""
        for at in [at for at, many in self._many.items() if not 0 <= at_ms - many.since_ms < WINDOW_MS]:
            yield from self._rest(at)

    def _rest(self, at: tuple[int, str]) -> Iterator[Event]:
        many = self._many.pop(at, None)
        if many is not None and many.last is not None:
            yield self._refusal(*many.last, many.untold)

    def _told(self, medium: Medium, detail: dict[str, Any], severity: int, at_ms: int) -> Event:
        mounts = self._media.of(medium)
        verdict = self._judging.decide(medium, at_ms)
        uid, known = self._judging.unapproved.incident(medium, self._new_uid)
        shown = {key: value for key, value in detail.items() if value != [] and value is not False}
        return self._writer.stopped(medium, mounts[0] if mounts else None, verdict, uid, known, shown, severity, at_ms)

    def _refusal(self, fact: Refused, mount: Mount, count: int) -> Event:
        entry = self._people.who(fact.pid)
        source, sure = (fact.path, 1.0) if fact.source else self._in_hand(fact)
        protected = None
        if source and (root := self._root(source)) is not None:
            protected = ProtectedInfo(path=root.path, label=root.label, rel=below(root.path, source))
        verdict = self._verdict(mount.medium, protected, fact.at_ms)
        severity = MEDIUM if protected is not None else LOW
        attempt = Attempt("" if fact.source else fact.path, source, sure, fact.pid, fact.at_ms, count)
        return self._writer.refused(attempt, mount, protected, entry, verdict, severity, self._judging.record_names)

    def _verdict(self, medium: Medium, protected: ProtectedInfo | None, at_ms: int) -> Verdict:
        dirs = (protected.path, protected.label) if protected is not None else ()
        return self._judging.register.decide(medium.key, at_ms, dirs, True)

    def _in_hand(self, fact: Refused) -> tuple[str, float]:
        """The protected file that its opener has open, or else opened last; and how sure it is that it was to be copied."""
        entry = self._people.who(fact.pid)
        for file in entry.files if entry is not None else ():
            if self._places.is_protected(file.path):
                return file.path, 1.0
        of = self._reads.of(fact.pid)
        read = next(reversed(of.fresh), None) if of is not None else None
        if read is not None and 0 <= fact.at_ms - read.last_ms <= _LATELY_MS:
            return read.path, 0.7
        return "", 0.0

    def _root(self, path: str) -> ProtectedDir | None:
        return self._places.of(path)[0]

    def _source_for(self, path: str, at_ms: int) -> Mount | None:
        """The medium for whose sake a protected file may not be read just now."""
        root = self._root(path)
        stops: Iterable[Stop] = self.stops(at_ms) if root is not None else ()
        for stop in stops:
            if root is not None and root.path in stop.roots and (mounts := self._media.of(stop.medium)):
                return mounts[0]
        return None
