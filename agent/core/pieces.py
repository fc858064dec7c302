"""What a writer cuts in pieces: many files, each too small to hold what was read, together as large as that.

Question: is a small file one of many that hold a source together? Owns: what each writer wrote lately to each medium, file by
file, and which sources were found in it, with the bytes told of each so far. Must not know reads or kin; `grading` finds the
sources and says so (`found`).
"""

from agent.core.dest import Dest, Left

TINY = 256
"""A file of so few bytes may be a count or a checksum"""
_PIECES_MS = 60_000
_MOST_WRITERS = 4_096
_ENCODED = 1.4
"""Base64 makes four bytes of three, with line ends a little more."""


class _Source:
    """A source that is being cut in pieces: `given` bytes were found in pieces, `counted` of them told as left."""

    __slots__ = ("counted", "given", "left")

    def __init__(self, left: Left, given: int, counted: int) -> None:
        self.left, self.given, self.counted = left, given, counted


class _Written:
    """What one writer wrote to one medium lately, file by file: `bytes` in all, and what of its reads was found in it."""

    __slots__ = ("bytes", "equal", "last_ms", "size", "sources")

    def __init__(self) -> None:
        self.bytes = self.last_ms = self.size = self.equal = 0
        self.sources: list[_Source] = []


class Pieces:
    """`wrote` for each file that is no plain copy, `written` and `found` while one is graded, `another` for what is no copy
    by itself."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, str], _Written] = {}

    def written(self, dest: Dest) -> int:
        """Bytes that the writer of `dest` wrote lately, this file among them."""
        pieces, size = self._of.get((dest.pid, dest.medium)), dest.size or 0
        return size if pieces is None else max(size, pieces.bytes)

    def found(self, dest: Dest, out: list[Left], piece: bool) -> list[Left]:
        """These sources are in what was written; `piece`: `dest` holds a part of them only. Returns what `dest` adds."""
        pieces = self._of.get((dest.pid, dest.medium))
        if pieces is None:
            return out
        pieces.sources = [_Source(each, 0, 0 if piece else each.bytes or 0) for each in out]
        pieces.size, pieces.equal = dest.size or 0, 0
        further = self.another(dest)
        return further if piece else out

    def wrote(self, dest: Dest) -> None:
        """A file that is no plain copy was closed: what one writer cuts in pieces is only much in all."""
        size = dest.size or 0
        if size <= TINY or not dest.pid or any(each.size == size for each in dest.files):
            return
        at = (dest.pid, dest.medium)
        pieces = self._of.pop(at, None)
        if pieces is None or not 0 <= dest.at_ms - pieces.last_ms <= _PIECES_MS:
            pieces = _Written()
        self._of[at] = pieces
        pieces.bytes, pieces.last_ms = pieces.bytes + size, dest.at_ms
        if len(self._of) > _MOST_WRITERS:
            del self._of[next(iter(self._of))]

    def disproved(self, dest: Dest) -> None:
        """What was found in this file is not in there, so nor is it in its like."""
        pieces = self._of.get((dest.pid, dest.medium))
        if pieces is not None:
            pieces.sources, pieces.equal = [], 0
            pieces.bytes = max(0, pieces.bytes - (dest.size or 0))

    def another(self, dest: Dest) -> list[Left]:
        """A further piece of what was found in pieces of the same size just before (the last one is smaller), source by
        source: its bytes count as far as those of the source were not counted yet."""
        pieces, rest = self._of.get((dest.pid, dest.medium)), dest.size or 0
        if pieces is None or not pieces.sources or rest <= TINY:
            return []
        if rest != pieces.size and (rest > pieces.size or pieces.equal < 2):
            return []
        pieces.equal += 1
        out = []
        for source in pieces.sources:
            size = source.left.bytes or 0
            take = min(rest, int(size * _ENCODED) - source.given)
            if take > 0:
                counts = min(take, size - source.counted)
                source.given, source.counted, rest = source.given + take, source.counted + counts, rest - take
                out.append(source.left._replace(bytes=counts, confidence=min(source.left.confidence, 0.5)))
        return out
