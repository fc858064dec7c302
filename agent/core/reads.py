"""The protected files that processes opened: who could have what in hand.

Question: what did this process read, and which of it has not left yet? Owns: the reads of each pid, found by name and size in
constant time, bounded per process and in all. Must not know destinations or how a join is graded (`joins`).
A read is fresh until a join uses it up, and fresh again when the file is opened again; a used one still joins, but last.
`order` counts file facts, as of the first opening since it was last used: within one millisecond only it tells what came first.
"""

from collections import deque
from collections.abc import Iterator, Sequence

MOST_OF_ONE = 50_000
MOST_OF_ALL = 80_000


class Read:
    """One protected file that one process opened. `path` is the protected one, `via` the other name that was used."""

    __slots__ = ("at_ms", "inode", "key", "last_ms", "order", "path", "root", "size", "via")

    def __init__(self, key: bytes, path: str, root: str, size: int | None, inode: int | None, at_ms: int, via: str) -> None:
        self.key, self.path, self.root, self.size, self.inode = key, path, root, size, inode
        self.at_ms = self.last_ms = at_ms
        self.via = via
        self.order = 0

    @property
    def name(self) -> str:
        """The last part of the name under which it was opened."""
        return (self.via or self.path).rpartition("/")[2]


_Index = dict[object, "Read | list[Read] | deque[Read]"]
_LONG = 64


class ReadsOf:
    """All reads of one process. `fresh` and `used` are by file key, oldest first."""

    __slots__ = ("_by_name", "_by_size", "forgotten", "fresh", "last_ms", "used")

    def __init__(self) -> None:
        self.fresh: dict[bytes, Read] = {}
        self.used: dict[bytes, Read] = {}
        self._by_name: _Index = {}
        self._by_size: _Index = {}
        self.forgotten = 0
        self.last_ms = 0

    def __len__(self) -> int:
        """How many reads are kept."""
        return len(self.fresh) + len(self.used)

    def add(self, read: Read, order: int) -> int:
        """Take in a read, or the same file opened again. Returns by how many the number kept has changed."""
        unspent = self.fresh.pop(read.key, None)
        known = unspent or self.used.pop(read.key, None)
        if known is not None and (known.size, known.name) == (read.size, read.name):
            known.last_ms = read.last_ms
            read = known
        else:
            if known is not None:
                self._unindex(known)
            self._index(read)
        read.order = unspent.order if unspent is not None else order
        self.last_ms = read.last_ms
        self.fresh[read.key] = read
        change = 1 if known is None else 0
        if len(self.fresh) + len(self.used) > MOST_OF_ONE:
            change -= 1
            if not self.used:
                self.forgotten += 1
            self._unindex(_pop_first(self.used or self.fresh))
        return change

    def use(self, read: Read) -> None:
        """A join took it."""
        if self.fresh.pop(read.key, None) is not None:
            self.used[read.key] = read
            for index, at in ((self._by_name, hash((read.name, read.size))), (self._by_size, read.size)):
                if type(index.get(at)) in (list, deque):  # to the end, so that a search meets fresh ones first
                    _drop(index, at, read)
                    _put(index, at, read)

    def named(self, name: str, size: int | None) -> Iterator[Read]:
        """Reads of a file of this name and size; with `size` None, of those whose size was not known."""
        return (read for read in _all(self._by_name, hash((name, size))) if read.name == name and read.size == size)

    def sized(self, size: int) -> Sequence[Read]:
        """Reads of files of exactly this size."""
        return _all(self._by_size, size)

    def _index(self, read: Read) -> None:
        _put(self._by_name, hash((read.name, read.size)), read)
        if read.size is not None:
            _put(self._by_size, read.size, read)

    def _unindex(self, read: Read) -> None:
        _drop(self._by_name, hash((read.name, read.size)), read)
        if read.size is not None:
            _drop(self._by_size, read.size, read)


class Reads:
    """Reads by pid, the least recently active process first to be forgotten."""

    def __init__(self) -> None:
        self._of: dict[int, ReadsOf] = {}
        self._count = 0

    def add(self, pid: int, read: Read, order: int) -> None:
        """Process `pid` opened a protected file."""
        of = self._of.pop(pid, None) or ReadsOf()
        self._of[pid] = of
        self._count += of.add(read, order)
        while self._count > MOST_OF_ALL and len(self._of) > 1:
            self.forget(next(iter(self._of)))

    def of(self, pid: int) -> ReadsOf | None:
        """What `pid` read, None if nothing is known."""
        return self._of.get(pid)

    def forget(self, pid: int) -> None:
        """The process is over, or began a new life."""
        gone = self._of.pop(pid, None)
        if gone is not None:
            self._count -= len(gone)

    def everyone(self) -> Iterator[tuple[int, ReadsOf]]:
        """All processes with reads, the most recently active first."""
        return ((pid, self._of[pid]) for pid in reversed(self._of))

    def __len__(self) -> int:
        """How many reads are kept."""
        return self._count


def _pop_first(reads: dict[bytes, Read]) -> Read:
    return reads.pop(next(iter(reads)))


def _put(index: _Index, at: object, read: Read) -> None:
    known = index.get(at)
    if known is None:
        index[at] = read
    elif isinstance(known, Read):
        index[at] = [known, read]
    elif len(known) == _LONG and isinstance(known, list):
        index[at] = deque((*known, read))  # short queues are lists, for a deque takes 600 bytes
    else:
        known.append(read)


def _all(index: _Index, at: object) -> Sequence[Read]:
    known = index.get(at)
    return () if known is None else (known,) if isinstance(known, Read) else known


def _drop(index: _Index, at: object, read: Read) -> None:
    known = index.get(at)
    if known is read:
        del index[at]
    elif known is not None and not isinstance(known, Read):
        known.remove(read)
        if not known:
            del index[at]
