"""Who opened a connection, however short it lived: the kernel's tracepoint sock:inet_sock_set_state.

Owns: the match of two of its records: a socket leaves for SYN_SENT in the hand of the process that connects, and is established
with its own port known. Together they say which process owns which pair of ends, which nothing else tells of a socket that is
gone a millisecond later (the kernel's word on destroyed sockets names no process). The rings are `tracepoint`'s; a filter in
the kernel leaves one or two records a connect. Must not know why that matters.
"""

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from agent.sense.sockdiag import End, address
from agent.sense.tracepoint import Record, Tracepoint

_EVENT, _PAGES = "sock/inet_sock_set_state", 8
_FILTER = "oldstate == 2 || newstate == 2"  # TCP_SYN_SENT
_NEEDED = ("skaddr", "newstate", "sport", "dport", "family", "protocol", "saddr", "daddr", "saddr_v6", "daddr_v6")
_KEY = struct.Struct("=Q")
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
        self._heard = Tracepoint(_EVENT, _NEEDED, _FILTER, _PAGES)
        self._half: dict[int, Connect] = {}

    def drain(self) -> Iterator[Connect]:
        """Connects since the last call, in their order."""
        for record in self._heard.drain():
            yield from self._sample(record)
        self.lost, self._heard.lost = self.lost + self._heard.lost, 0

    def close(self) -> None:
        """Stop listening."""
        self._heard.close()

    def _sample(self, record: Record) -> Iterator[Connect]:
        raw, where = record.raw, self._heard.at
        (key,) = _KEY.unpack_from(raw, where["skaddr"])
        (state,) = struct.unpack_from("=i", raw, where["newstate"])
        sport, dport, family = (struct.unpack_from("=H", raw, where[name])[0] for name in ("sport", "dport", "family"))
        if state == _SYN_SENT:
            self._half.pop(key, None)
            self._half[key] = Connect(record.pid, record.at_ns, (b"", sport), (b"", dport))
            if len(self._half) > _MOST_HALF:
                del self._half[next(iter(self._half))]
            return
        begun = self._half.pop(key, None)
        if begun is None or state != _ESTABLISHED:
            return
        six = "_v6" if family == socket.AF_INET6 else ""
        length = 16 if six else 4
        ends = [raw[where[name + six] :][:length] for name in ("saddr", "daddr")]
        yield Connect(begun.pid, begun.at_ns, (address(family, ends[0]), sport), (address(family, ends[1]), dport))
