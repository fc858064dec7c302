"""One of the kernel's tracepoints, heard through ring buffers: perf_event_open(2), without eBPF, a module or tracefs mounted.

Owns: finding the tracepoint's number and the places of its fields, one ring a CPU, a filter that the kernel itself applies, and
the count of records that were dropped. `drain` gives each record's raw bytes with the process in whose time it was written.
Must not know what a tracepoint is heard for: those who do (`connects`, `urbs`) read the fields by `at`.

Sources: perf_event_open(2), <linux/perf_event.h>, events/*/*/format in tracefs, fsopen(2).
"""

import ctypes
import fcntl
import mmap
import os
import platform
import re
import struct
import time
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

PERF_TYPE_TRACEPOINT = 2
PERF_SAMPLE_TID, PERF_SAMPLE_TIME, PERF_SAMPLE_RAW = 0x2, 0x4, 0x400
PERF_RECORD_LOST, PERF_RECORD_SAMPLE = 2, 9
PERF_FLAG_FD_CLOEXEC = 0x8
PERF_EVENT_IOC_SET_FILTER = 0x40082406
_ATTR = struct.Struct("=IIQQQQQIIQQQQIiQIHH")
_WATERMARK, _USE_CLOCKID = 1 << 14, 1 << 25
_SYSCALL = {"x86_64": 298, "aarch64": 241, "riscv64": 241}
_FSOPEN, _FSCONFIG, _FSMOUNT, _FSCONFIG_CMD_CREATE = 430, 431, 432, 6
_DATA_HEAD = 1024  # offsetof(struct perf_event_mmap_page, data_head); data_tail follows
_HEADER = struct.Struct("=IHH")  # type misc size
_SAMPLE = struct.Struct("=IIQI")  # pid tid time raw_size
_TAIL = struct.Struct("=Q")
_FIELD = re.compile(r"field:[^;]*?(\w+)(?:\[\d+\])?;\s*offset:(\d+);\s*size:(\d+)")


class Record(NamedTuple):
    """`raw` holds the fields; written in the time of process `pid`, `at_ns` by CLOCK_MONOTONIC."""

    pid: int
    at_ns: int
    raw: bytes


class Tracepoint:
    """`name` as "sock/inet_sock_set_state"; `pages` of room a CPU, a power of two. Raises OSError where it can't be heard."""

    def __init__(self, name: str, needed: tuple[str, ...], said: str, pages: int) -> None:
        """Heard from now on: the records that the filter `said` lets through. The kernel takes one filter, once."""
        self.lost = 0
        """Records that the kernel dropped for want of room"""
        self._pages = pages
        self._rings: list[tuple[int, mmap.mmap]] = []
        number, text = _tracepoint(f"events/{name}")
        self.at = {field: int(offset) for field, offset, _ in _FIELD.findall(text)}
        """Where each field begins in `Record.raw`"""
        if any(field not in self.at for field in needed):
            raise OSError(0, "this kernel writes the tracepoint otherwise")
        call = _SYSCALL.get(platform.machine())
        if call is None:
            raise OSError(0, f"no number of perf_event_open known for {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            for cpu in range(os.cpu_count() or 1):
                self._open(libc, call, number, cpu, said)
        except OSError:
            self.close()
            raise

    def drain(self) -> list[Record]:
        """Records since the last call, in the order in which they were written, on whichever CPU."""
        found: list[Record] = []
        for _, ring in self._rings:
            head, tail = struct.unpack_from("=QQ", ring, _DATA_HEAD)
            if head == tail:
                continue
            data = self._read(ring, tail, head)
            _TAIL.pack_into(ring, _DATA_HEAD + 8, head)
            at = 0
            while at + _HEADER.size <= len(data):
                kind, _, size = _HEADER.unpack_from(data, at)
                if size < _HEADER.size:
                    break
                if kind == PERF_RECORD_SAMPLE:
                    pid, _, at_ns, length = _SAMPLE.unpack_from(data, at + _HEADER.size)
                    raw = at + _HEADER.size + _SAMPLE.size
                    found.append(Record(pid, at_ns, data[raw : raw + length]))
                elif kind == PERF_RECORD_LOST:
                    self.lost += struct.unpack_from("=QQ", data, at + _HEADER.size)[1]
                at += size
        return sorted(found, key=attrgetter("at_ns"))

    def close(self) -> None:
        """Stop listening."""
        for fd, ring in self._rings:
            ring.close()
            os.close(fd)
        self._rings.clear()

    def _open(self, libc: ctypes.CDLL, call: int, number: int, cpu: int, said: str) -> None:
        flags = _WATERMARK | _USE_CLOCKID
        kinds = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW
        half = self._pages * mmap.PAGESIZE // 2
        attr = _ATTR.pack(
            *(PERF_TYPE_TRACEPOINT, _ATTR.size, number, 1, kinds, 0, flags, half, 0, 0, 0, 0, 0, 0),
            *(time.CLOCK_MONOTONIC, 0, 0, 0, 0),
        )
        fd = libc.syscall(call, ctypes.c_char_p(attr), -1, cpu, -1, ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "perf_event_open")
        try:
            fcntl.ioctl(fd, PERF_EVENT_IOC_SET_FILTER, said.encode() + b"\0")
            ring = mmap.mmap(fd, (self._pages + 1) * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            raise
        self._rings.append((fd, ring))

    def _read(self, ring: mmap.mmap, tail: int, head: int) -> bytes:
        size = self._pages * mmap.PAGESIZE
        start, length = tail % size, head - tail
        first = ring[mmap.PAGESIZE + start : mmap.PAGESIZE + min(start + length, size)]
        return first + ring[mmap.PAGESIZE : mmap.PAGESIZE + length - len(first)]


def _tracepoint(event: str) -> tuple[int, str]:
    """(number, format) of the tracepoint: from tracefs where it is mounted, else from one that is mounted nowhere."""
    for root in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if Path(root, event, "id").exists():
            return _described(root, event)
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_FSOPEN, b"tracefs", 1)
    if context < 0:
        raise OSError(ctypes.get_errno(), "no tracefs")
    try:
        root_fd = -1
        if libc.syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0) == 0:
            root_fd = libc.syscall(_FSMOUNT, context, 1, 0)
        if root_fd < 0:
            raise OSError(ctypes.get_errno(), "no tracefs")
    finally:
        os.close(context)
    try:
        return _described(f"/proc/self/fd/{root_fd}", event)
    finally:
        os.close(root_fd)


def _described(root: str, event: str) -> tuple[int, str]:
    return int(Path(root, event, "id").read_text()), Path(root, event, "format").read_text()
