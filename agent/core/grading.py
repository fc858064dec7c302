"""Which protected reads are in a file that arrived on a medium, and how sure that is.

Question: what is in there? Owns: what links a destination to protected reads: by process, by pipeline (kin that shares a
pipe, or an ancestor), by time where nobody knows the writer; each with its confidence; and of which reads a size must be
looked up for that (`wanted`, answered by Sized facts), as only few of all that is read is ever written. Must not know when a
file has settled (`joins`), events, approvals or limits. The ways and the innocent doings that the rules were measured on:
docs/limits.md.

In this order: name and size; explained by an unprotected file of that size that the writer holds; size alone; a container or
transformation of all that was read meanwhile, if enough bytes arrived. Of several reads of one name, that which was opened
last before the destination was made, then that whose path ends most like the destination's.
"""

from collections.abc import Callable, Iterator
from itertools import chain, islice, takewhile
from typing import NamedTuple

from agent.contract.codes import Link
from agent.core.facts import FileFact, OpenFile, Sized
from agent.core.media import Mount
from agent.core.people import People
from agent.core.reads import GONE, Read, Reads, ReadsOf

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
_ASK_AT_ONCE = 4_000
_TELL_NO_BEGINNING = ("exfat", "fuse", "btrfs")
"""File systems of which the kernel tells finished writes only (they have no file handles, or not for all of it)."""


class Left(NamedTuple):
    """One protected source that left: `bytes` None if no size was ever seen."""

    read: Read
    bytes: int | None
    link: Link
    confidence: float


class Dest:
    """A file on a medium, from its first sight to its settling. `begun`: it was told when it was made; `before`: its size
    when it arrived the last time, if that was lately."""

    __slots__ = (
        "at_ms",
        "before",
        "begun",
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
        "ripe",
        "size",
    )

    def __init__(self, fact: FileFact, mount: Mount, order: int, begun: bool) -> None:
        path = fact.path
        self.key, self.mount, self.path, self.pid = fact.key, mount, path, fact.pid
        name = path[path.rfind("/") + 1 :]
        self.names = [name]
        self.named = (fact.pid, name)
        self.first_ms = fact.at_ms if begun else fact.at_ms - _UNSEEN_START_MS
        self.at_ms = self.due_ms = fact.at_ms
        self.first_order = self.closed_order = order
        self.size: int | None = None
        self.begun = begun
        self.before: int | None = None
        self.files: list[OpenFile] = []
        self.found = self.ripe = False

    @property
    def base(self) -> int:
        """Bytes that may have been there before."""
        return self.before if self.before is not None and self.before < (self.size or 0) else 0

    @property
    def appended(self) -> bool:
        """Whether it was there before, and nobody knows how large: a line may have been added, or all written anew."""
        untold = self.mount.fs.startswith(_TELL_NO_BEGINNING)
        return not self.begun and self.before is None and not self.found and not untold

    def renamed(self, path: str) -> None:
        """It has another name now."""
        self.path = path
        self.names.insert(0, path[path.rfind("/") + 1 :])


class Grading:
    """`plain(dest)` at its close, `left(dest)` once it settled. `names` and `last_begun` are kept by `joins`."""

    def __init__(self, people: People, protected: Callable[[str], bool]) -> None:
        self._people, self._protected = people, protected
        self.reads = Reads()
        self.names: dict[tuple[int, str], int] = {}
        """How many files of a name each writer is writing now"""
        self.last_begun: dict[int, int] = {}
        """The order of the last file that each writer began"""
        self.wanted: list[str] = []
        """Paths of which Sized facts are wanted"""
        self._asked: dict[str, list[tuple[int, Read]]] = {}

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
        own, kin = self._own(dest), self._kin(dest)
        for pid, of in ((dest.pid, own), *kin):
            if of is not None and (read := self._same_name(of, dest, pid == dest.pid)) is not None:
                return self._want(pid, read)
        if not dest.size or self._explained(dest):
            return False
        asked = 0
        for pid, of in ((dest.pid, own), *kin):
            for read in self._in_window(dest, of) if of is not None and asked < _ASK_AT_ONCE else ():
                asked += self._want(pid, read)
                if asked >= _ASK_AT_ONCE:
                    break
        if not asked and own is not None:
            asked = sum(self._want(dest.pid, read) for read, _ in self._earlier(dest, own))
        if dest.found or not dest.pid:
            since_ms = dest.at_ms - _TIME_ALONE_MS
            for pid, of in islice(self.reads.everyone(), _SEARCHED):
                named = (read for name in dest.names for read in islice(of.named(name), _SEARCHED))
                lately = takewhile(lambda read: read.last[1] >= since_ms, islice(reversed(of.fresh), _SEARCHED))
                asked += sum(self._want(pid, read) for read in chain(named, lately))
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
        own, kin = self._own(dest), [of for _, of in self._kin(dest)]
        if own is not None and (read := self._same_name(own, dest, True)) is not None:
            return [self._one(dest, read, "process", 0.95 if read.size is not None else 0.8)]
        for of in kin:
            if (read := self._same_name(of, dest, False)) is not None:
                return [self._one(dest, read, "pipeline", 0.9 if read.size is not None else 0.75)]
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

    def cut_short(self, dest: Dest) -> list[Left]:
        """A file that was never closed: the source by its name, else the last file that its writer opened meanwhile."""
        own, link, sure = self._own(dest), "process", 0.8
        for of in (own, *(of for _, of in self._kin(dest))):
            if of is not None:
                fresh = [read for read in self._in_window(dest, of) if read.size is None or read.size >= (dest.size or 0)]
                named = [read for read in fresh if read.name in dest.names]
                if named or fresh:
                    return [self._one(dest, (named or fresh)[0], link, sure if named else 0.5)]  # type: ignore[arg-type]
            link, sure = "pipeline", 0.7
        return []

    def _own(self, dest: Dest) -> ReadsOf | None:
        return self.reads.of(dest.pid) if dest.pid else None

    def _kin(self, dest: Dest) -> list[tuple[int, ReadsOf]]:
        kin = self._people.kin(dest.pid) if dest.pid else ()
        return [(pid, of) for pid in kin if (of := self.reads.of(pid)) is not None]

    @staticmethod
    def _one(dest: Dest, read: Read, link: Link, confidence: float) -> Left:
        """A plain copy: the source's size left, unless less was seen to arrive."""
        size, arrived = read.size, dest.size
        less = size if arrived is None or (size is not None and size < arrived) else arrived
        return Left(read, less, "lineage" if link == "process" and read.via else link, confidence)

    @staticmethod
    def _same_name(of: ReadsOf, dest: Dest, own: bool) -> Read | None:
        """A read of this name, and of this size as far as that is known; fresh before used."""
        size = dest.size
        if size is None:
            return None
        for name in dest.names:
            read = of.only_named(name)
            if read is not None and (read.stat is None or read.stat[0] in (size, None)):
                return read
            fitting = (each for each in of.named(name) if each.stat is None or each.stat[0] in (size, None))
            two = list(islice(fitting, 2))
            if not two:
                continue
            last, alone = two[0], len(two) == 1 or two[1].last[0] != two[0].last[0]
            if own and alone and last.fresh and last.last[0] == dest.first_order - 1:
                return last
            beside = of.beside(dest.path[: dest.path.rfind("/") + 1], name)
            return beside if beside is not None and (beside.stat is None or beside.stat[0] in (size, None)) else last
        return None

    def _explained(self, dest: Dest) -> bool:
        """Whether the writer holds an unprotected file of exactly this size, and no protected one."""
        entry = self._people.who(dest.pid)
        held = [*dest.files, *(entry.files if entry is not None else [])]
        same = [each for each in held if each.size == dest.size and each.path != dest.path and each.key != dest.key]
        return bool(same) and not any(self._protected(each.path) for each in same)

    def _same_size(self, dest: Dest, of: ReadsOf, link: Link) -> list[Left]:
        """The one read of exactly the size that arrived."""
        sizes = {dest.size, (dest.size or 0) - dest.base} - {None, 0}
        same = [read for size in sizes for read in islice(of.sized(size), _SEARCHED) if read.since[0] < dest.closed_order]  # type: ignore[arg-type]
        same = [read for read in same if not self._reserved(dest, read)]
        fresh = [read for read in same if read.fresh]
        if len(fresh) == 1:
            in_window = fresh[0].last_ms >= dest.first_ms - _GRACE_MS
            return [self._one(dest, fresh[0], link, 0.85 if in_window else 0.7)]
        if fresh or same:
            return [self._one(dest, max(fresh or same, key=lambda read: read.since), link, 0.6 if fresh else 0.5)]
        return []

    def _moved_away(self, dest: Dest, own: ReadsOf) -> list[Left]:
        """mv: the one file that the writer opened meanwhile was gone before its size could be looked up."""
        meanwhile = list(islice(self._in_window(dest, own), 2))
        if len(meanwhile) == 1 and meanwhile[0].size is None:
            return [self._one(dest, meanwhile[0], "process", 0.75)]
        return []

    def _contained(self, dest: Dest, own: ReadsOf | None, kin: list[ReadsOf]) -> list[Left]:
        """tar, zip, gpg, cat a b: all that was read while the file was written, if enough arrived to hold it."""
        size, total, known, earlier = dest.size or 0, 0, True, False
        got: dict[str, tuple[Read, Link]] = {}
        near = self._near(dest, own, kin)
        first = next(near, None)
        if first is None and own is not None:
            near, earlier = self._earlier(dest, own), True
        for read, link in chain(() if first is None else (first,), near):
            opened = read.opened
            if opened in got:
                continue
            if 0 < size < (read.size or 0) and read.name in dest.names:
                return [self._one(dest, read, link, 0.7)]  # a plain copy that was cut off
            got[opened] = (read, link)
            total, known = total + (read.size or 0), known and read.size is not None
            if size < _LEAST_SHARE * total or (size <= _TINY and size < 0.8 * total):
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
        out = []
        for read, link in reversed(got.values()):
            via = "lineage" if read.via and link == "process" else link
            out.append(Left(read, read.size, via, sure if link == "process" else round(sure - 0.05, 2)))
        return out

    def _near(self, dest: Dest, own: ReadsOf | None, kin: list[ReadsOf]) -> Iterator[tuple[Read, Link]]:
        for read in self._in_window(dest, own) if own is not None else ():
            yield read, "process"
        for of in kin:
            for read in self._in_window(dest, of):
                yield read, "pipeline"

    @staticmethod
    def _earlier(dest: Dest, own: ReadsOf) -> Iterator[tuple[Read, Link]]:
        for read in islice(reversed(own.fresh), _MOST_EARLIER):
            if read.last_ms < dest.first_ms - _EARLIER_MS:
                return
            yield read, "process"

    def _in_window(self, dest: Dest, of: ReadsOf) -> Iterator[Read]:
        """Fresh reads between the first sight of a file and its close, newest first."""
        start = dest.first_ms - _GRACE_MS
        late = self.last_begun.get(dest.pid, 0) <= dest.first_order
        for read in reversed(of.fresh):
            if read.last[1] < start:
                return
            before = read.since[0] < dest.closed_order or dest.closed_order == dest.first_order
            if (before or (late and read.since[1] <= dest.at_ms)) and not self._reserved(dest, read):
                yield read

    def _reserved(self, dest: Dest, read: Read) -> bool:
        """Whether the same writer is writing another file of this read's name: it will want it."""
        name = read.name
        return self.names.get((dest.pid, name), 0) > (1 if dest.named == (dest.pid, name) else 0)

    def _by_time(self, dest: Dest) -> list[Left]:
        """Nobody knows the writer: somebody lately read a file of this name and size, or just now the only one of this size."""
        same: dict[str, Read] = {}
        for _, of in islice(self.reads.everyone(), 256):
            for name in dest.names:
                for read in islice(of.named(name), _SEARCHED):
                    if read.size == dest.size and dest.at_ms - read.last_ms <= _TIME_MS:
                        return [self._one(dest, read, "time", 0.4)]
            for read in islice(of.sized(dest.size or -1), _SEARCHED) if not dest.pid else ():
                if dest.at_ms - read.last_ms <= _TIME_ALONE_MS:
                    same[read.opened] = read
        return [Left(next(iter(same.values())), dest.size, "time", 0.3)] if len(same) == 1 else []
