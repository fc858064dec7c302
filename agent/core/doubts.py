"""Joins on media that amounts alone suggest: the bytes are asked before anything is told, and what follows from the answer.

Question: is what was read really in what was written? Owns: which joins are in doubt (all but a plain copy, whose name and
size agree), what the edge is asked to compare (`asked`, answered by `facts.Compared`), one file at a time in the order of
their settling, and how the answer changes a join. Bytes that agree make it sure, whoever wrote them; bytes that can't be of
these sources, or are those of an unprotected file that the writer had in hand (a decoy), end it. What nobody can know
(encrypted, gone, not answered) stays as it was graded. Must not know how a join is graded, or when a file settles (`joins`).
"""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

from agent.core.dest import Dest, Left
from agent.core.facts import OpenFile
from agent.core.pieces import TINY
from agent.core.reads import Read

WAIT_MS = 300
_COMPARED = 64
_MOST_A_SECOND = 256
"""Comparisons take some milliseconds each of the thread that senses; what is in doubt beyond is told as it was graded"""
_MOST_GUESSED = 16
"""The same of files that nothing joins: they must not take the place of those that something does"""
_PLAIN = 0.9
_SURE = 0.9
_LATELY = 16
_MOST_WRITERS = 1_024
_MOST_ELSEWHERE = 4_096
_MOST_DECOYS = 8
_AT_ONCE_MS, _BYTES_A_MS = 100, 500
"""A program that cuts what it packs in pieces begins the next one at once, and packs at least so much"""
_BENEATH_MS = 2_000
"""The server of a view writes what it was given at once, but the kernel tells of both in either order"""
_SERVED = ("fuse", "nfs", "cifs", "smb", "9p")


class Doubt(NamedTuple):
    """Compare the file at `path` on a medium, of `size` bytes, with the `sources` that it was joined to.

    `others` were read meanwhile, too; `whole`: these two are all. `piece`: it may be one of several that hold a source
    together. `decoys` are unprotected files of its very size. Paths as they were opened. `only`: nothing joins them but the
    bytes, so it must be told which of the sources are in it.
    """

    key: bytes
    path: str
    size: int
    sources: list[str]
    others: list[str]
    whole: bool
    piece: bool
    decoys: list[str]
    only: bool = False


class _Wrote(NamedTuple):
    key: bytes
    size: int
    at_ms: int


class Doubts:
    """`ask`, then `answered`; `wrote` for what was written to media, `elsewhere` for what was written to the machine."""

    def __init__(self, protected: Callable[[OpenFile], bool]) -> None:
        self._protected = protected
        self.asked: list[Doubt] = []
        self._open: tuple[Dest, list[Left], list[OpenFile], bool] | None = None
        self.until_ms = self._second = self._count = self._guesses = 0
        self._wrote: dict[tuple[int, str], deque[_Wrote]] = {}
        self._shown: dict[tuple[str, int], int] = {}
        self._elsewhere: dict[bytes, OpenFile] = {}
        self._sized: dict[int, dict[bytes, None]] = {}

    @property
    def open(self) -> bytes | None:
        """The key of the file that is being compared."""
        return self._open[0].key if self._open is not None else None

    def overdue(self, now_ms: int) -> bool:
        """Whether the edge did not answer in time."""
        return self._open is not None and not 0 < self.until_ms - now_ms <= WAIT_MS

    # -- what is written -----------------------------------------------------------------------------------------------

    def wrote(self, dest: Dest) -> None:
        """A file that is no plain copy was closed on a medium."""
        at = (dest.pid, dest.medium)
        wrote = self._wrote.pop(at, None)
        self._wrote[at] = wrote = wrote if wrote is not None else deque(maxlen=_LATELY)
        wrote.append(_Wrote(dest.key, dest.size or 0, dest.at_ms))
        if len(self._wrote) > _MOST_WRITERS:
            del self._wrote[next(iter(self._wrote))]

    def shown(self, dest: Dest) -> None:
        """A file was closed in a view of a medium: its server writes the same beneath, for whoever wrote it there."""
        at = (dest.medium, dest.size or 0)
        self._shown.pop(at, None)
        self._shown[at] = dest.at_ms
        if len(self._shown) > _MOST_WRITERS:
            del self._shown[next(iter(self._shown))]

    def elsewhere(self, file: OpenFile) -> None:
        """An unprotected file was written, or held by who wrote to a medium: what has its bytes has not those of another."""
        known = self._elsewhere.pop(file.key, None)
        if known is not None:
            self._forget(known)
        if not file.key or not file.size:
            return
        self._elsewhere[file.key] = file
        self._sized.setdefault(file.size, {})[file.key] = None
        if len(self._elsewhere) > _MOST_ELSEWHERE:
            self._forget(self._elsewhere.pop(next(iter(self._elsewhere))))

    def _forget(self, file: OpenFile) -> None:
        same = self._sized.get(file.size, {})
        same.pop(file.key, None)
        if not same:
            self._sized.pop(file.size, None)

    # -- asking --------------------------------------------------------------------------------------------------------

    def ask(self, dest: Dest, left: list[Left], near: Callable[[], Iterable[Read]], held: list[OpenFile], now_ms: int) -> bool:
        """Ask the edge, if this join is in doubt and can be compared. `near` are all that can be in it, `held` what its writer
        had open."""
        mount = dest.mount
        if not left or mount is None or not dest.size or self._open is not None or _plain(dest, left):
            return False
        if mount.way != "mount" or mount.view or mount.fs.startswith(_SERVED):
            return False  # a server that may be slow, or gone, would be asked
        sources = dict.fromkeys(each.read.opened for each in left)
        others = dict.fromkeys(read.opened for read in islice(near(), _COMPARED + 1) if read.opened not in sources)
        decoys, whole = self._decoys(dest, held), len(sources) + len(others) <= _COMPARED
        if not (whole or decoys) or not self._may_ask(now_ms):
            return False
        named = list(sources)[:_COMPARED]
        rest = list(others)[: _COMPARED - len(named)]
        paths = [each.path for each in decoys]
        self.asked.append(Doubt(dest.key, dest.path, dest.size, named, rest, whole, self._piece(dest), paths))
        self._open, self.until_ms = (dest, left, decoys, False), now_ms + WAIT_MS
        return True

    def ask_only(self, dest: Dest, left: list[Left], now_ms: int) -> bool:
        """Ask which of these are in a file that nothing joins to them; what the bytes don't say is not in there."""
        mount = dest.mount
        if not left or mount is None or mount.view or mount.way != "mount" or mount.fs.startswith(_SERVED):
            return False
        if not dest.size or self._open is not None or self._beneath(dest) or not self._may_guess(now_ms):
            return False
        sources = list(dict.fromkeys(each.read.opened for each in left))[:_COMPARED]
        self.asked.append(Doubt(dest.key, dest.path, dest.size, sources, [], False, False, [], True))
        self._open, self.until_ms = (dest, left, [], True), now_ms + WAIT_MS
        return True

    def _beneath(self, dest: Dest) -> bool:
        """Whether it is what a file in a view of this medium, which is told for itself, is made of."""
        shown_ms = self._shown.get((dest.medium, dest.size or 0))
        return shown_ms is not None and abs(dest.at_ms - shown_ms) <= _BENEATH_MS

    def _may_ask(self, now_ms: int) -> bool:
        self._begin_second(now_ms)
        self._count += 1
        return self._count <= _MOST_A_SECOND

    def _may_guess(self, now_ms: int) -> bool:
        self._begin_second(now_ms)
        self._guesses += 1
        return self._guesses <= _MOST_GUESSED

    def _begin_second(self, now_ms: int) -> None:
        if self._second != now_ms // 1000:
            self._second, self._count, self._guesses = now_ms // 1000, 0, 0

    def _decoys(self, dest: Dest, held: list[OpenFile]) -> list[OpenFile]:
        size = dest.size or 0
        known = [self._elsewhere[key] for key in islice(reversed(self._sized.get(size, {})), _MOST_DECOYS)]
        same = [each for each in (*held, *known) if each.size == size and each.path != dest.path and each.key != dest.key]
        return [each for each in {each.path: each for each in same}.values() if not self._protected(each)][:_MOST_DECOYS]

    def _piece(self, dest: Dest) -> bool:
        """Whether its writer wrote others of its size just before or after, or larger ones that have one size."""
        size = dest.size or 0
        if size <= TINY:
            return False
        near_ms = _AT_ONCE_MS + size // _BYTES_A_MS
        others = [
            each.size
            for each in self._wrote.get((dest.pid, dest.medium), ())
            if each.key != dest.key and each.size >= size and abs(each.at_ms - dest.at_ms) <= near_ms
        ]
        return size in others or len(others) != len(set(others))

    # -- the answer ----------------------------------------------------------------------------------------------------

    def answered(self, alike: str, held: dict[str, int]) -> tuple[Dest, list[Left], bool]:
        """What is in the file that was in doubt; True: it was found not to be what its join said."""
        assert self._open is not None
        (dest, left, decoys, only), self._open = self._open, None
        self.asked.clear()
        if only:
            return dest, [_sure(each._replace(bytes=held[at])) for each in left if (at := each.read.opened) in held], False
        if alike == "same":
            return dest, [_sure(each) for each in left], False
        if alike == "decoy" and decoys and not any(self._protected(each) for each in decoys):
            for each in decoys:
                self.elsewhere(each)
            return dest, [], True
        return dest, [] if alike == "other" else left, alike == "other"


def _plain(dest: Dest, left: list[Left]) -> bool:
    one = left[0]
    return len(left) == 1 and one.confidence >= _PLAIN and one.read.name in dest.names and one.read.size == dest.size


def _sure(left: Left) -> Left:
    """Its bytes were found there."""
    return left._replace(confidence=max(left.confidence, _SURE), link="content" if left.link == "time" else left.link)
