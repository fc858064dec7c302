"""Which protected reads are in a file that arrived on a medium, and how sure that is.

Question: what is in there? Owns: what links a destination to protected reads: by process, by pipeline (kin that shares a
pipe, an ancestor, children that inherited the destination), by time where nobody knows the writer; each with its
confidence; and of which reads a size must be looked up for that (`wanted`, answered by Sized facts), as only few of all that
is read is ever written. Must not know when a file has settled (`joins`), how pieces add up (`pieces`), events, approvals or
limits. The ways and the innocent doings that the rules were measured on: docs/limits.md.

In this order: name and size; explained by an unprotected file of that size that the writer holds, unless what was read
explains it as well; size alone; a container or transformation of all that was read meanwhile, if enough bytes arrived, in this
file or in all that its writer cut it into. Of several reads of one name, that which was opened
last before the destination was made, then that whose path ends most like the destination's.
"""

from collections.abc import Callable, Iterator
from itertools import chain, islice, takewhile
from typing import NamedTuple

from agent.contract.codes import Link
from agent.core.dest import Dest, Left
from agent.core.facts import OpenFile, Sized
from agent.core.people import Entry, People
from agent.core.pieces import TINY, Pieces
from agent.core.reads import GONE, Read, Reads, ReadsOf

__all__ = ["Dest", "Grading", "Left"]

_GRACE_MS = 2_000
_EARLIER_MS = 900_000
_TIME_MS = 900_000
_TIME_ALONE_MS = 10_000
_LEAST_SHARE = 0.05
"""Less than this of what was read, and it was not the content that left (a count, a checksum, a log line)."""
_STARTED_MS = 500
"""A process and the file that it writes to are told in either order."""
_UNTOLD_MS = 10_000
_TOLD_LATE_MS = 300
"""The kernel's queues are read one after the other: what was read for a file by another process may be told after it"""
_SEARCHED = 64
_MOST_EARLIER = 256
_ASK_AT_ONCE = 4_000
_LEAST_GUESS, _MOST_GUESSED, _LATEST = 96, 32, 16
_Near = tuple[Read, Link, int, float]
"""A read in question, what links it, the pid of its reader if that is not the writer, and how sure it can be at best"""


class _Kin(NamedTuple):
    """Another process that can have handed its reads to the writer, and how sure that is at best."""

    pid: int
    of: ReadsOf
    most: float


class Grading:
    """`plain(dest)` at its close, `left(dest)` once it settled. `names` and `last_begun` are kept by `joins`."""

    def __init__(
        self, people: People, protected: Callable[[OpenFile], bool], left_behind: Callable[[str], bool] = lambda path: False
    ) -> None:
        self._people, self._protected, self._left_behind = people, protected, left_behind
        self.reads = Reads()
        self.names: dict[tuple[int, str], int] = {}
        """How many files of a name each writer is writing now"""
        self.last_begun: dict[int, int] = {}
        """The order of the last file that each writer began"""
        self.wanted: list[str] = []
        """Paths of which Sized facts are wanted"""
        self._asked: dict[str, list[tuple[int, Read]]] = {}
        self._pieces = Pieces()
        self.wrote, self.disproved = self._pieces.wrote, self._pieces.disproved

    # -- sizes that must be known --------------------------------------------------------------------------------------

    def answered(self, fact: Sized) -> bool:
        """A size was looked up. True once all is known that was asked for."""
        stat = GONE if fact.size is None else (fact.size, fact.inode)
        for pid, read in self._asked.pop(fact.path, ()):
            self.reads.learn(pid, read, stat)
        if not self._asked:
            self.wanted.clear()  # a replay answers without having been asked
        return not self._asked

    def unanswered(self) -> None:
        """Nobody answered in time: what was asked for will not be known."""
        for many in self._asked.values():
            for pid, read in many:
                self.reads.learn(pid, read, GONE)
        self._asked.clear()
        self.wanted.clear()

    def ask(self, dest: Dest) -> bool:
        """Want the sizes that `left(dest)` needs and that nobody looked up yet. False if there are none."""
        own = self._own(dest)
        if own is not None and (read := self._same_name(own, dest, True)) is not None:
            return self._want(dest.pid, read)
        kin = self._kin(dest)  # not before: a plain copy has no need of them, and they take 10 µs
        for each in kin:
            if (read := self._same_name(each.of, dest, False)) is not None:
                return self._want(each.pid, read)
        everybody = ((dest.pid, own), *((each.pid, each.of) for each in kin))
        if dest.size == 0 or not self._open_question(dest, own, kin):
            return False
        asked = 0
        for pid, of in everybody:
            for read in self._in_window(dest, of) if of is not None and asked < _ASK_AT_ONCE else ():
                asked += self._want(pid, read)
                if asked >= _ASK_AT_ONCE:
                    break
        if not asked and own is not None:
            asked = sum(self._want(dest.pid, read) for read, *_ in self._earlier(dest, own))
        if dest.found or not dest.pid:
            since_ms = dest.at_ms - _TIME_ALONE_MS
            for pid, of in islice(self.reads.everyone(), _SEARCHED):
                named = (read for name in dest.names for read in islice(of.named(name), _SEARCHED))
                lately = takewhile(lambda read: read.last[1] >= since_ms, islice(reversed(of.fresh), _SEARCHED))
                asked += sum(self._want(pid, read) for read in chain(named, lately))
        elif not asked:
            asked = sum(self._want(pid, read) for pid, read in self._others(dest))
        return asked > 0

    def _want(self, pid: int, read: Read) -> bool:
        if read.stat is not None:
            return False
        many = self._asked.setdefault(read.opened, [])
        if not many:
            self.wanted.append(read.opened)
        many.append((pid, read))
        return True

    # -- the grading ---------------------------------------------------------------------------------------------------

    def plain(self, dest: Dest) -> Left | None:
        """The one source of a plain copy, known by name and size as soon as it is closed. Wants the size if that is missing."""
        own = self.reads.of(dest.pid) if dest.pid and dest.size is not None else None
        read = self._same_name(own, dest, True) if own is not None else None
        if read is None or not read.fresh or (read.stat is None and self._want(dest.pid, read)):
            return None
        if read.size is None or (not dest.size and read.size != 0):
            return None
        return self._one(dest, read, "process", 0.95)

    def left(self, dest: Dest) -> list[Left]:
        """What left into a file that has settled."""
        own = self._own(dest)
        if own is not None and (read := self._same_name(own, dest, True)) is not None:
            return [self._one(dest, read, "process", 0.7 if dest.size is None else 0.95 if read.size is not None else 0.8)]
        kin = self._kin(dest)
        for each in kin:
            if (read := self._same_name(each.of, dest, False)) is not None:
                sure = 0.7 if dest.size is None else 0.9 if read.size is not None else 0.75
                return [self._one(dest, read, "pipeline", min(sure, each.most), each.pid)]
        if dest.size == 0 or not (most := self._open_question(dest, own, kin)):
            return []
        got = self._by_content(dest, own, kin)
        return got if most == 1.0 else [each._replace(confidence=min(each.confidence, most)) for each in got]

    def _by_content(self, dest: Dest, own: ReadsOf | None, kin: list[_Kin]) -> list[Left]:
        if dest.size is None:
            return [
                Left(read, read.size, "lineage" if read.via and link == "process" else link, min(0.5, most), pid)
                for read, link, pid, most in islice(self._near(dest, own, kin), _SEARCHED)
            ]
        if own is not None and (got := self._same_size(dest, own, "process") or self._moved_away(dest, own)):
            return got
        for each in kin:
            if got := self._same_size(dest, each.of, "pipeline", each):
                return got
        if got := self._contained(dest, own, kin) or self._pieces.another(dest):
            return got
        return self._by_time(dest) if dest.found or not dest.pid else []

    def cut_short(self, dest: Dest) -> list[Left]:
        """A file that was never closed: the source by its name, else the last file that its writer opened meanwhile."""
        own, link, sure = self._own(dest), "process", 0.8
        for pid, of, most in ((0, own, 1.0), *self._kin(dest)):
            if of is not None:
                fresh = [read for read in self._in_window(dest, of) if read.size is None or read.size >= (dest.size or 0)]
                named = [read for read in fresh if read.name in dest.names]
                if named or fresh:
                    return [self._one(dest, (named or fresh)[0], link, min(most, sure if named else 0.5), pid)]  # type: ignore[arg-type]
            link, sure = "pipeline", 0.7
        return []

    def near(self, dest: Dest) -> Iterator[Read]:
        """All reads that can be in a file: what was opened meanwhile by its writer and by who can have handed it on."""
        return (read for read, *_ in self._near(dest, self._own(dest), self._kin(dest)))

    def guessed(self, dest: Dest) -> list[Left]:
        """What may be in a file that nothing joins, if its bytes say so: a little of what its writer or kin read (an extract,
        or packed far below what was read); else what others read lately: a service, a server of files or of a database, or the
        kernel wrote it for them, or they read for it. Each file once, by who read it last; and none by the path of a copy that
        is there no more, as the bytes there now are others."""
        if not dest.size or dest.size < _LEAST_GUESS or not dest.pid or dest.found:
            return []
        near = (each for each in self._near(dest, self._own(dest), self._kin(dest)) if self._lies_there(each[0]))
        if got := {read.opened: (read, link, pid, most) for read, link, pid, most in islice(near, _MOST_GUESSED)}:
            return [self._one(dest, read, link, min(0.5, most), pid) for read, link, pid, most in got.values()]
        latest: dict[str, tuple[int, Read]] = {}
        for pid, read in self._others(dest):
            if read.size and self._lies_there(read):
                latest.setdefault(read.opened, (pid, read))
        others = list(latest.values())
        others.sort(key=lambda each: (each[1].size != dest.size, -(each[1].size or 0)))  # of many, most are small
        return [self._one(dest, read, "time", 0.3, pid) for pid, read in others[:_MOST_GUESSED]]

    def _lies_there(self, read: Read) -> bool:
        return not read.via or not self._left_behind(read.via)

    def _others(self, dest: Dest) -> Iterator[tuple[int, Read]]:
        """What was read just now by those who have to do with the writer in no way that was seen, the latest of each."""
        since_ms = dest.at_ms - _TIME_ALONE_MS
        for pid, of in islice(self.reads.everyone(), _SEARCHED):
            for read in islice(takewhile(lambda read: read.last_ms >= since_ms, reversed(of.fresh)), _LATEST):
                yield pid, read

    def _own(self, dest: Dest) -> ReadsOf | None:
        return self.reads.of(dest.pid) if dest.pid else None

    def _kin(self, dest: Dest) -> list[_Kin]:
        """Who can have handed reads to the writer: by a pipe; a parent, to its child; and children by the destination's
        descriptor, which they inherited (`{ cat a; cat b; } > x`), as far as they were not there before it."""
        if not dest.pid:
            return []
        people = self._people
        piped = people.piped(dest.pid)
        kin = dict.fromkeys((*piped, *people.ancestors(dest.pid)), 1.0)
        since_ms = self._not_before(dest)
        for head in dict.fromkeys((dest.pid, dest.maker, *piped)):
            for entry in people.descendants(head, since_ms) if head else ():
                pid = entry.process.pid
                if pid not in kin and pid != dest.pid and self.reads.of(pid) is not None:
                    kin[pid] = self._handed_on(dest, entry)
        beside = dict.fromkeys(entry.process.pid for entry in people.beside(dest.pid, since_ms))
        feeding = [pid for pid in beside if pid not in kin and pid not in self.last_begun and self.reads.of(pid) is not None]
        kin |= dict.fromkeys(feeding, 0.7 if len(feeding) == 1 else 0.5)
        return [_Kin(pid, of, most) for pid, most in kin.items() if most and (of := self.reads.of(pid)) is not None]

    def _not_before(self, dest: Dest) -> int:
        """Since when a process that began can have to do with it: an edge may tell of the file long after it was made, if the
        machine is busy, but not of a young writer's file before the writer."""
        since_ms = dest.seen_ms - (_STARTED_MS if dest.begun else _UNTOLD_MS)
        for pid in (dest.pid, dest.maker):
            entry = self._people.who(pid)
            if entry is not None and dest.seen_ms - entry.born_ms <= _UNTOLD_MS:
                since_ms = min(since_ms, entry.born_ms)
        return since_ms

    def _handed_on(self, dest: Dest, entry: Entry) -> float:
        """How sure a descendant of a writer wrote to what it inherited: seen to hold it, or nothing speaks against it."""
        if any(each.key == dest.key if each.key else each.path == dest.path for each in entry.files):
            return 0.85
        elsewhere = entry.files and not entry.channels and entry.process.known == "exact"
        return 0.0 if elsewhere or entry.process.pid in self.last_begun else 0.7

    @staticmethod
    def _one(dest: Dest, read: Read, link: Link, confidence: float, pid: int = 0) -> Left:
        """A plain copy: the source's size left, unless less was seen to arrive."""
        size, arrived = read.size, dest.size
        less = size if arrived is None or (size is not None and size < arrived) else arrived
        return Left(read, less, "lineage" if link == "process" and read.via else link, confidence, pid)

    @staticmethod
    def _same_name(of: ReadsOf, dest: Dest, own: bool) -> Read | None:
        """A read of this name, and of this size as far as that is known; fresh before used. What another process (`own`
        False) wrote to media by itself is not offered again."""
        size, used = dest.size, (own or not of.joined) and dest.size is not None
        for name in dest.names:
            read = of.only_named(name)
            if read is not None and _fits(read, size):
                return read
            fitting = (each for each in of.named(name) if (used or each.fresh) and _fits(each, size))
            two = list(islice(fitting, 2))
            if not two:
                continue
            last, alone = two[0], len(two) == 1 or two[1].last[0] != two[0].last[0]
            if own and alone and last.fresh and last.last[0] == dest.first_order - 1:
                return last
            beside = of.beside(dest.path[: dest.path.rfind("/") + 1], name)
            return beside if beside is not None and _fits(beside, size) else last
        return None

    def _open_question(self, dest: Dest, own: ReadsOf | None, kin: list[_Kin]) -> float:
        """How sure it can be at best that this is protected content: 0 if an unprotected file of exactly this size, which the
        writer holds, explains it; but not if what it read meanwhile explains it as well (then that file may be a decoy)."""
        entry = self._people.who(dest.pid)
        held = [*dest.files, *(entry.files if entry is not None else [])]
        same = [each for each in held if each.size == dest.size and each.path != dest.path and each.key != dest.key]
        everybody = [of for of in (own, *(each.of for each in kin)) if of is not None]
        if not same or any(self._protected(each) or any(of.opened(each.path) for of in everybody) for each in same):
            return 1.0
        size = dest.size or 0
        if any(read.fresh and not self._reserved(dest, read) for of in everybody for read in islice(of.sized(size), 1)):
            return 0.5
        start_ms, total = dest.seen_ms - _GRACE_MS, 0
        for read, *_ in islice(self._near(dest, own, kin), _MOST_EARLIER):
            if read.last_ms >= start_ms:
                if read.stat is None:
                    return 0.5  # ask for its size first
                total += read.size or 0
        return 0.5 if _LEAST_SHARE * total <= size <= 2 * total else 0.0

    def _same_size(self, dest: Dest, of: ReadsOf, link: Link, kin: _Kin | None = None) -> list[Left]:
        """The one read of exactly the size that arrived."""
        sizes = {dest.size, (dest.size or 0) - dest.base} - {None, 0}
        every = [read for size in sizes for read in islice(of.sized(size), _SEARCHED)]  # type: ignore[arg-type]
        same = [read for read in every if read.since[0] < dest.closed_order]
        if kin is None and not same:  # its opening and its close are told as one, before what it read in between
            late = self.last_begun.get(dest.pid, 0) <= dest.first_order
            same = [read for read in every if late and read.since[1] <= dest.at_ms]
        same = [read for read in same if not self._reserved(dest, read) and (read.fresh or kin is None or not of.joined)]
        pid, most = (0, 1.0) if kin is None else (kin.pid, kin.most)
        fresh = [read for read in same if read.fresh]
        if len(fresh) == 1:
            in_window = fresh[0].last_ms >= dest.first_ms - _GRACE_MS
            return [self._one(dest, fresh[0], link, min(most, 0.85 if in_window else 0.7), pid)]
        if fresh or same:
            last = max(fresh or same, key=lambda read: read.since)
            return [self._one(dest, last, link, min(most, 0.6 if fresh else 0.5), pid)]
        return []

    def _moved_away(self, dest: Dest, own: ReadsOf) -> list[Left]:
        """mv: the one file that the writer opened meanwhile was gone before its size could be looked up."""
        meanwhile = list(islice(self._in_window(dest, own), 2))
        if len(meanwhile) == 1 and meanwhile[0].size is None:
            return [self._one(dest, meanwhile[0], "process", 0.75)]
        return []

    def _contained(self, dest: Dest, own: ReadsOf | None, kin: list[_Kin]) -> list[Left]:
        """tar, zip, gpg, cat a b: all that was read while the file was written, if enough arrived to hold it."""
        size, total, known, earlier = dest.size or 0, 0, True, False
        written = self._pieces.written(dest)
        got: dict[str, _Near] = {}
        near = self._near(dest, own, kin)
        first = next(near, None)
        if first is None and own is not None:
            near, earlier = self._earlier(dest, own), True
        for read, link, pid, most in chain(() if first is None else (first,), near):
            opened = read.opened
            if opened in got:
                continue
            if 0 < size < (read.size or 0) and read.name in dest.names:
                return [self._one(dest, read, link, min(0.7, most), pid)]  # a plain copy that was cut off
            got[opened] = (read, link, pid, most)
            total, known = total + (read.size or 0), known and read.size is not None
            if written < _LEAST_SHARE * total or (size <= TINY and size < 0.8 * total):
                return []  # and it can only become more; so a search is either short or uses up what it found
        if not got or size <= 0:
            return []
        share = size / total if total else 0.0
        if earlier and share > 2:
            return []  # what it wrote can hardly be what it read so long ago
        if earlier:
            got = {opened: each for opened, each in got.items() if not self._reserved(dest, each[0])}
        sure = 0.9 if 0.8 <= share <= 1.3 else 0.7 if share < 0.8 else 0.6 if share <= 2 else 0.5
        # A known file that came out a little larger was written anew, or only a line was added: no event tells which.
        added_little = 0 < dest.base < size and size - dest.base < _LEAST_SHARE * total
        sure = 0.4 if earlier or not known or added_little or dest.appended else sure
        piece = size < _LEAST_SHARE * total
        sure = min(sure, 0.5) if piece else sure
        out = []
        for read, link, pid, most in reversed(got.values()):
            via = "lineage" if read.via and link == "process" else link
            out.append(Left(read, read.size, via, min(most, sure if link == "process" else round(sure - 0.05, 2)), pid))
        return self._pieces.found(dest, out, piece) if share < 0.8 else out

    def _near(self, dest: Dest, own: ReadsOf | None, kin: list[_Kin]) -> "Iterator[_Near]":
        for read in self._in_window(dest, own) if own is not None else ():
            yield read, "process", 0, 1.0
        for each in kin:
            for read in self._in_window(dest, each.of, _TOLD_LATE_MS):
                yield read, "pipeline", each.pid, each.most

    @staticmethod
    def _earlier(dest: Dest, own: ReadsOf) -> "Iterator[_Near]":
        for read in islice(reversed(own.fresh), _MOST_EARLIER):
            if read.last_ms < dest.first_ms - _EARLIER_MS:
                return
            yield read, "process", 0, 1.0

    def _in_window(self, dest: Dest, of: ReadsOf, late_ms: int = 0) -> Iterator[Read]:
        """Fresh reads between the first sight of a file and its close (or told so much later), newest first."""
        start = dest.first_ms - _GRACE_MS
        late = self.last_begun.get(dest.pid, 0) <= dest.first_order
        for read in reversed(of.fresh):
            if read.last[1] < start:
                return
            before = read.since[0] < dest.closed_order or dest.closed_order == dest.first_order
            if (before or (late and read.since[1] <= dest.at_ms + late_ms)) and not self._reserved(dest, read):
                yield read

    def _reserved(self, dest: Dest, read: Read) -> bool:
        """Whether the same writer is writing another file of this read's name: it will want it."""
        name = read.name
        return self.names.get((dest.pid, name), 0) > (1 if dest.named == (dest.pid, name) else 0)

    def _by_time(self, dest: Dest) -> list[Left]:
        """Nobody knows the writer: somebody lately read a file of this name and size, or just now the only one of this size."""
        same: dict[str, tuple[Read, int]] = {}
        for pid, of in islice(self.reads.everyone(), 256):
            for name in dest.names:
                for read in islice(of.named(name), _SEARCHED):
                    if read.size == dest.size and dest.at_ms - read.last_ms <= _TIME_MS:
                        return [self._one(dest, read, "time", 0.4, pid)]
            for read in islice(of.sized(dest.size or -1), _SEARCHED) if not dest.pid else ():
                if dest.at_ms - read.last_ms <= _TIME_ALONE_MS:
                    same[read.opened] = read, pid if read.opened not in same else 0
        return [Left(read, dest.size, "time", 0.3, pid) for read, pid in same.values()] if len(same) == 1 else []


def _fits(read: Read, size: int | None) -> bool:
    """Whether a read can be a file of this size, as far as either is known."""
    return size is None or read.stat is None or read.stat[0] in (size, None)
