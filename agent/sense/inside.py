"""Which of some files lie in another one: whole in a disk image, packed, as an extract of a few lines, or value by value.

Question: whose bytes are these, one source at a time? Owns: a look for sectors of the sources in an image (file systems, and
tar, keep file contents at multiples of 512 bytes), for windows of an extract in them, and in what a packed file is made of.
Nothing here says "no": what is not found is not known. Must not know names, programs or policy.

Bounded like `disproof.py`, which asks: an image is scanned for BUDGET_S, holes left out. A packed file is a stranger's bytes
and the agent is root; so it is unpacked by a process of its own that belongs to nobody, may take 192 MiB and half a second, and
sends back at most HEAD bytes and a count. By the first bytes of the content it is known what packed it, never by a name.
"""

import contextlib
import os
import re
import struct
import subprocess
import sys
import time

from agent.sense import likeness

HEAD = 1 << 20
BUDGET_S, _UNPACK_S = 0.1, 0.5
_SECTOR, _IMAGE, _CHUNK = 512, 1 << 16, 1 << 20
_OF_EACH = 8
_LEAST_SECTORS = 0.5
_LEAST = 2 * likeness.WINDOW
_WINDOWS, _MOST_OF_IT = 8, 2 / 3
_BETWEEN = re.compile(rb"[\t\r\n,;|\"'()]+")
_LEAST_VALUE, _LONGEST, _LEAST_VALUES, _MAY_MISS = 10, 200, 12, 0.2
_BLOCKS, _OF_BLOCK = 8, 8
_COUNT = struct.Struct("<Q")
_FIRST_BYTES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04")
"""Of what the standard library can unpack: gzip, bzip2, xz, zip"""
_CHILD = """
import bz2, lzma, os, resource, struct, sys, zlib
most, most_counted, memory = 1 << 20, 1 << 26, 192 << 20
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
data = sys.stdin.buffer.read()
out, count = bytearray(), 0

def opener(data):
    if data.startswith(b"\\x1f\\x8b"):
        return zlib.decompressobj(31), data
    if data.startswith(b"BZh"):
        return bz2.BZ2Decompressor(), data
    if data.startswith(b"\\xfd7zXZ\\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=memory // 2), data
    name, extra = struct.unpack_from("<HH", data, 26)
    packed = struct.unpack_from("<H", data, 8)[0] == 8
    return (zlib.decompressobj(-15) if packed else None), data[30 + name + extra:]

try:
    while data.startswith((b"\\x1f\\x8b", b"BZh", b"\\xfd7zXZ\\0", b"PK\\x03\\x04")) and count < most_counted:
        one, data = opener(data)
        while one is not None and not one.eof and count < most_counted:
            got = one.decompress(data, most)
            data = getattr(one, "unconsumed_tail", b"")
            out += got[: most - len(out)]
            count += len(got)
            if not got and not data:
                break
        data = one.unused_data if one is not None else data
        if not data.startswith((b"\\x1f\\x8b", b"BZh", b"\\xfd7zXZ\\0")):
            at = data.find(b"PK\\x03\\x04")
            data = data[at:] if at >= 0 else b""
except (EOFError, MemoryError, OSError, struct.error, zlib.error, lzma.LZMAError):
    pass  # damaged, cut off, or more than it may take: what was had until then is enough
sys.stdout.buffer.write(bytes(out) + struct.pack("<Q", count))
"""


def extract_of(copy: bytes, source: bytes) -> bool:
    """Whether a small file is made of a source, mostly."""
    if len(copy) < _LEAST:
        return False
    windows = [copy[at : at + likeness.WINDOW] for at in likeness.places(len(copy), _WINDOWS, likeness.WINDOW)]
    windows = [window for window in windows if len(set(window)) >= likeness.PLAIN_DISTINCT]
    return len(windows) > 1 and sum(window in source for window in windows) >= len(windows) * _MOST_OF_IT


def export_of(copy: bytes, source: bytes) -> bool:
    """Whether a text is made of the values that are in a source, as an export from a database is of what lies in its file.
    Words prove nothing, any two texts have them in common; values of ten bytes and more between separators do."""
    some = values(copy)
    missed = 0
    for value in some:
        missed += value not in source
        if missed > len(some) * _MAY_MISS:
            return False
    return len(some) >= _LEAST_VALUES


def values(copy: bytes) -> list[bytes]:
    """Different values of a text, from all over it; none if it is no text."""
    found: dict[bytes, None] = {}
    for at in likeness.places(len(copy), _BLOCKS, likeness.BLOCK):
        block = copy[at : at + likeness.BLOCK]
        if b"\0" in block:
            return []
        whole = _BETWEEN.split(block)[1:-1]  # the first and the last may be cut
        long = [value for value in whole if _LEAST_VALUE <= len(value) <= _LONGEST]
        found |= dict.fromkeys(long[:: max(1, len(long) // _OF_BLOCK)])
    return list(found)


def may_be_unpacked(head: bytes) -> bool:
    """Whether the first bytes of a file are those of something that can be unpacked here."""
    return head.startswith(_FIRST_BYTES)


def unpacked(whole: bytes) -> tuple[bytes, int] | None:
    """(the first bytes of what is packed in a file, how many there are as far as was counted); None: it is not packed so."""
    if not may_be_unpacked(whole):
        return None
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=whole, stdout=subprocess.PIPE, timeout=_UNPACK_S, cwd="/", env={}, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no memory, no time
    if len(done.stdout) <= _COUNT.size:
        return None
    (count,) = _COUNT.unpack(done.stdout[-_COUNT.size :])
    return done.stdout[: -_COUNT.size], count


def may_be_image(size: int) -> bool:
    """Whether a file of so many bytes can be one: of whole sectors, and no small one."""
    return size >= _IMAGE and not size % _SECTOR


def in_image(fd: int, size: int, heads: dict[str, tuple[bytes, int]]) -> set[str]:
    """Those of `heads` (path → first bytes, size) whose sectors lie in the file `fd`, a disk image or an archive like tar."""
    wanted: dict[bytes, set[str]] = {}
    asked: dict[str, int] = {}
    for path, (head, whole) in heads.items():
        for sector in _sectors(head, whole):
            wanted.setdefault(sector, set()).add(path)
            asked[path] = asked.get(path, 0) + 1
    found = dict.fromkeys(asked, 0)
    deadline, at = time.monotonic() + BUDGET_S, 0
    while wanted and at < size and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # ENXIO: nothing but a hole comes; or the file system does not tell of holes
            at = os.lseek(fd, at, os.SEEK_DATA) // _SECTOR * _SECTOR
        chunk = os.pread(fd, _CHUNK, at)
        at += len(chunk) or size
        for begin in range(0, len(chunk), _SECTOR):
            paths = wanted.pop(chunk[begin : begin + _SECTOR], None)
            for path in paths or ():
                found[path] += 1
    return {path for path, count in asked.items() if found[path] >= count * _LEAST_SECTORS}


def _sectors(head: bytes, whole: int) -> set[bytes]:
    """Some sectors of a file as they lie on a disk: the last one is filled up with zeros."""
    count = -(-len(head) // _SECTOR)
    step = max(1, count // _OF_EACH)
    some = {head[number * _SECTOR : (number + 1) * _SECTOR] for number in range(0, count, step)}
    if len(head) < whole:
        some = {sector for sector in some if len(sector) == _SECTOR}
    plain = {sector.ljust(_SECTOR, b"\0") for sector in some}
    return {sector for sector in plain if len(set(sector)) > likeness.PLAIN_DISTINCT}
