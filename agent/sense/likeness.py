"""Whether one file holds bytes of others: a look at both, short and bounded.

Question: was this written from those, or only by the same program? Owns: the probes. Equal size: blocks at the same places.
Else windows of the sources are searched for in the file (tar, cat), windows of the file in the sources (split, an extract),
also decoded (base64, hex); words of a text in the sources (an export of a database). A file in which nothing repeats itself
may be packed or encrypted; then its size must be what such sources come to. Must not know who wrote it, names or policy.

At most the first SEARCHED bytes of the file, and as many of all sources, are read and searched, in about 10 ms; a piece of one
large source is looked for in the rest of it for BUDGET_S. Nothing is kept, nothing of the contents leaves this room.
"""

import base64
import binascii
import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack

SEARCHED = 4 << 20
BUDGET_S = 0.1
BLOCK, WINDOW, _PROBES, BLOCKS = 4096, 48, 12, 16
_SAMPLE = 65_536
_LEAST = 64
PLAIN_DISTINCT = 8
_ENOUGH = 1 / 3
_GIVE_UP = 5
"""Windows looked for in vain, one after the other: what is not found by then is not there."""
_WORDS, _WORDS_LEAST, _WORDS_ENOUGH = 64, 8, 0.5
_WORD = re.compile(rb"[\w\x80-\xff@.+-]{5,40}")
_ARMOUR = re.compile(rb"[A-Za-z0-9+/=\r\n]+")
_HEX = re.compile(rb"[0-9a-fA-F\r\n]+")
EVEN = 0.88
"""A file whose bytes, each by itself, can't be written shorter than this is packed or encrypted."""
_TIGHT, _TIGHT_OF_SEVERAL, _HEAD = 0.3, 0.15, 512
"""How much smaller than a quick pass a thorough packer comes out, of one file and of several, which may have much in common;
bytes that a container adds for each file."""

_SHORT, _FULL = 16_384, 0.97
"""Blocks that a quick pass makes no smaller than this are random to any packer"""
_FULL_PACKED, _OTHERS_PACKED, _UNPACKED = 0.9, 0.3, 0.02
"""To which part of its quick size a packer may bring a file: random bytes, others, and what itself is a container or a picture,
which may be unpacked, made smaller and packed anew"""
_CONTAINERS = (
    *(b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"Rar!", b"\x1f\x9d"),
    *(b"%PDF", b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"OggS", b"ID3", b"fLaC", b"\x1aE\xdf\xa3", b"II*", b"MM\0*"),
    *(b"\xd0\xcf\x11\xe0", b"BM", b"SQLite", b"\x7fELF"),
)


class _File:
    """An open file: its size, and its first bytes. Never mapped: a file that shrinks meanwhile would end the agent (SIGBUS)."""

    __slots__ = ("fd", "head", "size")

    def __init__(self, fd: int, most: int) -> None:
        self.fd, self.size = fd, os.fstat(fd).st_size
        self.head = os.pread(fd, min(most, self.size), 0)

    def block(self, at: int) -> bytes:
        """A block of it, wherever that lies."""
        return os.pread(self.fd, BLOCK, at)


def compare(path: bytes, sources: list[tuple[bytes, int | None]], total: int) -> str:
    """One of `facts.Compared.alike`. `sources` are paths and sizes as read; `total` bytes of them all, named or not."""
    with ExitStack() as opened:
        copy = _open(path, SEARCHED, opened)
        if copy is None:
            return "gone"
        others = [source for source, _ in sources if source != path]
        each = SEARCHED // max(1, len(others))
        held = [file for source in others if (file := _open(source, each, opened)) is not None]
        if not held:
            return "unknown"
        try:
            return _judge(copy, held, total)
        except OSError:
            return "unknown"  # a disk that fails, a file system that went


def _judge(copy: _File, held: list[_File], total: int) -> str:
    heads = [file.head for file in held]
    if len(held) == 1 and held[0].size == copy.size:
        if _same_blocks(copy, held[0]):
            return "same"
    elif copy.size <= _LEAST:
        return "same" if any(copy.head in head for head in heads) else "other"
    elif len(held) == 1 and copy.size < held[0].size and _cut(copy, held[0]):
        return "part"
    elif _shared(copy, held, heads):
        return "same"
    if words(copy.head, heads):
        return "same"
    return "packed" if _packed(copy, held, total) else "other"


def shared(copy: bytes, heads: list[bytes]) -> bool:
    """Whether windows of the sources are in a file, as it is or decoded, or windows of it in them."""
    return _found(heads, [copy]) or any(_found([each], heads) for each in (copy, *decoded(copy)))


def _shared(copy: _File, held: list[_File], heads: list[bytes]) -> bool:
    """Whether bytes of the sources are in it, as they are or decoded, or bytes of it in them."""
    if shared(copy.head, heads):
        return True
    return len(held) == 1 and copy.size < held[0].size > SEARCHED and _further_on(copy.head, held[0])


def _open(path: bytes, most: int, opened: ExitStack) -> _File | None:
    """A file, with the first `most` bytes of it; None if it can't be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    opened.callback(os.close, fd)
    try:
        return _File(fd, most)
    except OSError:
        return None


def places(size: int, count: int, width: int) -> Iterator[int]:
    """Where to look in a file, spread over it."""
    if size <= width:
        yield 0
        return
    step = (size - width) / max(1, count - 1)
    yield from dict.fromkeys(int(step * number) for number in range(count))


def _same_blocks(one: _File, other: _File) -> bool:
    return all(one.block(at) == other.block(at) for at in places(one.size, BLOCKS, BLOCK))


def _cut(copy: _File, source: _File) -> bool:
    """Whether it is one piece of the source, byte for byte, as far as time allows."""
    first = copy.block(0)
    if len(set(first)) < PLAIN_DISTINCT:
        return False
    deadline, at, begin = time.monotonic() + BUDGET_S, source.head.find(first), len(source.head) - BLOCK
    while at < 0 and 0 <= begin < source.size - BLOCK and time.monotonic() < deadline:
        found = os.pread(source.fd, SEARCHED, begin).find(first)
        at = begin + found if found >= 0 else -1
        begin += SEARCHED - BLOCK
    blocks = ((copy.block(place), source.block(at + place)) for place in places(copy.size, BLOCKS, BLOCK))
    return at >= 0 and all(other.startswith(one) for one, other in blocks)


def _found(of: list[bytes], among: list[bytes]) -> bool:
    """Whether windows of some files occur in others, often enough."""
    each = max(2, _PROBES // len(of))
    asked = hits = missed = 0
    for data in of:
        for at in places(len(data), each, WINDOW):
            window = data[at : at + WINDOW]
            if len(set(window)) < min(PLAIN_DISTINCT, len(window)):
                continue  # blanks and zeros are everywhere
            asked += 1
            if any(window in other for other in among):
                hits, missed = hits + 1, 0
            else:
                missed += 1
            if missed >= _GIVE_UP:
                return False
    return hits > 0 and hits >= asked * _ENOUGH


def _further_on(copy: bytes, source: _File) -> bool:
    """Whether windows of a file occur in a source beyond its first bytes, as far as time allows."""
    windows = [copy[at : at + WINDOW] for at in places(len(copy), 4, WINDOW)]
    windows = [window for window in windows if len(set(window)) >= PLAIN_DISTINCT]
    deadline, at, hits = time.monotonic() + BUDGET_S, len(source.head) - WINDOW, 0
    while windows and at < source.size and time.monotonic() < deadline:
        chunk = os.pread(source.fd, SEARCHED, at)
        found = [window for window in windows if window in chunk]
        hits += len(found)
        windows = [window for window in windows if window not in found]
        if hits >= 2:
            return True
        at += SEARCHED - WINDOW
    return False


def decoded(copy: bytes) -> Iterator[bytes]:
    """Its first part in plain, if it is written in base64 or hex."""
    head = copy[:_SAMPLE]
    bare = head.translate(None, b"\r\n")
    try:
        if _HEX.fullmatch(head):
            yield bytes.fromhex(bare[: len(bare) // 2 * 2].decode("ascii"))
        elif _ARMOUR.fullmatch(head):
            yield base64.b64decode(bare[: len(bare) // 4 * 4])
    except (binascii.Error, ValueError):
        return


def some_words(copy: bytes) -> list[bytes]:
    """Words of a text, from all over it; none if it is no text."""
    many: dict[bytes, None] = {}
    for at in places(len(copy), BLOCKS, BLOCK):
        block = copy[at : at + BLOCK]
        if b"\0" in block:
            return []
        found = _WORD.findall(block)
        many |= dict.fromkeys(found[1 :: max(1, len(found) // (_WORDS // BLOCKS))])  # the first may be cut
    return list(many)[:_WORDS]


def words(copy: bytes, sources: list[bytes]) -> bool:
    """Whether the words of a text are those of the sources."""
    some = some_words(copy)
    if len(some) < _WORDS_LEAST:
        return False
    hits = missed = 0
    for word in some:
        if any(word in data for data in sources):
            hits, missed = hits + 1, 0
        else:
            missed += 1
        if missed >= 2 * _GIVE_UP:
            return False
    return hits >= len(some) * _WORDS_ENOUGH


def ratio(data: bytes, width: int = _SAMPLE) -> float:
    """How small a quick pass makes some blocks of it."""
    before = after = 0
    for at in places(len(data), 4, width):
        block = data[at : at + width]
        before, after = before + len(block), after + len(zlib.compress(block, 1))
    return after / before if before else 1.0


def evenness(data: bytes) -> float:
    """How short Huffman's code makes some blocks of it: what repeats does not count, for packed files may be alike."""
    before = after = 0
    for at in places(len(data), BLOCKS, BLOCK):
        block = data[at : at + BLOCK]
        coder = zlib.compressobj(1, zlib.DEFLATED, -15, strategy=zlib.Z_HUFFMAN_ONLY)
        before, after = before + len(block), after + len(coder.compress(block) + coder.flush())
    return after / before if before else 0.0


def least_packed(size: int, head: bytes) -> float:
    """The fewest bytes that a file can take, however it is packed."""
    if not head or head.startswith(_CONTAINERS) or head[4:8] == b"ftyp":
        return size * _UNPACKED
    quick = ratio(head, _SHORT)
    return size * (_FULL_PACKED if quick >= _FULL else quick * _OTHERS_PACKED)


def _packed(copy: _File, sources: list[_File], total: int) -> bool:
    size = copy.size
    if size < _LEAST or evenness(copy.head) < EVEN:
        return False
    if size < min(least_packed(file.size, file.head) for file in sources):
        return False
    known = sum(file.size for file in sources)
    small = sum(file.size * min(1.0, ratio(file.head)) for file in sources)
    whole = max(total, known)
    tight = _TIGHT if len(sources) == 1 else _TIGHT_OF_SEVERAL
    return whole * (small / known if known else 1.0) * tight <= size <= whole * 1.05 + _HEAD * (len(sources) + 4)
