"""Whether a file on a medium can hold what it was joined to: a look at both, shorter than the one at copies elsewhere.

Question: are bytes of the sources in it; if not, can they be? Owns: the rules by which that is ruled out. They are strict, as
"other" means that nothing is told: no window and hardly a word of any read file is in it, and it is smaller than the smallest
of them can be packed, or plain text as they are, or the very bytes of an unprotected file of its size. Whatever is encrypted,
packed, encoded or compared in part only stays unknown. Must not know names, programs or policy.

At most `HEAD` bytes and some blocks of the file are read and it is closed at once: nothing on a medium stays open for longer
than that takes. Nothing is written there, not even a time of access. Nothing of the contents is kept or leaves this room.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent.contract.event import path_bytes
from agent.core.facts import Compared, Fact
from agent.sense import inside, likeness

HEAD = 1 << 20
_OF_SOURCES = 8 << 20
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_WINDOWS = 6
_WINDOWS_IN_ALL = 48
_TINY = 64
_FEW_WORDS, _WORDS, _WORDS_LEAST = 0.15, 24, 8
_SAME_AMOUNT = 0.02
_RUN = 32
_FEW = 8
"""So many sources are looked into whatever the file is; more, only if it may be made of them"""


Question = tuple[bytes, str, int, list[str], list[str], bool, bool, list[str], bool]
"""See `core.doubts.Doubt`"""


class _Seen(NamedTuple):
    """What was read of a file: its first bytes, and blocks spread over it."""

    size: int
    head: bytes
    blocks: list[bytes]


def look(asked: Iterable[Question], now_ms: int) -> Iterator[Fact]:
    """Compared for each question."""
    for key, path, size, sources, others, whole, piece, decoys, only in asked:
        held: dict[str, int] = {}
        try:
            if only:
                held = _held(path, size, sources)
                alike = "same" if held else "unknown"
            else:
                alike = _judge((path, size), sources, others, decoys, whole and not piece)
        except OSError:
            alike = "unknown"  # a medium that was pulled, a disk that fails
        yield Compared(at_ms=now_ms, key=key, path=path, size=size, alike=alike, held=held)


def _judge(file: tuple[str, int], sources: list[str], others: list[str], decoys: list[str], may_deny: bool) -> str:
    path, size = file
    copy = _read(path, HEAD)
    if copy is None:
        return "gone"
    if copy.size != size or not copy.size:
        return "unknown"  # somebody writes to it again
    most = _OF_SOURCES // max(1, len(sources) + len(others))
    held = [seen for other in sources if (seen := _read(other, most)) is not None]
    if any(source.size == copy.size and _same(copy, source) for source in held):
        return "same"
    if any(_same(copy, decoy) for other in decoys if (decoy := _read(other, HEAD)) is not None):
        return "decoy"
    if held and _agrees(copy, [source.head for source in held]):
        return "same"
    everything = [*held, *(seen for other in others if (seen := _read(other, most)) is not None)]
    if not may_deny or len(everything) != len(sources) + len(others):
        return "unknown"
    if any(source.size > len(source.head) for source in everything):
        return "unknown"  # a part from further on
    if _touches(copy, everything):
        return "unknown"
    return "other" if _too_small(copy, everything) or _another_text(copy, everything) else "unknown"


def _held(path: str, size: int, sources: list[str]) -> dict[str, int]:
    """Those of the sources that are in a file, with the bytes of each."""
    copy = _read(path, HEAD)
    if copy is None or copy.size != size:
        return {}
    text, image = inside.values(copy.head), inside.may_be_image(size)
    few = len(sources) <= _FEW or inside.may_be_unpacked(copy.head)
    if not (text or image or few or any(_size(source) == size for source in sources)):
        return {}
    most = _OF_SOURCES // max(1, len(sources))
    there = {source: seen for source in sources if (seen := _read(source, most)) is not None and seen.size}
    held = {source: size for source, seen in there.items() if seen.size == size and _same(copy, seen)}
    if held:
        return held
    if size == len(copy.head):
        held = {s: size for s, seen in there.items() if size < seen.size and inside.extract_of(copy.head, seen.head)}
        if not held and (got := inside.unpacked(copy.head)) is not None:
            plain, count = got
            held = {s: min(seen.size, count) for s, seen in there.items() if likeness.shared(plain, [seen.head])}
    if not held and text:
        held = {s: min(size, seen.size) for s, seen in there.items() if inside.export_of(copy.head, seen.head)}
    if not held and image:
        with os.fdopen(os.open(path_bytes(path), _FLAGS | os.O_NOATIME), "rb", buffering=0) as file:
            heads = {source: (seen.head, seen.size) for source, seen in there.items()}
            held = {source: there[source].size for source in inside.in_image(file.fileno(), size, heads)}
    return held


def _size(path: str) -> int:
    try:
        return os.stat(path_bytes(path)).st_size  # noqa: PTH116 (raw bytes)
    except (OSError, ValueError):
        return -1


def _read(path: str, most: int) -> _Seen | None:
    """The first `most` bytes of a regular file, and blocks of the rest; None if it can't be had."""
    raw = path_bytes(path)
    try:
        fd = os.open(raw, _FLAGS | os.O_NOATIME)
    except (OSError, ValueError):
        return None  # gone, or refused
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return None
        head = os.pread(fd, min(most, found.st_size), 0)
        rest = found.st_size - likeness.BLOCK
        places = likeness.places(found.st_size, likeness.BLOCKS, likeness.BLOCK) if rest > 0 else ()
        return _Seen(found.st_size, head, [os.pread(fd, likeness.BLOCK, at) for at in places])
    finally:
        os.close(fd)


def _same(one: _Seen, other: _Seen) -> bool:
    least = min(len(one.head), len(other.head))
    return one.size == other.size and one.blocks == other.blocks and one.head[:least] == other.head[:least]


def _agrees(copy: _Seen, heads: list[bytes]) -> bool:
    """The look that is taken at copies elsewhere, too: parts, encodings, the words of an export."""
    if copy.size <= _TINY:
        return False  # so few bytes are in many files
    return likeness.shared(copy.head, heads) or likeness.words(copy.head, heads)


def _touches(copy: _Seen, sources: list[_Seen]) -> bool:
    """Whether any window of one is in the other, as it is or decoded, or too many words are."""
    heads = [source.head for source in sources]
    if copy.size <= _TINY:
        bare = copy.head.strip()
        return not bare or any(bare in head for head in heads)
    ours = [copy.head, *likeness.decoded(copy.head)]
    if any(window in head for each in ours for window in _windows(each, _WINDOWS) for head in heads):
        return True
    each = max(1, _WINDOWS_IN_ALL // len(sources))
    return any(window in mine for head in heads for window in _windows(head, each) for mine in ours)


def _windows(data: bytes, count: int) -> Iterator[bytes]:
    for at in likeness.places(len(data), count, likeness.WINDOW):
        window = data[at : at + likeness.WINDOW]
        if len(set(window)) >= min(likeness.PLAIN_DISTINCT, len(window)):
            yield window


def _too_small(copy: _Seen, sources: list[_Seen]) -> bool:
    """Whether not even the smallest source can be in it, however it was packed."""
    return all(copy.size < source.size and copy.size < likeness.least_packed(source.size, source.head) for source in sources)


def _another_text(copy: _Seen, sources: list[_Seen]) -> bool:
    """Whether it is text in plain, as all the sources are, and hardly a word of theirs is in it."""
    if not _plain_text(copy.head) or not all(_plain_text(source.head) for source in sources):
        return False
    sizes = [*(source.size for source in sources), sum(source.size for source in sources)]
    if any(abs(copy.size - size) <= size * _SAME_AMOUNT for size in sizes):
        return False  # letters may have been exchanged one by one
    some = likeness.some_words(copy.head)
    some = some[:: -(-len(some) // _WORDS) or 1]
    found = sum(any(word in source.head for source in sources) for word in some)
    return len(some) >= _WORDS_LEAST and found <= len(some) * _FEW_WORDS


def _plain_text(head: bytes) -> bool:
    """Words with blanks between them: neither packed, nor written in letters or digits that stand for other bytes."""
    if b"\0" in head or not head:
        return False
    some = head[:65_536]
    words = some.split()
    runs = sum(len(word) for word in words if len(word) >= _RUN)
    digits = len(some) - len(some.translate(None, b"0123456789abcdefABCDEF"))
    solid = sum(map(len, words))
    return solid > 0 and runs < solid / 2 and digits < solid * 0.6 and likeness.evenness(some) < likeness.EVEN
