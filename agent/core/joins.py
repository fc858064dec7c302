"""Reads ⋈ writes: which protected files left into a file that arrived on a medium.

Question: what is in there? Owns: the files on media that are being written or were just closed, and the grading of what links
them to protected reads: by process, by pipeline (kin that shares a pipe, or an ancestor), by time where nobody knows the
writer. Must not know events, approvals or limits. From `pipeline` (facts, already told apart by place) to `pipeline`
(`Arrival`s). The ways and the innocent doings that the rules were measured on: docs/limits.md.

A plain copy has its source's size: it joins at its close, by name and size. Anything else waits `SETTLE_MS` for the rename
that often follows (rsync, browsers) and for reads that the kernel tells late (it merges a file's write and close into one
record, queued at the first write). Then, in this order: name and size; explained by an unprotected file of that size that
the writer holds; size alone; a container or transformation of all that was read meanwhile, if enough bytes arrived.
"""

from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import chain, islice
from typing import NamedTuple

from agent.contract.codes import Link
from agent.core.facts import FileFact, OpenFile
from agent.core.media import Mount
from agent.core.people import People
from agent.core.reads import Read, Reads, ReadsOf

SETTLE_MS = 300
_FOUND_SETTLE_MS = 1_000
_GRACE_MS = 2_000
_UNSEEN_START_MS = 600_000
_EARLIER_MS = 900_000
_TIME_MS = 900_000
_TIME_ALONE_MS = 10_000
_LEAST_SHARE = 0.05
"""Less than this of what was read, and it was not the content that left (a count, a checksum, a log line)."""
_TINY = 256
_SEARCHED = 64
_MOST_EARLIER = 256
_MOST_OPEN = 20_000
_MOST_RECENT = 4_096
_RECENT_MS = 60_000


class Left(NamedTuple):
    """One protected source that left: `bytes` None if no size was ever seen."""

    read: Read
    bytes: int | None
    link: Link
    confidence: float


class Arrival(NamedTuple):
    """A file is on a medium now. `left` empty: none of it is known to be protected. `pid` 0: written by nobody known."""

    mount: Mount
    path: str
    size: int | None
    pid: int
    at_ms: int
    left: list[Left]
    is_dir: bool = False


class _Dest:
    """A file on a medium, from its first sight to its settling."""

    __slots__ = (
        "at_ms",
        "base",
        "closed_order",
        "due_ms",
        "files",
        "first_ms",
        "first_order",
        "found",
        "key",
        "mount",
        "named",
        "names",
        "path",
        "pid",
        "size",
    )

    def __init__(self, fact: FileFact, mount: Mount, order: int, begun: bool) -> None:
        self.key, self.mount, self.path, self.pid = fact.key, mount, fact.path, fact.pid
        self.names = [_name(fact.path)]
        self.named = (fact.pid, self.names[0])
        self.first_ms = fact.at_ms if begun else fact.at_ms - _UNSEEN_START_MS
        self.at_ms = self.due_ms = fact.at_ms
        self.first_order = self.closed_order = order
        self.size: int | None = None
        self.base = 0
        self.files: list[OpenFile] = []
        self.found = False

    def renamed(self, path: str) -> None:
        self.path = path
        self.names.insert(0, _name(path))


class _Recent(NamedTuple):
    size: int | None
    at_ms: int


class Joins:
    """Fed with reads and with what happens on media; yields arrivals, at once or from `due`."""

    def __init__(self, people: People, protected: Callable[[str], bool]) -> None:
        self._people, self._protected = people, protected
        self.reads = Reads()
        self._open: dict[bytes, _Dest] = {}
        self._settling: dict[bytes, _Dest] = {}
        self._recent: dict[bytes, _Recent] = {}
        self._names: dict[tuple[int, str], int] = {}
        self._last_begun: dict[int, int] = {}
        self._timetable: list[tuple[int, int, bytes]] = []
        """A heap of (due_ms, order, key); an entry that no longer fits its file is passed over."""
        self._order = self._now_ms = 0

    # -- facts in ------------------------------------------------------------------------------------------------------

    def read(self, fact: FileFact, path: str, root: str, size: int | None, inode: int | None) -> None:
        """A process opened a protected file, by `fact.path`; `path` is where it is, or came from."""
        self._order += 1
        via = fact.path if fact.path != path else ""
        self.reads.add(fact.pid, Read(fact.key, path, root, size, inode, fact.at_ms, via), self._order)

    def created(self, fact: FileFact, mount: Mount) -> None:
        """A file was made on a medium."""
        self._begin(fact, mount, True)

    def grown(self, fact: FileFact, mount: Mount, size: int) -> None:
        """A file that is being written on a medium was looked at."""
        dest = self._open.get(fact.key) or self._settling.get(fact.key) or self._begin(fact, mount, False)
        dest.size = max(size, 0)

    def closed(self, fact: FileFact, mount: Mount, size: int | None) -> Arrival | None:
        """A writer closed a file on a medium: an arrival if it is plainly a copy, else it settles first."""
        dest = self._settling.pop(fact.key, None)
        if dest is None:
            dest = self._open.pop(fact.key, None) or self._begin(fact, mount, False)
            self._open.pop(fact.key, None)
        self._order += 1
        dest.closed_order, dest.at_ms = self._order, fact.at_ms
        dest.size = dest.size if size is None else max(size, 0)
        dest.pid = fact.pid or dest.pid
        known = self._recent.get(fact.key)
        if known is not None and known.size is not None and dest.size is not None and known.size < dest.size:
            dest.base = known.size
        own = self.reads.of(dest.pid) if dest.pid else None
        read = self._same_name(own, dest) if own is not None and dest.size else None
        if read is not None and own is not None and read.key in own.fresh:
            return self._arrive(dest, [self._left(dest, read, "process", 0.95)])
        self._settle(dest, fact.at_ms + SETTLE_MS)
        return None

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

    def moved_within(self, fact: FileFact, old_path: str, size: int | None, is_dir: bool) -> Arrival | None:
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
        return self._decide(settled) if settled is not None else None

    def moved_onto(self, fact: FileFact, mount: Mount, origin: Read | None, size: int | None, is_dir: bool) -> Arrival | None:
        """Something was renamed onto a medium from the same file system; `origin` is the protected file that it is."""
        self._recent[fact.key] = _Recent(size, fact.at_ms)
        if origin is None:
            return None if is_dir else Arrival(mount, fact.path, size, fact.pid, fact.at_ms, [])
        left = Left(origin, size, "lineage" if origin.via else "process", 1.0)
        return Arrival(mount, fact.path, size, fact.pid, fact.at_ms, [left], is_dir)

    def deleted(self, fact: FileFact) -> Arrival | None:
        """A file on a medium was removed; what had arrived by then, had arrived."""
        dest = self._settling.pop(fact.key, None)
        if dest is not None:
            return self._decide(dest)
        dest = self._open.pop(fact.key, None)
        return self._cut_short(dest) if dest is not None and dest.size else None

    def medium_gone(self, medium_id: str) -> list[Arrival]:
        """A medium was pulled: its files will never be told as closed."""
        return self._flush(lambda dest: dest.mount.medium.id == medium_id)

    def mount_gone(self, mount: Mount) -> list[Arrival]:
        """A mount is gone; files on it that are open cannot be."""
        return self._flush(lambda dest: dest.mount is mount)

    def everything(self) -> list[Arrival]:
        """The agent stops: all that is known so far."""
        return self._flush(lambda dest: True)

    def due(self, now_ms: int) -> list[Arrival]:
        """Arrivals that have settled by `now_ms`."""
        back = now_ms < self._now_ms
        self._now_ms = now_ms
        if back:  # the clock went back: what waits would wait too long
            return self._decided(list(self._settling.values()))
        ripe = []
        while self._timetable and self._timetable[0][0] <= now_ms:
            due_ms, _, key = heappop(self._timetable)
            dest = self._settling.get(key)
            if dest is not None and dest.due_ms == due_ms:
                ripe.append(dest)
        return self._decided(ripe) if ripe else []

    @property
    def due_ms(self) -> int | None:
        """When something settles next, at the latest; None if nothing is waiting."""
        return self._timetable[0][0] if self._settling else None

    def forget(self, pid: int) -> None:
        """A process is over for good, or its pid began a new life."""
        self.reads.forget(pid)
        self._last_begun.pop(pid, None)

    # -- destinations --------------------------------------------------------------------------------------------------

    def _begin(self, fact: FileFact, mount: Mount, begun: bool) -> _Dest:
        self._order += 1
        known = self._open.pop(fact.key, None)
        if known is not None:
            self._unname(known)
        dest = self._open[fact.key] = _Dest(fact, mount, self._order, begun)
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

    def _settle(self, dest: _Dest, due_ms: int) -> None:
        dest.due_ms = due_ms
        self._settling[dest.key] = dest
        heappush(self._timetable, (due_ms, dest.closed_order, dest.key))

    def _decided(self, dests: list[_Dest]) -> list[Arrival]:
        arrivals = []
        for dest in dests:
            if self._settling.pop(dest.key, None) is dest:
                arrivals += [arrival for arrival in (self._decide(dest),) if arrival is not None]
        return arrivals

    def _unname(self, dest: _Dest) -> None:
        count = self._names.pop(dest.named, 1) - 1
        if count > 0:
            self._names[dest.named] = count

    def _flush(self, which: Callable[[_Dest], bool]) -> list[Arrival]:
        settled = [dest for dest in self._settling.values() if which(dest)]
        cut = [dest for dest in self._open.values() if which(dest)]
        arrivals = self._decided(settled)
        for dest in cut:
            del self._open[dest.key]
            arrivals += [arrival for arrival in (self._cut_short(dest),) if arrival is not None]
        return arrivals

    def _arrive(self, dest: _Dest, left: list[Left]) -> Arrival:
        self._unname(dest)
        if left:
            own_only = len(left) == 1 and left[0].link == "process"
            for pid in (dest.pid,) if own_only else (dest.pid, *self._people.kin(dest.pid)):
                of = self.reads.of(pid)
                if of is not None:
                    for each in left:
                        of.use(each.read)
        self._recent.pop(dest.key, None)
        self._recent[dest.key] = _Recent(dest.size, dest.at_ms)
        if len(self._recent) > _MOST_RECENT:
            del self._recent[next(iter(self._recent))]
        return Arrival(dest.mount, dest.path, dest.size, dest.pid, dest.at_ms, left)

    # -- the grading ---------------------------------------------------------------------------------------------------

    def _decide(self, dest: _Dest) -> Arrival | None:
        """What left into a settled file; None if it was told before and nothing is new."""
        left = self._join(dest)
        known = self._recent.get(dest.key)
        told_before = known is not None and known.size == dest.size and dest.at_ms - known.at_ms <= _RECENT_MS
        if told_before and not any(self._is_fresh(each.read) for each in left):
            self._unname(dest)
            return None
        return self._arrive(dest, left)

    def _join(self, dest: _Dest) -> list[Left]:
        own = self.reads.of(dest.pid) if dest.pid else None
        if own is not None and (read := self._same_name(own, dest)) is not None:
            return [self._left(dest, read, "process", 0.95 if read.size is not None else 0.8)]
        kin = [of for pid in self._people.kin(dest.pid) if (of := self.reads.of(pid)) is not None] if dest.pid else []
        for of in kin:
            if (read := self._same_name(of, dest)) is not None:
                return [self._left(dest, read, "pipeline", 0.9 if read.size is not None else 0.75)]
        if dest.size == 0 or self._explained(dest):
            return []
        if own is not None and (got := self._same_size(dest, own, "process") or self._moved_away(dest, own)):
            return got
        for of in kin:
            if got := self._same_size(dest, of, "pipeline"):
                return got
        if got := self._contained(dest, own, kin):
            return got
        return self._by_time(dest) if dest.found or not dest.pid else []

    def _cut_short(self, dest: _Dest) -> Arrival | None:
        """A file that was never closed: the source by its name, else the last file that its writer opened meanwhile."""
        own = self.reads.of(dest.pid) if dest.pid else None
        for of, link, sure in (
            (own, "process", 0.8),
            *((self.reads.of(pid), "pipeline", 0.7) for pid in self._people.kin(dest.pid)),
        ):
            if of is None:
                continue
            fresh = [read for read in self._in_window(dest, of) if read.size is None or read.size >= (dest.size or 0)]
            named = [read for read in fresh if read.name in dest.names]
            if named or fresh:
                return self._arrive(dest, [self._left(dest, (named or fresh)[0], link, sure if named else 0.5)])  # type: ignore[arg-type]
        return self._arrive(dest, []) if dest.size else None

    def _left(self, dest: _Dest, read: Read, link: Link, confidence: float) -> Left:
        """A plain copy: the source's size left, unless less was seen to arrive."""
        sizes = [size for size in (read.size, dest.size) if size is not None]
        return Left(read, min(sizes, default=None), "lineage" if read.via and link == "process" else link, confidence)

    @staticmethod
    def _same_name(of: ReadsOf, dest: _Dest) -> Read | None:
        """A read of this name and size, fresh before used; from the directory of the same name if there are several."""
        best: tuple[bool, bool, Read] | None = None
        folder = _folder(dest.path)
        for name in dest.names:
            for size in {dest.size, None} if dest.size is not None else ():
                for read in islice(of.named(name, size), _SEARCHED):
                    rank = (read.key in of.fresh, _folder(read.via or read.path) == folder, read)
                    if rank[0] and rank[1]:
                        return read
                    if best is None or rank[:2] > best[:2]:
                        best = rank
        return best[2] if best else None

    def _explained(self, dest: _Dest) -> bool:
        """Whether the writer holds an unprotected file of exactly this size, and no protected one."""
        entry = self._people.who(dest.pid)
        held = [*dest.files, *(entry.files if entry is not None else [])]
        same = [each for each in held if each.size == dest.size and each.path != dest.path and each.key != dest.key]
        return bool(same) and not any(self._protected(each.path) for each in same)

    def _same_size(self, dest: _Dest, of: ReadsOf, link: Link) -> list[Left]:
        """The one read of exactly the size that arrived."""
        sizes = {dest.size, (dest.size or 0) - dest.base} - {None, 0}
        same = [read for size in sizes for read in islice(of.sized(size), _SEARCHED) if read.order < dest.closed_order]  # type: ignore[arg-type]
        same = [read for read in same if not self._reserved(dest, read)]
        fresh = [read for read in same if read.key in of.fresh]
        if len(fresh) == 1:
            in_window = fresh[0].last_ms >= dest.first_ms - _GRACE_MS
            return [self._left(dest, fresh[0], link, 0.85 if in_window else 0.7)]
        if fresh or same:
            return [self._left(dest, max(fresh or same, key=lambda read: read.order), link, 0.6 if fresh else 0.5)]
        return []

    def _moved_away(self, dest: _Dest, own: ReadsOf) -> list[Left]:
        """mv: the one file that the writer opened meanwhile was gone before its size could be looked up."""
        meanwhile = list(islice(self._in_window(dest, own), 2))
        if len(meanwhile) == 1 and meanwhile[0].size is None:
            return [self._left(dest, meanwhile[0], "process", 0.75)]
        return []

    def _contained(self, dest: _Dest, own: ReadsOf | None, kin: list[ReadsOf]) -> list[Left]:
        """tar, zip, gpg, cat a b: all that was read while the file was written, if enough arrived to hold it."""
        size, total, known, earlier = dest.size or 0, 0, True, False
        got: dict[bytes, tuple[Read, Link]] = {}
        near = self._near(dest, own, kin)
        first = next(near, None)
        if first is None and own is not None:
            near, earlier = self._earlier(dest, own), True
        for read, link in chain(() if first is None else (first,), near):
            if read.key in got:
                continue
            if 0 < size < (read.size or 0) and read.name in dest.names:
                return [self._left(dest, read, link, 0.7)]  # a plain copy that was cut off
            got[read.key] = (read, link)
            total, known = total + (read.size or 0), known and read.size is not None
            if size < _LEAST_SHARE * total or (size <= _TINY and size < 0.8 * total):
                return []  # and it can only become more; so a search is either short or uses up what it found
        if not got or size <= 0:
            return []
        share = size / total if total else 0.0
        if earlier and share > 2:
            return []  # what it wrote can hardly be what it read so long ago
        if earlier:
            got = {key: each for key, each in got.items() if not self._reserved(dest, each[0])}
        sure = 0.9 if 0.8 <= share <= 1.3 else 0.7 if share < 0.8 else 0.6 if share <= 2 else 0.5
        # A known file that came out a little larger was written anew, or only a line was added: no event tells which.
        added_little = 0 < dest.base < size and size - dest.base < _LEAST_SHARE * total
        sure = 0.4 if earlier or not known or added_little else sure
        out = []
        for read, link in reversed(got.values()):
            via = "lineage" if read.via and link == "process" else link
            out.append(Left(read, read.size, via, sure if link == "process" else round(sure - 0.05, 2)))
        return out

    def _near(self, dest: _Dest, own: ReadsOf | None, kin: list[ReadsOf]) -> Iterator[tuple[Read, Link]]:
        for read in self._in_window(dest, own) if own is not None else ():
            yield read, "process"
        for of in kin:
            for read in self._in_window(dest, of):
                yield read, "pipeline"

    @staticmethod
    def _earlier(dest: _Dest, own: ReadsOf) -> Iterator[tuple[Read, Link]]:
        for read in islice(reversed(own.fresh.values()), _MOST_EARLIER):
            if read.last_ms < dest.first_ms - _EARLIER_MS:
                return
            yield read, "process"

    def _in_window(self, dest: _Dest, of: ReadsOf) -> Iterator[Read]:
        """Fresh reads between the first sight of a file and its close, newest first."""
        start = dest.first_ms - _GRACE_MS
        late = self._last_begun.get(dest.pid, 0) <= dest.first_order
        for read in reversed(of.fresh.values()):
            if read.last_ms < start:
                return
            before = read.order < dest.closed_order or dest.closed_order == dest.first_order
            if (before or (late and read.at_ms <= dest.at_ms)) and not self._reserved(dest, read):
                yield read

    def _reserved(self, dest: _Dest, read: Read) -> bool:
        """Whether the same writer is writing another file of this read's name: it will want it."""
        name = read.name
        return self._names.get((dest.pid, name), 0) > (1 if dest.named == (dest.pid, name) else 0)

    def _by_time(self, dest: _Dest) -> list[Left]:
        """Nobody knows the writer: somebody lately read a file of this name and size, or just now the only one of this size."""
        same: dict[bytes, Read] = {}
        for _, of in islice(self.reads.everyone(), 256):
            for name in dest.names:
                for read in islice(of.named(name, dest.size), _SEARCHED):
                    if 0 <= dest.at_ms - read.last_ms <= _TIME_MS or read.last_ms > dest.at_ms:
                        return [self._left(dest, read, "time", 0.4)._replace(link="time")]
            for read in islice(of.sized(dest.size or -1), _SEARCHED) if not dest.pid else ():
                if dest.at_ms - read.last_ms <= _TIME_ALONE_MS:
                    same[read.key] = read
        return [Left(next(iter(same.values())), dest.size, "time", 0.3)] if len(same) == 1 else []

    def _is_fresh(self, read: Read) -> bool:
        return any(read.key in of.fresh for _, of in self.reads.everyone())


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _folder(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]
