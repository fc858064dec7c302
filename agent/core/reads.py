"""The protected files that processes opened: who could have what in hand.

Question: what did this process read, and which of it has not left yet? Owns: the reads of each pid, found by name, by place
and by size in constant time, bounded per process and in all, and the count of what was forgotten there. Must not know
destinations or how a join is graded (`grading`).
A read is fresh until a join uses it up, and fresh again when the file is opened again; a used one still joins, but last.

Most processes only read (a backup, grep), so a read costs little until somebody asks: 50,000 of one process take under
8 MiB, as names of a directory share it, and there are no indexes. The first question about a process `wake`s its reads.
A `Moment` is (order, ms): `order` counts what happened on media, as within one millisecond only it tells what came first.
"""

from collections.abc import Iterator
from itertools import islice
from operator import attrgetter

from msgspec import Struct

MOST_OF_ONE = 50_000
MOST_OF_ALL = 80_000
MOST_USED = 4_096
"""Used reads of one process: they were told as left, and matter only should the same program write them again."""
_SEARCHED = 256
_AT_ONCE = 512
"""Dropped together: a dict from whose front single entries are taken is searched past the holes each time."""

Moment = tuple[int, int]
Stat = tuple[int | None, int | None]
GONE: Stat = (None, None)
"""It was looked up, and was not there any more."""


class Folder(Struct, gc=False, eq=False):
    """A directory that files were opened in: `path` ends in "/", `root` is the protected directory it belongs to."""

    path: str
    root: str


class Read(Struct, gc=False, eq=False):
    """One protected file that one process opened, as `folder.path + name`. `stat` is (size, inode), None: not asked yet.

    `since` is the first opening since it was last used, `last` the last one.
    """

    folder: Folder
    name: str
    stat: Stat | None
    since: Moment
    last: Moment
    fresh: bool = True

    @property
    def opened(self) -> str:
        """The path by which it was opened."""
        return self.folder.path + self.name

    @property
    def path(self) -> str:
        """The protected path."""
        return self.folder.path + self.name

    @property
    def root(self) -> str:
        """The protected directory."""
        return self.folder.root

    @property
    def via(self) -> str:
        """The other name by which it was opened, if it was."""
        return ""

    @property
    def names(self) -> list[str]:
        """All names and copies by which it was reached, first to last."""
        via = self.via
        return [via] if via else []

    @property
    def size(self) -> int | None:
        """Bytes, if they could be looked up."""
        return None if self.stat is None else self.stat[0]

    @property
    def inode(self) -> int | None:
        """Its inode number, if that was looked up."""
        return None if self.stat is None else self.stat[1]

    @property
    def last_ms(self) -> int:
        """When it was last opened."""
        return self.last[1]


class ReadElsewhere(Read, gc=False, eq=False):
    """A protected file opened by another name: a hard link, or after it was moved out. `origin` is the protected path."""

    origin: str = ""

    @property
    def path(self) -> str:
        """The protected path."""
        return self.origin

    @property
    def via(self) -> str:
        """The name by which it was opened."""
        return self.folder.path + self.name


class ReadStaged(ReadElsewhere, gc=False, eq=False):
    """A protected file in a copy of it that was opened; `chain`: the copies that this copy was made of, `told` its event."""

    chain: tuple[str, ...] = ()
    told: str = ""

    @property
    def names(self) -> list[str]:
        """All copies by which it was reached, first to last."""
        return [*self.chain, self.via]


def read_of(path: str, root: str, size: int | None, at_ms: int) -> Read:
    """A protected file by itself, as if it had been read: one that was renamed or linked onto a medium."""
    folder, slash, name = path.rpartition("/")
    return Read(Folder(folder + slash, root), name, (size, None), (0, at_ms), (0, at_ms))


def read_elsewhere(path: str, origin: str, root: str, size: int | None, at_ms: int) -> Read:
    """The same of a protected file that lies outside, at `path`."""
    folder, slash, name = path.rpartition("/")
    return ReadElsewhere(Folder(folder + slash, root), name, (size, None), (0, at_ms), (0, at_ms), True, origin)


_Ordered = dict[Read, None]
_Index = dict[object, "Read | _Ordered"]
"""One read by itself, or several in the order in which they were last opened"""
_Place = tuple[Folder, dict[str, Read]]


class ReadsOf:
    """All reads of one process: `add` on each opening, the rest once somebody asked (`wake`)."""

    __slots__ = (
        "_awake",
        "_fresh_by_name",
        "_fresh_by_size",
        "_namesakes",
        "_places",
        "_twins",
        "_used_by_name",
        "_used_by_size",
        "count",
        "fresh",
        "joined",
        "used",
    )

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self.count = 0
        self._awake = self.joined = False
        self.fresh: _Ordered = {}
        self.used: _Ordered = {}
        self._fresh_by_name: _Index = {}
        self._used_by_name: dict[str, Read] = {}
        self._fresh_by_size: _Index = {}
        self._used_by_size: dict[int | None, Read] = {}
        self._namesakes: dict[str, dict[str, _Place]] = {}
        self._twins: dict[str, _Place] = {}

    # -- while it reads ------------------------------------------------------------------------------------------------

    def add(self, folder: str, root: str, name: str, stat: Stat | None, moment: Moment, origin: str = "") -> int:
        """A file was opened. Returns 1 if it is new here."""
        place = self._places.get(folder)
        if place is None:
            place = self._places[folder] = (Folder(folder, root), {})
            if self._awake:
                self._namesakes.setdefault(_last(folder), {})[folder] = place
        known = place[1].get(name)
        if known is not None:
            self._again(known, stat, moment)
            return 0
        if origin:
            read: Read = ReadElsewhere(Folder(folder, root), name, stat, moment, moment, True, origin)
        else:
            read = Read(place[0], name, stat, moment, moment)
        place[1][name] = read
        self.count += 1
        if self._awake:
            self._index(read)
        return 1

    def forget_some(self, most: int) -> tuple[int, int]:
        """Drop up to `most` that were used, else that many of the oldest. Returns how many, and how many of them were fresh."""
        if self._awake:
            reads = list(islice(self.used or self.fresh, most))
        else:
            reads = list(islice((read for _, names in self._places.values() for read in names.values()), most))
        for read in reads:
            folder = read.folder.path
            names = self._places[folder][1]
            del names[read.name]
            if self._awake:
                self._unindex(read)
            if not names:
                del self._places[folder]
                if self._awake:
                    del self._namesakes[_last(folder)][folder]
        self.count -= len(reads)
        return len(reads), sum(read.fresh for read in reads)

    def _again(self, known: Read, stat: Stat | None, moment: Moment) -> None:
        if not self._awake:
            known.last = moment
            known.stat = stat
            return
        self._unindex(known)
        if not known.fresh:
            known.since, known.fresh = moment, True
        known.last = moment
        known.stat = stat
        self._index(known)

    def clock_set(self, by_ms: int, now_ms: int) -> None:
        """See `Reads.clock_set`."""
        for _, names in self._places.values():
            for read in names.values():
                read.since = read.since[0], min(read.since[1] + by_ms, now_ms)
                read.last = read.last[0], min(read.last[1] + by_ms, now_ms)

    # -- once somebody asks --------------------------------------------------------------------------------------------

    def wake(self) -> "ReadsOf":
        """Make the indexes, unless they are there."""
        if not self._awake:
            self._awake = True
            self._name_places()
            for read in sorted((read for _, names in self._places.values() for read in names.values()), key=attrgetter("last")):
                self._index(read)
        return self

    def use(self, read: Read) -> int:
        """A join took this file. Returns how many used ones were dropped to make room (each was told as left)."""
        place = self._places.get(read.folder.path)
        mine = place[1].get(read.name) if place is not None else None
        if mine is None or not mine.fresh:
            return 0
        self.wake()
        self._unindex(mine)
        mine.fresh = False
        self._index(mine)
        return self.forget_some(_AT_ONCE)[0] if len(self.used) > MOST_USED else 0

    def learn(self, read: Read, stat: Stat) -> None:
        """The size and inode of one of these reads, as it was asked for."""
        if read.stat is None:
            read.stat = stat
            if stat[0] is not None and read in self.fresh:
                _put(self._fresh_by_size, stat[0], read)

    def opened(self, path: str) -> bool:
        """Whether a file was opened by this path."""
        end = path.rfind("/") + 1
        place = self._places.get(path[:end])
        return place is not None and path[end:] in place[1]

    def named(self, name: str) -> Iterator[Read]:
        """Reads of files of this name: fresh ones, those opened last first, then that which was used last."""
        yield from _newest(self._fresh_by_name, name)
        if name in self._used_by_name:
            yield self._used_by_name[name]

    def only_named(self, name: str) -> Read | None:
        """The one fresh read of this name; None if there is none, or several."""
        known = self._fresh_by_name.get(name)
        return known if isinstance(known, Read) else None

    def beside(self, folder: str, name: str) -> Read | None:
        """The fresh read of this name in the directory whose path ends most like `folder`; the last opened of several."""
        twin = self._twins.get(folder)
        read = twin[1].get(name) if twin is not None else None
        if read is not None and read.fresh:
            return read
        best: tuple[int, Moment] = (0, (0, 0))
        for place in islice(self._namesakes.get(_last(folder), {}).values(), _SEARCHED):
            read = place[1].get(name)
            if read is not None and read.fresh:
                rank = (_common_tail(place[0].path, folder), read.last)
                if rank >= best:
                    best, twin = rank, place
        if not best[0] or twin is None:
            return None
        if len(self._twins) >= MOST_USED:
            self._twins.clear()
        self._twins[folder] = twin
        return twin[1].get(name)

    def sized(self, size: int) -> Iterator[Read]:
        """Reads of files known to have exactly this size: fresh ones, those opened last first, then that used last."""
        yield from _newest(self._fresh_by_size, size)
        if size in self._used_by_size:
            yield self._used_by_size[size]

    def _name_places(self) -> None:
        self._twins.clear()
        for folder, place in self._places.items():
            self._namesakes.setdefault(_last(folder), {})[folder] = place

    def _index(self, read: Read) -> None:
        size = None if read.stat is None else read.stat[0]
        if not read.fresh:
            self.used[read] = None
            self._used_by_name[read.name] = self._used_by_size[size] = read
            return
        self.fresh[read] = None
        _put(self._fresh_by_name, read.name, read)
        if size is not None:
            _put(self._fresh_by_size, size, read)

    def _unindex(self, read: Read) -> None:
        size = None if read.stat is None else read.stat[0]
        if not read.fresh:
            self.used.pop(read, None)
            if self._used_by_name.get(read.name) is read:
                del self._used_by_name[read.name]
            if self._used_by_size.get(size) is read:
                del self._used_by_size[size]
            return
        self.fresh.pop(read, None)
        _drop(self._fresh_by_name, read.name, read)
        if size is not None:
            _drop(self._fresh_by_size, size, read)


class Reads:
    """Reads by pid, the least recently active process first to be forgotten. `forgotten` counts fresh ones dropped for room."""

    def __init__(self) -> None:
        self._of: dict[int, ReadsOf] = {}
        self._latest = -1
        self._count = 0
        self.forgotten = 0

    def add(self, pid: int, folder: str, root: str, name: str, stat: Stat | None, moment: Moment, origin: str = "") -> None:
        """Process `pid` opened the protected file `folder + name`; `origin` is its protected path if that is another."""
        of = self._of.get(pid)
        if of is None:
            of = self._of[pid] = ReadsOf()
            self._latest = pid
        elif pid != self._latest:
            self._latest = pid
            self._of[pid] = self._of.pop(pid)
        if of.add(folder, root, name, stat, moment, origin):
            self._count += 1
            if of.count > MOST_OF_ONE:
                dropped, fresh = of.forget_some(_AT_ONCE)
                self._count -= dropped
                self.forgotten += fresh
            while self._count > MOST_OF_ALL and len(self._of) > 1:
                oldest = next(iter(self._of))
                self.forgotten += self._of[oldest].count - len(self._of[oldest].used)
                self.forget(oldest)

    def of(self, pid: int) -> ReadsOf | None:
        """What `pid` read, None if nothing is known."""
        of = self._of.get(pid)
        return None if of is None else of.wake()

    def use(self, pid: int, read: Read, own: bool = False) -> None:
        """A join took the file of `read`, which `pid` may have read; `own`: it wrote it itself, without a pipe (`joined`)."""
        of = self._of.get(pid)
        if of is not None:
            of.joined |= own
            self._count -= of.use(read)

    def learn(self, pid: int, read: Read, stat: Stat) -> None:
        """The size and inode of a read of `pid` were looked up."""
        of = self._of.get(pid)
        if of is not None:
            of.learn(read, stat)

    def forget(self, pid: int) -> None:
        """The process is over, or began a new life."""
        gone = self._of.pop(pid, None)
        if gone is not None:
            self._count -= gone.count
            self._latest = -1

    def clock_set(self, by_ms: int, now_ms: int) -> None:
        """The wall clock was set: what was read a moment ago stays so. Reads after that, of which we hear late, are of now."""
        for of in self._of.values():
            of.clock_set(by_ms, now_ms)

    def everyone(self) -> Iterator[tuple[int, ReadsOf]]:
        """The reads of every process, the most recently active first."""
        return ((pid, self._of[pid].wake()) for pid in reversed(self._of))

    def __len__(self) -> int:
        """How many reads are kept."""
        return self._count


def _put(index: _Index, at: object, read: Read) -> None:
    known = index.get(at)
    if known is None:
        index[at] = read
    elif isinstance(known, Read):
        if known is not read:
            index[at] = {known: None, read: None}
    else:
        known[read] = None


def _newest(index: _Index, at: object) -> Iterator[Read]:
    known = index.get(at)
    return iter(()) if known is None else iter((known,)) if isinstance(known, Read) else reversed(known)


def _drop(index: _Index, at: object, read: Read) -> None:
    known = index.get(at)
    if known is read:
        del index[at]
    elif isinstance(known, dict):
        known.pop(read, None)
        if len(known) == 1:
            index[at] = next(iter(known))


def _last(folder: str) -> str:
    """The name of a directory whose path ends in "/"."""
    return folder[folder.rfind("/", 0, -1) + 1 : -1]


def _common_tail(one: str, other: str) -> int:
    """How many directories at the end of two paths have the same names."""
    count = 0
    for here, there in zip(reversed(one.split("/")[:-1]), reversed(other.split("/")[:-1]), strict=False):
        if here != there:
            break
        count += 1
    return count
