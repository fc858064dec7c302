"""Which files on media are being written, and when they have settled, so that it can be said what is in them.

Owns: each destination from its first sight to its arrival, the timetable of what settles when, and what was told of a file
already. Must not know what links a destination to reads and how sure that is (`grading`), nor events, approvals or limits.
From `pipeline` (facts, already told apart by place) to `pipeline` (`Arrival`s).

A plain copy has its source's size: it joins at its close, by name and size. Anything else waits `SETTLE_MS` for the rename
that often follows (rsync, browsers) and for reads that the kernel tells late (it merges a file's write and close into one
record, queued at the first write). Where sizes of sources are wanted, it waits once more until they are told, not longer;
and so it does where only the bytes can tell (`doubts`): those that settled after it then wait for that answer, as what is
found in one file is not offered to the next.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import islice
from typing import NamedTuple

from agent.core.doubts import Doubts
from agent.core.facts import Closed, Compared, FileFact, Lost, OpenFile, Sized
from agent.core.grading import Dest, Grading, Left
from agent.core.media import Mount
from agent.core.people import People
from agent.core.reads import Moment, Read

SETTLE_MS = 300
_FOUND_SETTLE_MS = 1_000
_MOST_OPEN = 20_000
_MOST_RECENT = 4_096
_MOST_READERS = 256
_RECENT_MS = 60_000
_TELL_EVERY_MS = 60_000
_MATTERS_MS = 900_000


class Arrival(NamedTuple):
    """A file is on a medium now. `left` empty: none of it is known to be protected. `pid` 0: written by nobody known."""

    mount: Mount
    path: str
    size: int | None
    pid: int
    at_ms: int
    left: list[Left]
    is_dir: bool = False


class Written(NamedTuple):
    """A file that lies neither in a protected directory nor on a medium was written; `left`: what may be in it."""

    key: bytes
    path: str
    size: int | None
    pid: int
    at_ms: int
    left: list[Left]


Settled = Arrival | Written
Known = tuple[str, str, str]
"""What a file that lies outside is known as: its own path, that of the protected file it comes from, the protected directory"""


class _Recent(NamedTuple):
    size: int | None
    at_ms: int


class Joins:
    """Fed with reads and with what happens on media; yields arrivals, at once or from `due`."""

    def __init__(
        self,
        people: People,
        protected: Callable[[OpenFile], bool],
        known_as: Callable[[OpenFile], Known | None],
        left_behind: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._people, self._known_as = people, known_as
        self._grading = Grading(people, protected, left_behind)
        self._doubts = Doubts(protected)
        self.doubtful, self._later = self._doubts.asked, deque[Dest]()
        self.reads = self._grading.reads
        self.wanted = self._grading.wanted
        self._open: dict[bytes, Dest] = {}
        self._settling: dict[bytes, Dest] = {}
        self._asking: list[bytes] = []
        self._recent: dict[bytes, _Recent] = {}
        self._names, self._last_begun = self._grading.names, self._grading.last_begun
        self._timetable: list[tuple[int, int, bytes]] = []
        """A heap of (due_ms, order, key); an entry that no longer fits its file is passed over."""
        self._order = self._now_ms = self._forgetting_ms = 0
        self._moment: Moment = (0, 0)

    # -- facts in ------------------------------------------------------------------------------------------------------

    def read(
        self, pid: int, folder: str, name: str, root: str, size: int | None, inode: int | None, at_ms: int, origin: str = ""
    ) -> None:
        """A process opened the protected file `folder + name`; `origin`: the protected path, if that is another one."""
        moment = self._moment
        if moment[1] != at_ms or moment[0] != self._order:
            moment = self._moment = (self._order, at_ms)
        self.reads.add(pid, folder, root, name, None if size is None else (size, inode), moment, origin)

    def created(self, fact: FileFact, mount: Mount) -> None:
        """A file was made on a medium."""
        self._begin(fact, mount, True)

    def grown(self, fact: FileFact, mount: Mount, size: int) -> None:
        """A file that is being written on a medium was looked at."""
        dest = self._open.get(fact.key) or self._settling.get(fact.key) or self._begin(fact, mount, False)
        dest.size = max(size, 0)

    def elsewhere(self, fact: Closed) -> list[Settled]:
        """A writer closed a file that is neither protected nor on a medium: it settles, as it may be renamed or removed yet;
        but what plainly may be a copy is told at once, as it may be taken further at once."""
        dest = self._settling.pop(fact.key, None) or Dest(fact, None, self._order + 1, fact.born_ms is not None)
        self._order += 1
        if fact.born_ms is not None:
            dest.first_ms = min(fact.born_ms, fact.at_ms)
        entry = self._people.who(fact.pid)
        dest.files = entry.files if entry is not None else []
        dest.seen_ms = min(dest.first_ms, dest.seen_ms) if dest.begun else dest.seen_ms
        dest.closed_order, dest.at_ms, dest.path, dest.pid = self._order, fact.at_ms, fact.path, fact.pid or dest.pid
        dest.size = dest.size if fact.size is None else max(fact.size, 0)
        self._grading.wrote(dest)
        self._doubts.elsewhere(OpenFile(fact.path, dest.size or 0, fact.key))
        self._settle(dest, fact.at_ms + SETTLE_MS)
        if not self._grading.ask(dest):
            return self._at_once(dest)
        self._asking.append(dest.key)
        return []

    def closed(self, fact: Closed, mount: Mount, size: int | None) -> Settled | None:
        """A writer closed a file on a medium: an arrival if it is plainly a copy, else it settles first."""
        dest = self._settling.pop(fact.key, None)
        if dest is None:
            dest = None if fact.made else self._open.pop(fact.key, None)
            dest = dest or self._begin(fact, mount, fact.made)
            self._open.pop(fact.key, None)
        self._order += 1
        dest.closed_order, dest.at_ms = self._order, fact.at_ms
        dest.size = dest.size if size is None else max(size, 0)
        dest.pid = fact.pid or dest.pid
        known = self._recent.get(fact.key)
        if known is not None:
            dest.before = known.size
        if mount.view:
            self._doubts.shown(dest)
        left = self._grading.plain(dest)
        if left is not None:
            return self._arrive(dest, [left])
        if dest.size is None:  # its medium went: what it has of a name is the size that left
            self._grading.ask(dest)
        self._grading.wrote(dest)
        self._doubts.wrote(dest)
        if self._grading.wanted:
            self._asking.append(dest.key)
        self._settle(dest, fact.at_ms + SETTLE_MS)
        return None

    def sized(self, fact: Sized) -> list[Settled]:
        """A size that was wanted: once all are there, what waited for them is decided."""
        if not self._grading.answered(fact) or not self._asking:
            return []
        asking, self._asking = self._asking, []
        arrivals: list[Settled] = []
        for key in asking:
            dest = self._settling.get(key)
            if dest is None:
                continue
            if dest.ripe:
                arrivals += self._decided([dest])
            elif dest.mount is None:
                arrivals += self._at_once(dest)
            elif (left := self._grading.plain(dest)) is not None:
                del self._settling[key]
                arrivals.append(self._arrive(dest, [left]))
        return arrivals

    def compared(self, fact: Compared) -> list[Settled] | None:
        """What the bytes of a file in doubt say; then those that waited for it are decided. None: it was no such file."""
        if self._doubts.open is None or fact.key != self._doubts.open:
            return None
        return self._resolved(fact.alike, held=fact.held)

    def found(self, fact: FileFact, mount: Mount, size: int) -> None:
        """A file was met on a medium by looking: it settles, in case that its close is told yet."""
        known = self._recent.get(fact.key)
        if known is not None and known.size == size:
            return
        self._order += 1
        dest = self._settling.pop(fact.key, None) or self._open.pop(fact.key, None) or self._begin(fact, mount, False)
        self._open.pop(fact.key, None)
        dest.size, dest.at_ms, dest.closed_order, dest.found = max(size, 0), fact.at_ms, self._order, True
        self._settle(dest, fact.at_ms + _FOUND_SETTLE_MS)

    def moved_within(self, fact: FileFact, old_path: str, size: int | None, is_dir: bool) -> Settled | None:
        """A rename on a medium: the final name of a file, once closed, is what it arrives under."""
        if is_dir:
            for dest in (*self._open.values(), *self._settling.values()):
                if dest.path.startswith(old_path + "/"):
                    dest.path = fact.path + dest.path[len(old_path) :]
            return None
        settled = self._settling.pop(fact.key, None)
        moved = settled or self._open.get(fact.key)
        if moved is None:
            return None
        moved.renamed(fact.path)
        moved.size = moved.size if size is None else max(size, 0)
        if settled is None:
            return None
        self._settling[settled.key] = settled
        return next(iter(self._decided([settled])), None)

    def moved_onto(self, fact: FileFact, mount: Mount, origin: Read | None, size: int | None, is_dir: bool) -> Arrival | None:
        """Something was renamed onto a medium from the same file system; `origin` is the protected file that it is."""
        self._remember(fact.key, size, fact.at_ms)
        if origin is None:
            return None if is_dir else Arrival(mount, fact.path, size, fact.pid, fact.at_ms, [])
        left = Left(origin, size, "lineage" if origin.via else "process", 1.0)
        return Arrival(mount, fact.path, size, fact.pid, fact.at_ms, [left], is_dir)

    def deleted(self, fact: FileFact) -> Settled | None:
        """A file on a medium was removed; what had arrived by then, had arrived."""
        dest = self._settling.pop(fact.key, None)
        if dest is not None:
            return self._decide(dest, last=True)
        dest = self._open.pop(fact.key, None)
        return self._cut_short(dest) if dest is not None and dest.size else None

    def medium_gone(self, medium_id: str) -> list[Settled]:
        """A medium was pulled: its files will never be told as closed."""
        return self._flush(lambda dest: dest.medium == medium_id)

    def mount_gone(self, mount: Mount) -> list[Settled]:
        """A mount is gone; files on it that are open cannot be."""
        return self._flush(lambda dest: dest.mount is mount)

    def everything(self) -> list[Settled]:
        """The agent stops: all that is known so far."""
        return self._flush(lambda dest: True)

    def due(self, now_ms: int, back: bool = False) -> list[Settled]:
        """Arrivals that have settled by `now_ms`; all that settle, if the clock went back."""
        back = back or now_ms < self._now_ms
        self._now_ms = now_ms
        told = self._resolved("unknown", last=True) if self._doubts.overdue(now_ms) else []
        if back:  # the clock went back: what waits would wait too long
            return told + self._decided(list(self._settling.values()))
        ripe = []
        while self._timetable and self._timetable[0][0] <= now_ms:
            due_ms, _, key = heappop(self._timetable)
            dest = self._settling.get(key)
            if dest is not None and dest.due_ms == due_ms:
                ripe.append(dest)
                if dest.ripe:
                    self._grading.unanswered()
        return told + self._decided(ripe) if ripe else told

    @property
    def due_ms(self) -> int | None:
        """When something settles next, at the latest; None if nothing is waiting."""
        due_ms = self._timetable[0][0] if self._settling else None
        return due_ms if self._doubts.open is None else min(due_ms or self._doubts.until_ms, self._doubts.until_ms)

    def forgotten(self, now_ms: int, media_there: bool) -> Lost | None:
        """What was given up for room since this was last told, once a minute at most; it matters only while media are there."""
        if not self._forgetting_ms:
            self._forgetting_ms = now_ms
        count, since_ms = self.reads.forgotten, self._forgetting_ms
        age_ms = now_ms - since_ms
        due = count > 0 and media_there and not 0 <= age_ms < _TELL_EVERY_MS
        if due or not count or age_ms > _MATTERS_MS:
            self.reads.forgotten, self._forgetting_ms = 0, now_ms
        return Lost(at_ms=now_ms, reason="reads_forgotten", since_ms=since_ms, until_ms=now_ms, count=count) if due else None

    def forget(self, pid: int) -> None:
        """A process is over for good, or its pid began a new life."""
        self.reads.forget(pid)
        self._last_begun.pop(pid, None)

    # -- destinations --------------------------------------------------------------------------------------------------

    def _begin(self, fact: FileFact, mount: Mount, begun: bool) -> Dest:
        self._order += 1
        known = self._open.pop(fact.key, None)
        if known is not None:
            self._unname(known)
        dest = self._open[fact.key] = Dest(fact, mount, self._order, begun)
        if begun:
            self._recent.pop(fact.key, None)
        entry = self._people.who(fact.pid)
        dest.files = entry.files if entry is not None else []
        self._names[dest.named] = self._names.get(dest.named, 0) + 1
        self._last_begun[fact.pid] = self._order
        if len(self._open) > _MOST_OPEN:
            self._unname(self._open.pop(next(iter(self._open))))
        if len(self._last_begun) > _MOST_OPEN:
            del self._last_begun[next(iter(self._last_begun))]
        return dest

    def _settle(self, dest: Dest, due_ms: int) -> None:
        dest.due_ms = due_ms
        self._settling[dest.key] = dest
        heappush(self._timetable, (due_ms, dest.closed_order, dest.key))

    def _decided(self, dests: list[Dest], last: bool = False) -> list[Settled]:
        """Decide, or ask for sizes first; `last`: there is no time to ask."""
        arrivals: list[Settled] = []
        for dest in dests:
            if self._settling.pop(dest.key, None) is not dest:
                continue
            if dest.pid:
                self._learn_held(dest)
            if not last and self._grading.ask(dest):
                dest.ripe = True
                self._asking.append(dest.key)
                self._settle(dest, self._now_ms + SETTLE_MS)
            elif self._doubts.open is not None and not last:
                self._later.append(dest)
            elif (arrival := self._decide(dest, last)) is not None:
                arrivals.append(arrival)
        return arrivals

    def _resolved(self, alike: str, last: bool = False, held: dict[str, int] | None = None) -> list[Settled]:
        """The file in doubt is decided, and what waited for it, until another one is in doubt; `last`: none can be."""
        dest, left, wrong = self._doubts.answered(alike, held or {})
        if not dest.pid and len(left) == 1 and left[0].link == "content":
            dest.pid = self._only_reader(left[0])
        if wrong:
            self._grading.disproved(dest)
        arrivals = [self._arrive(dest, left)]
        while self._later and (last or self._doubts.open is None):
            arrival = self._decide(self._later.popleft(), last)
            arrivals += [arrival] if arrival is not None else []
        return arrivals

    def _only_reader(self, left: Left) -> int:
        """Who read what the bytes say is there, if nobody else did; nobody was seen to write it."""
        opened = left.read.opened
        readers = [pid for pid, of in islice(self.reads.everyone(), _MOST_READERS) if of.opened(opened)]
        return readers[0] if readers == [left.pid] else 0

    def _at_once(self, dest: Dest) -> list[Settled]:
        """A file elsewhere that somebody wrote who had read something; anything else settles first."""
        left = self._grading.left(dest)
        if not any(each.link != "time" for each in left):
            return []
        del self._settling[dest.key]
        return [self._arrive(dest, left)]

    def _learn_held(self, dest: Dest) -> None:
        """What the writer held open when it began a file may be known by now: a copy, or what was moved out or linked just
        before. Its opening was not told, as nobody watched it yet."""
        entry = self._people.who(dest.pid) if dest.pid else None
        for file in (*dest.files, *(entry.files if entry is not None else ())):
            known = self._known_as(file)
            of = self.reads.of(dest.pid)
            if known is None or (of is not None and of.opened(known[0])):
                continue
            path, origin, root = known
            end = path.rfind("/") + 1
            moment = (dest.first_order - 1, dest.seen_ms)
            self.reads.add(dest.pid, path[:end], root, path[end:], (file.size, None), moment, origin)

    def _unname(self, dest: Dest) -> None:
        count = self._names.pop(dest.named, 1) - 1
        if count > 0:
            self._names[dest.named] = count

    def _flush(self, which: Callable[[Dest], bool]) -> list[Settled]:
        settled = [dest for dest in self._settling.values() if which(dest)]
        cut = [dest for dest in self._open.values() if which(dest)]
        arrivals = self._resolved("unknown", last=True) if self._doubts.open is not None else []
        arrivals += self._decided(settled, last=True)
        for dest in cut:
            del self._open[dest.key]
            arrivals += [arrival for arrival in (self._cut_short(dest),) if arrival is not None]
        return arrivals

    def _arrive(self, dest: Dest, left: list[Left]) -> Settled:
        if dest.mount is None:  # nothing is used up: what was read can leave yet
            return Written(dest.key, dest.path, dest.size, dest.pid, dest.at_ms, left)
        self._unname(dest)
        if len(left) == 1 and left[0].link == "process":
            self.reads.use(dest.pid, left[0].read, True)
        elif left:
            together = (dest.pid, *self._people.kin(dest.pid))
            for each in left:
                if each.pid:
                    self.reads.use(each.pid, each.read)
                for pid in together:
                    self.reads.use(pid, each.read)
        self._remember(dest.key, dest.size, dest.at_ms)
        return Arrival(dest.mount, dest.path, dest.size, dest.pid, dest.at_ms, left)

    def _remember(self, key: bytes, size: int | None, at_ms: int) -> None:
        self._recent.pop(key, None)
        self._recent[key] = _Recent(size, at_ms)
        if len(self._recent) > 2 * _MOST_RECENT:
            self._recent = dict(islice(self._recent.items(), _MOST_RECENT, None))

    def _decide(self, dest: Dest, last: bool = False) -> Settled | None:
        """What left into a settled file; None if it was told before and nothing is new, or if its bytes are asked first."""
        left = self._grading.left(dest)
        if dest.mount is None:
            return self._arrive(dest, left)
        known = self._recent.get(dest.key)
        told_before = known is not None and known.size == dest.size and dest.at_ms - known.at_ms <= _RECENT_MS
        if told_before and not any(each.read.fresh for each in left):
            self._unname(dest)
            return None
        if left and not last and self._doubts.ask(dest, left, lambda: self._grading.near(dest), self._held(dest), self._now_ms):
            return None
        if not left and not last and self._doubts.ask_only(dest, self._grading.guessed(dest), self._now_ms):
            return None
        return self._arrive(dest, left)

    def _held(self, dest: Dest) -> list[OpenFile]:
        entry = self._people.who(dest.pid)
        return [*dest.files, *(entry.files if entry is not None else [])]

    def _cut_short(self, dest: Dest) -> Settled | None:
        """A file that was never closed."""
        left = self._grading.cut_short(dest)
        return self._arrive(dest, left) if left or dest.size else None
