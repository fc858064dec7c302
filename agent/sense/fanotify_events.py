"""What fanotify wrote, taken apart: bytes in, plain values out.

Owns: the layout of struct fanotify_event_metadata and its information records (fanotify(7)). `heads` is the cheap first
look at a buffer (whose pid, where a record begins); `Names` is the second, for the records somebody wants to know more of.
`decode` does both for all records. Must not know what is watched or what a path is: handles stay bytes.

A *handle* here is the file system's id (8 bytes) followed by struct file_handle (handle_bytes, handle_type, opaque), just
as the kernel wrote it: equal bytes, same inode. Records that are cut short or from another kernel end the buffer.
"""

import struct
from typing import NamedTuple

from agent.sense import kernel

_UNPACK = kernel.EVENT_METADATA.unpack_from
_META_SIZE = kernel.EVENT_METADATA.size
_INFO = kernel.INFO_HEADER.unpack_from
_HANDLE_BYTES = struct.Struct("=I").unpack_from
_FID, _DFID = kernel.FAN_EVENT_INFO_TYPE_FID, kernel.FAN_EVENT_INFO_TYPE_DFID
_OLD = kernel.FAN_EVENT_INFO_TYPE_OLD_DFID_NAME
_NAMED = (kernel.FAN_EVENT_INFO_TYPE_DFID_NAME, kernel.FAN_EVENT_INFO_TYPE_NEW_DFID_NAME)
FIXED = 20
"""Bytes of an information record before the opaque ones: info header (4), fsid (8), handle_bytes (4), handle_type (4)."""
FIRST = struct.Struct("=BxH8xI").unpack_from
"""(kind, length, handle_bytes) of an information record."""

Head = tuple[int, int, int, int, int]
"""(mask, fd, pid, where the information records begin, where they end)"""


class Names(NamedTuple):
    """What one record is about. Empty: not told. `dir` and `name` are the new ones where a rename tells two."""

    target: bytes = b""
    dir: bytes = b""
    name: bytes = b""
    old_dir: bytes = b""
    old_name: bytes = b""


class Record(NamedTuple):
    """One event, whole."""

    mask: int
    fd: int
    pid: int
    names: Names


def heads(buffer: bytes) -> list[Head]:
    """The fixed part of every record in one read(2); stops at the first that can't be."""
    out: list[Head] = []
    offset, size = 0, len(buffer)
    while offset + _META_SIZE <= size:
        length, version, _, meta_length, mask, fd, pid = _UNPACK(buffer, offset)
        end = offset + length
        if version != kernel.FANOTIFY_METADATA_VERSION or meta_length < _META_SIZE or meta_length > length or end > size:
            break
        out.append((mask, fd, pid, offset + meta_length, end))
        offset = end
    return out


def names(buffer: bytes, start: int, end: int) -> Names:
    """The information records between `start` and `end`; unknown kinds are passed over."""
    target = directory = name = old_dir = old_name = b""
    while start + FIXED <= end:
        kind, _, length = _INFO(buffer, start)
        stop = start + length
        if length < FIXED or stop > end:
            break
        opaque = start + FIXED + _HANDLE_BYTES(buffer, start + 12)[0]
        if opaque > stop:
            break
        if kind in _NAMED:
            directory = buffer[start + 4 : opaque]
            name = buffer[opaque:stop].split(b"\0", 1)[0]
        elif kind == _FID:
            target = buffer[start + 4 : opaque]
        elif kind == _OLD:
            old_dir = buffer[start + 4 : opaque]
            old_name = buffer[opaque:stop].split(b"\0", 1)[0]
        elif kind == _DFID:
            directory, name = buffer[start + 4 : opaque], b""
        start = stop
    return Names(target, directory, name, old_dir, old_name)


def claimed(buffer: bytes, system: bytes) -> bytes:
    """The same records with `system` as the file system's id wherever the kernel gave none (FUSE): what is read from a group
    that holds marks of one such file system only."""
    out = bytearray(buffer)
    for _, _, _, start, end in heads(buffer):
        while start + FIXED <= end:
            _, _, length = _INFO(buffer, start)
            if length < FIXED:
                break
            if not any(buffer[start + 4 : start + 12]):
                out[start + 4 : start + 12] = system
            start += length
    return bytes(out)


def decode(buffer: bytes) -> list[Record]:
    """Every whole record of one read(2). Never raises, whatever the bytes."""
    return [Record(mask, fd, pid, names(buffer, start, end)) for mask, fd, pid, start, end in heads(buffer)]
