"""Which files an archive on a medium says it holds, and which files are archives at all: short, bounded looks.

Question: can this file have come out of that one? Owns: the formats' first bytes; the lists of zip (APPNOTE.TXT 4.3.12) and
of tar that is not packed (ustar, with GNU's and pax' longer names); the size that gzip keeps of what it packed (RFC 1952). An
archive that is packed as a whole is never unpacked: its bytes are a stranger's, and the agent is root. Must not know who opened
it, or why.
At most LISTED members are read, from LIST_BYTES of a list, for BUDGET_S; the last few lists are remembered.
"""

import os
import re
import struct
import time
from collections.abc import Iterator

LISTED, LIST_BYTES, BUDGET_S = 50_000, 8 << 20, 0.2
_REMEMBERED = 4
_TAIL = 65_557
"""The end-of-directory record of a zip and the longest comment after it"""
_PACKED = (
    *(b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\x1f\x9d", b"7z\xbc\xaf\x27\x1c", b"Rar!"),
    *(b"MSCF", b"!<arch>\n", b"070701", b"070702", b"070707", b"hsqs", b"\xed\xab\xee\xdb", b"LZIP", b"]\0\0"),
)
"""gzip, bzip2, xz, zstd, lz4, compress, 7z, rar, cab, ar (deb), cpio, squashfs, rpm, lzip, lzma"""
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")
_EOCD, _MEMBER, _TAR = struct.Struct("<4s4H2LH"), struct.Struct("<4s6H3L5H2L"), 512
_Member = tuple[bytes, int]
"""The last part of a member's name, and its size"""


class Archive:
    """What is known of one file: whether it is an archive, its members (None: it keeps no list that may be read), or the one
    size of what is in it."""

    __slots__ = ("is_one", "members", "unpacked_size")

    def __init__(self, is_one: bool, members: frozenset[_Member] | None = None, unpacked_size: int | None = None) -> None:
        self.is_one, self.members, self.unpacked_size = is_one, members, unpacked_size

    def holds(self, name: bytes, size: int) -> bool | None:
        """Whether a file of this name and size is in it by its own list; None: it keeps none."""
        if self.members is not None:
            return (name, size) in self.members
        return True if self.unpacked_size == size and size else None


class Archives:
    """`of(path)`: remembered for the last few."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int, int, int], Archive] = {}

    def of(self, path: bytes) -> Archive | None:
        """A file that may be an archive; None if it can't be read any more."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return None
        try:
            seen = os.fstat(fd)
            at = (path, seen.st_size, seen.st_mtime_ns, seen.st_ino)
            known = self._known.pop(at, None) or _look(fd, seen.st_size)
        except OSError:
            return None
        finally:
            os.close(fd)
        self._known[at] = known
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return known


def is_archive(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an archive or of something packed."""
    return head.startswith((b"PK", *_PACKED)) or head[257:262] == b"ustar"


def _look(fd: int, size: int) -> Archive:
    head = os.pread(fd, _TAR, 0)
    if head.startswith(b"PK"):
        return Archive(True, _zip_members(fd, size))
    if head[257:262] == b"ustar":
        return Archive(True, _tar_members(fd, size))
    if head.startswith(b"\x1f\x8b") and size > 18:
        return Archive(True, None, int.from_bytes(os.pread(fd, 4, size - 4), "little"))
    return Archive(head.startswith(_PACKED))


def _zip_members(fd: int, size: int) -> frozenset[_Member] | None:
    """Names and sizes by the central directory; None where that is missing, too large (zip64) or makes no sense."""
    tail = os.pread(fd, _TAIL, max(0, size - _TAIL))
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _EOCD.size > len(tail):
        return None
    _, _, _, _, count, length, offset, _ = _EOCD.unpack_from(tail, at)
    if count > LISTED or length > LIST_BYTES or offset + length > size:
        return None
    listed = os.pread(fd, length, offset)
    members: set[_Member] = set()
    at = 0
    while at + _MEMBER.size <= len(listed) and listed[at : at + 4] == b"PK\x01\x02":
        fields = _MEMBER.unpack_from(listed, at)
        unpacked, name_length, extra, comment = fields[9], fields[10], fields[11], fields[12]
        name = listed[at + _MEMBER.size : at + _MEMBER.size + name_length]
        members.add((name.rpartition(b"/")[2], unpacked))
        at += _MEMBER.size + name_length + extra + comment
    return frozenset(members)


def _tar_members(fd: int, size: int) -> frozenset[_Member] | None:
    """Names and sizes by the headers, one pread each; None if there are too many, or the medium is too slow."""
    members: set[_Member] = set()
    deadline = time.monotonic() + BUDGET_S
    for count, member in enumerate(_tar_headers(fd, size)):
        if count >= LISTED or time.monotonic() > deadline:
            return None
        members.add(member)
    return frozenset(members)


def _tar_headers(fd: int, size: int) -> Iterator[_Member]:
    at, long_name = 0, b""
    while at + _TAR <= size:
        header = os.pread(fd, _TAR, at)
        if len(header) < _TAR or not header[0]:
            return
        try:
            length = _number(header[124:136])
        except ValueError:
            return
        kind, at = header[156:157], at + _TAR
        if kind == b"L":  # GNU: the next member's name is longer than its field
            long_name = os.pread(fd, min(length, 4096), at).rstrip(b"\0")
        elif kind == b"x":  # pax: the same, among other records
            named = _PAX_PATH.search(os.pread(fd, min(length, 8192), at))
            long_name = named[1] if named else b""
        elif kind in (b"0", b"\0"):
            name = long_name or header[:100].split(b"\0", 1)[0]
            yield name.rpartition(b"/")[2], length
            long_name = b""
        at += (length + _TAR - 1) // _TAR * _TAR


def _number(field: bytes) -> int:
    """A size in a tar header: octal digits, or base 256 where the first bit is set (GNU). Raises ValueError."""
    if field[0] & 0x80:
        number = int.from_bytes(field[1:], "big")
        if number >> 60:
            raise ValueError("no file is so large")
        return number
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
