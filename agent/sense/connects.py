"""Who opened a connection, however short it lived: the kernel's tracepoint sock:inet_sock_set_state, by perf_event_open(2).

Owns: the tracepoint's ring buffers, one a CPU, and the match of two of its records: a socket leaves for SYN_SENT in the hand
of the process that connects, and is established with its own port known. Together they say which process owns which pair of
ends, which nothing else tells of a socket that is gone a millisecond later (the kernel's word on destroyed sockets names no
process). No eBPF, no module; a filter in the kernel leaves one or two records a connect. Must not know why that matters.

Sources: perf_event_open(2), <linux/perf_event.h>, events/sock/inet_sock_set_state/format in tracefs, fsopen(2).
"""

import ctypes
import fcntl
import mmap
import os
import platform
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from agent.sense.sockdiag import End, address

PERF_TYPE_TRACEPOINT = 2
PERF_SAMPLE_TID, PERF_SAMPLE_TIME, PERF_SAMPLE_RAW = 0x2, 0x4, 0x400
PERF_RECORD_LOST, PERF_RECORD_SAMPLE = 2, 9
PERF_FLAG_FD_CLOEXEC = 0x8
PERF_EVENT_IOC_SET_FILTER = 0x40082406
_ATTR = struct.Struct("=IIQQQQQIIQQQQIiQIHH")
_WATERMARK, _USE_CLOCKID = 1 << 14, 1 << 25
_SYSCALL = {"x86_64": 298, "aarch64": 241, "riscv64": 241}
_FSOPEN, _FSCONFIG, _FSMOUNT, _FSCONFIG_CMD_CREATE = 430, 431, 432, 6
_PAGES = 8
_DATA_HEAD = 1024  # offsetof(struct perf_event_mmap_page, data_head); data_tail follows
_HEADER = struct.Struct("=IHH")  # type misc size
_SAMPLE = struct.Struct("=IIQI")  # pid tid time raw_size
_TAIL = struct.Struct("=Q")
_EVENT = "events/sock/inet_sock_set_state"
_FILTER = b"oldstate == 2 || newstate == 2"  # TCP_SYN_SENT
_FIELD = re.compile(r"field:[^;]*?(\w+)(?:\[\d+\])?;\s*offset:(\d+);\s*size:(\d+)")
_NEEDED = ("skaddr", "newstate", "sport", "dport", "family", "protocol", "saddr", "daddr", "saddr_v6", "daddr_v6")
_SYN_SENT, _ESTABLISHED = 2, 1
_MOST_HALF = 4_096


class Connect(NamedTuple):
    """The process `pid` connected from `here` to `there`, `at_ns` by CLOCK_MONOTONIC."""

    pid: int
    at_ns: int
    here: End
    there: End


class Connects:
    """`drain` tells who connected since the last call. Raises OSError where the kernel does not let us listen."""

    def __init__(self) -> None:
        self.lost = 0
        """Records that the kernel dropped for want of room"""
        self._rings: list[tuple[int, mmap.mmap]] = []
        self._half: dict[int, Connect] = {}
        number, text = _tracepoint()
        offsets = {name: int(offset) for name, offset, _ in _FIELD.findall(text)}
        if any(name not in offsets for name in _NEEDED):
            raise OSError(0, "this kernel writes the tracepoint otherwise")
        self._at = offsets
        call = _SYSCALL.get(platform.machine())
        if call is None:
            raise OSError(0, f"no number of perf_event_open known for {platform.machine()}")
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            for cpu in range(os.cpu_count() or 1):
                self._open(libc, call, number, cpu)
        except OSError:
            self.close()
            raise

    def drain(self) -> Iterator[Connect]:
        """Connects since the last call, of one CPU after the other."""
        for _, ring in self._rings:
            head, tail = struct.unpack_from("=QQ", ring, _DATA_HEAD)
            if head == tail:
                continue
            data = _read(ring, tail, head)
            _TAIL.pack_into(ring, _DATA_HEAD + 8, head)
            at = 0
            while at + _HEADER.size <= len(data):
                kind, _, size = _HEADER.unpack_from(data, at)
                if size < _HEADER.size:
                    break
                if kind == PERF_RECORD_SAMPLE:
                    yield from self._sample(data, at + _HEADER.size)
                elif kind == PERF_RECORD_LOST:
                    self.lost += struct.unpack_from("=QQ", data, at + _HEADER.size)[1]
                at += size

    def close(self) -> None:
        """Stop listening."""
        for fd, ring in self._rings:
            ring.close()
            os.close(fd)
        self._rings.clear()

    def _open(self, libc: ctypes.CDLL, call: int, number: int, cpu: int) -> None:
        flags = _WATERMARK | _USE_CLOCKID
        kinds = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW
        half = _PAGES * mmap.PAGESIZE // 2
        attr = _ATTR.pack(
            *(PERF_TYPE_TRACEPOINT, _ATTR.size, number, 1, kinds, 0, flags, half, 0, 0, 0, 0, 0, 0),
            *(time.CLOCK_MONOTONIC, 0, 0, 0, 0),
        )
        fd = libc.syscall(call, ctypes.c_char_p(attr), -1, cpu, -1, ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "perf_event_open")
        try:
            fcntl.ioctl(fd, PERF_EVENT_IOC_SET_FILTER, _FILTER + b"\0")
            ring = mmap.mmap(fd, (_PAGES + 1) * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            raise
        self._rings.append((fd, ring))

    def _sample(self, data: bytes, at: int) -> Iterator[Connect]:
        pid, _, at_ns, _ = _SAMPLE.unpack_from(data, at)
        raw, where = at + _SAMPLE.size, self._at
        (key,) = _TAIL.unpack_from(data, raw + where["skaddr"])
        (state,) = struct.unpack_from("=i", data, raw + where["newstate"])
        sport, dport, family = (struct.unpack_from("=H", data, raw + where[name])[0] for name in ("sport", "dport", "family"))
        if state == _SYN_SENT:
            self._half.pop(key, None)
            self._half[key] = Connect(pid, at_ns, (b"", sport), (b"", dport))
            if len(self._half) > _MOST_HALF:
                del self._half[next(iter(self._half))]
            return
        begun = self._half.pop(key, None)
        if begun is None or state != _ESTABLISHED:
            return
        six = "_v6" if family == socket.AF_INET6 else ""
        length = 16 if six else 4
        ends = [data[raw + where[name + six] :][:length] for name in ("saddr", "daddr")]
        yield Connect(begun.pid, begun.at_ns, (address(family, ends[0]), sport), (address(family, ends[1]), dport))


def _read(ring: mmap.mmap, tail: int, head: int) -> bytes:
    size = _PAGES * mmap.PAGESIZE
    start, length = tail % size, head - tail
    first = ring[mmap.PAGESIZE + start : mmap.PAGESIZE + min(start + length, size)]
    return first + ring[mmap.PAGESIZE : mmap.PAGESIZE + length - len(first)]


def _tracepoint() -> tuple[int, str]:
    """(number, format) of the tracepoint: from tracefs where it is mounted, else from one that is mounted nowhere."""
    for root in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if Path(root, _EVENT, "id").exists():
            return _described(root)
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
        return _described(f"/proc/self/fd/{root_fd}")
    finally:
        os.close(root_fd)


def _described(root: str) -> tuple[int, str]:
    event = Path(root, _EVENT)
    return int(event.joinpath("id").read_text()), event.joinpath("format").read_text()
