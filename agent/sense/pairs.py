"""Which socket is connected to which, on this machine: pairs of unix sockets, and TCP connections to ourselves.

Question: of these sockets, which have their other end in another process here? Owns: a netlink socket for sock_diag(7), one
question a unix socket and one table of TCP connections, and what was answered lately. Must not know who holds a socket.
A pair gets a name that is the same seen from either end (`unix:INODE:INODE`, `tcp:END-END`), and which of the two an end is.
Asked for processes that hold sockets and matter only, a few a second; sockets of other network namespaces are not found.
"""

import os
import socket
import struct
import time

from agent.sense import sockdiag

_HEADER = struct.Struct("=IHHII")  # len type flags seq pid: struct nlmsghdr
_UNIX = struct.Struct("=BBHIIIII")  # struct unix_diag_req: family protocol pad states ino show cookie[2]
_INET = struct.Struct("=BBBBI48x")  # struct inet_diag_req_v2, no socket named: family protocol ext pad states id
_NO_COOKIE = 0xFFFFFFFF
_CONNECTED = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK
_MOST = 4_096
_AGAIN_S = 0.02
"""A socket that is not connected may be so soon; the table of TCP connections is not read oftener either (0.1 ms)"""
_SHARE = 20
"""Between two readings of that table so many times as long as one takes: a server's 20,000 connections are 0.2 s"""

Pair = tuple[str, int]
"""The name of a pair, and 1 or 2: which of the two sockets this one is"""


class Pairs:
    """`of` for a process' sockets. Raises nothing: where sock_diag is refused, no pair is known."""

    def __init__(self) -> None:
        self._known: dict[int, Pair] = {}
        self._alone: dict[int, float] = {}
        self._tcp: dict[int, Pair] = {}
        self._tcp_not_before = 0.0
        self._ask: socket.socket | None = None
        try:
            self._ask = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, sockdiag.NETLINK_SOCK_DIAG)
            self._ask.settimeout(0.2)
        except OSError:
            return  # built without CONFIG_UNIX_DIAG and CONFIG_INET_DIAG

    def of(self, inodes: list[int]) -> dict[str, int]:
        """The pairs of these sockets: name → end (1 or 2; 3: it holds both). Ends that are connected to nobody are left out."""
        found: dict[str, int] = {}
        for inode in inodes:
            pair = self._known.get(inode) or self._look_up(inode)
            if pair is not None:
                found[pair[0]] = found.get(pair[0], 0) | pair[1]
        return found

    def close(self) -> None:
        """Give the socket back."""
        if self._ask is not None:
            self._ask.close()
            self._ask = None

    def _look_up(self, inode: int) -> Pair | None:
        now = time.monotonic()
        if self._ask is None or now - self._alone.get(inode, 0.0) < _AGAIN_S:
            return None
        pair = self._unix(inode) or self._loopback(inode, now)
        if pair is None:
            if len(self._alone) >= _MOST:
                self._alone.clear()
            self._alone[inode] = now
            return None
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[inode] = pair
        return pair

    def _unix(self, inode: int) -> Pair | None:
        show = sockdiag.UDIAG_SHOW_PEER
        body = _UNIX.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode & 0xFFFFFFFF, show, _NO_COOKIE, _NO_COOKIE)
        for raw in self._answers(body, sockdiag.NLM_F_REQUEST):
            found = sockdiag.unix(raw)
            peer = found.peer
            if peer and found.inode == inode:
                return f"unix:{min(inode, peer)}:{max(inode, peer)}", 1 if inode < peer else 2
        return None

    def _loopback(self, inode: int, now: float) -> Pair | None:
        if now >= self._tcp_not_before:
            self._tcp = {}
            ends: dict[tuple[sockdiag.End, sockdiag.End], int] = {}
            for family in (socket.AF_INET, socket.AF_INET6):
                body = _INET.pack(family, socket.IPPROTO_TCP, 0, 0, _CONNECTED)
                for raw in self._answers(body, sockdiag.NLM_F_REQUEST | sockdiag.NLM_F_DUMP):
                    each = sockdiag.inet(raw, socket.IPPROTO_TCP)
                    ends[each.here, each.there] = each.inode
            for (here, there), one in ends.items():
                if (there, here) in ends:
                    first, second = sorted((here, there))
                    name = f"tcp:{sockdiag.spoken(first)}-{sockdiag.spoken(second)}"
                    self._tcp[one] = name, 1 if here == first else 2
            done = time.monotonic()
            self._tcp_not_before = done + max(_AGAIN_S, _SHARE * (done - now))
        return self._tcp.get(inode)

    def _answers(self, body: bytes, flags: int) -> list[bytes]:
        request = _HEADER.pack(_HEADER.size + len(body), sockdiag.SOCK_DIAG_BY_FAMILY, flags, os.getpid(), 0) + body
        found: list[bytes] = []
        try:
            if self._ask is None:
                return found
            self._ask.send(request)
            while True:
                for kind, raw in sockdiag.messages(self._ask.recv(1 << 18)):
                    if kind != sockdiag.SOCK_DIAG_BY_FAMILY:
                        return found
                    found.append(raw)
                    if not flags & sockdiag.NLM_F_DUMP:
                        return found
        except OSError:
            return found
