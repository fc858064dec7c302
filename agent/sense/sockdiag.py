"""Which sockets there are in a network namespace, and how much each has sent: NETLINK_SOCK_DIAG, sock_diag(7).

Owns: the requests and answers of inet_diag and unix_diag, the stream of sockets that are destroyed (the kernel tells each
with its last `tcp_info`, SKNLGRP_INET_TCP_DESTROY), and the way into another network namespace to ask there. Must not know
processes, files, or which socket matters. UDP sockets have no byte counts; unix sockets have neither counts nor pids.
`bytes_acked` of `tcp_info` counts what the far end has confirmed, and one for the SYN.

Sources: <linux/inet_diag.h>, <linux/unix_diag.h>, <linux/sock_diag.h>, <linux/tcp.h>.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY = 1, 3
INET_DIAG_INFO = 2
UDIAG_SHOW_NAME, UDIAG_SHOW_PEER = 0x1, 0x4
UNIX_DIAG_NAME, UNIX_DIAG_PEER = 0, 2
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_ATTACH_FILTER, SO_RCVBUFFORCE = 270, 1, 26, 33
CLONE_NEWNET = 0x40000000
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
ESTABLISHED, LISTEN, TIME_WAIT = 1, 10, 6
_STATES = 0xFFF & ~(1 << TIME_WAIT | 1 << 7 | 1 << 12)
_NLMSGHDR = struct.Struct("=IHHII")  # len type flags seq pid
_REQUEST = struct.Struct("=BBBBI48x")  # family protocol ext pad states (id)
_UNIX_REQUEST = struct.Struct("=BBHIIIII")  # family protocol pad states ino show cookie[2]
_INET_DIAG_MSG = struct.Struct("=BBBB2s2s16s16sIIIIIIII")  # family state timer retrans ports addresses if cookie[2] …
_UNIX_DIAG_MSG = struct.Struct("=BBBBIII")  # family type state pad ino cookie[2]
_ATTRIBUTE = struct.Struct("=HH")  # len type
_BYTES_ACKED = 120  # offsetof(struct tcp_info, tcpi_bytes_acked), Linux 4.1
_U64 = struct.Struct("=Q")
_BUFFER = 1 << 18
_MAPPED = bytes(10) + b"\xff\xff"

End = tuple[bytes, int]
"""An address in network order (4 bytes of IPv4, also where it is mapped into IPv6, or 16) and a port"""


class Socket(NamedTuple):
    """A TCP or UDP socket. `sent` are bytes that the far end confirmed, None where nobody counts; `inode` 0: not known."""

    cookie: int
    protocol: int
    state: int
    here: End
    there: End
    inode: int
    uid: int
    sent: int | None

    @property
    def id(self) -> str:
        """A name for it that no other socket gets while the machine runs."""
        return f"{'tcp' if self.protocol == TCP else 'udp'}:{self.cookie:x}"


class Unix(NamedTuple):
    """A unix socket: its inode number, that of its peer (0: none), and the path it is bound to."""

    inode: int
    peer: int
    name: bytes


def loopback(address: bytes) -> bool:
    """Whether an address is of this machine by itself, or none."""
    return address[:1] == b"\x7f" or not any(address[:-1])  # 127/8; ::, ::1, 0.0.0.0


def group(address: bytes) -> bool:
    """Whether it is a multicast or broadcast address."""
    return (len(address) == 4 and address[0] >= 224) or (len(address) == 16 and address[0] == 0xFF)


def spoken(end: End) -> str:
    """An end for people: 203.0.113.5:22, [2001:db8::1]:22."""
    address = socket.inet_ntop(socket.AF_INET if len(end[0]) == 4 else socket.AF_INET6, end[0])
    return f"{address}:{end[1]}" if len(end[0]) == 4 else f"[{address}]:{end[1]}"


def address(family: int, raw: bytes) -> bytes:
    """The address in 16 bytes of a message, IPv4 as four bytes however it is written."""
    if family == socket.AF_INET:
        return raw[:4]
    return raw[12:] if raw[:12] == _MAPPED else raw


class Namespace:
    """The sockets of one network namespace: `dump`, `unix`, and `destroyed` since the last call.

    Opened in the namespace of the process `pid`, None: our own. Raises OSError (a namespace that is gone, no privilege).
    """

    def __init__(self, pid: int | None = None) -> None:
        if pid is None:
            self._open()
            return
        libc = ctypes.CDLL(None, use_errno=True)
        ours, theirs = os.open("/proc/thread-self/ns/net", os.O_RDONLY), -1
        try:
            theirs = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            _enter(libc, theirs)
            try:
                self._open()
            finally:
                _enter(libc, ours)
        finally:
            os.close(ours)
            if theirs >= 0:
                os.close(theirs)

    def _open(self) -> None:
        self._ask = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._ends = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG
        )
        self._ask.settimeout(1.0)
        self.lost = False
        """Whether the kernel dropped ends of sockets; whoever reads this sets it back"""
        self._attach_filter()
        self._ends.bind((0, 0))
        for multicast in (SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY):
            self._ends.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, multicast)

    def _attach_filter(self) -> None:
        """Ends of connections within the machine stay in the kernel: there may be thousands a second."""
        family, there = _NLMSGHDR.size, _NLMSGHDR.size + 24
        program = (
            *((0x30, 0, 0, family), (0x15, 0, 2, socket.AF_INET)),  # ldb family; jeq AF_INET
            *((0x30, 0, 0, there), (0x15, 11, 12, 127)),  # ldb; jeq 127 → drop, else keep
            *((0x20, 0, 0, there), (0x15, 0, 10, 0), (0x20, 0, 0, there + 4), (0x15, 0, 8, 0)),  # ld; jeq 0 or keep
            *((0x20, 0, 0, there + 8), (0x15, 0, 2, 0xFFFF)),  # mapped IPv4?
            *((0x30, 0, 0, there + 12), (0x15, 3, 4, 127)),
            *((0x15, 0, 3, 0), (0x20, 0, 0, there + 12), (0x15, 0, 1, 1)),  # ::1
            (0x06, 0, 0, 0),  # drop
            (0x06, 0, 0, 0xFFFFFFFF),  # keep
        )
        code = b"".join(struct.pack("=HBBI", *each) for each in program)
        held = ctypes.create_string_buffer(code, len(code))
        self._ends.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(held)))

    def fileno(self) -> int:
        """The stream of sockets that are destroyed."""
        return self._ends.fileno()

    def dump(self, protocols: tuple[int, ...] = (TCP, UDP)) -> list[Socket]:
        """Every TCP and UDP socket that is connected or listens."""
        found: list[Socket] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in protocols:
                ext = 1 << (INET_DIAG_INFO - 1) if protocol == TCP else 0
                body = _REQUEST.pack(family, protocol, ext, 0, _STATES if protocol == TCP else 1 << ESTABLISHED)
                found += (inet(raw, protocol) for raw in self._answers(body))
        return found

    def unix(self) -> list[Unix]:
        """Every unix socket."""
        body = _UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, UDIAG_SHOW_NAME | UDIAG_SHOW_PEER, 0, 0)
        return [unix(raw) for raw in self._answers(body)]

    def destroyed(self) -> Iterator[Socket]:
        """TCP sockets that are no more, with the last count of each."""
        while True:
            try:
                data = self._ends.recv(_BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self.lost = True
                    continue
                return
            for kind, raw in messages(data):
                if kind == SOCK_DIAG_BY_FAMILY and len(raw) >= _INET_DIAG_MSG.size:
                    yield inet(raw, TCP)

    def close(self) -> None:
        """Give the sockets back."""
        self._ask.close()
        self._ends.close()

    def _answers(self, body: bytes) -> Iterator[bytes]:
        request = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0) + body
        try:
            self._ask.send(request)
            while True:
                for kind, raw in messages(self._ask.recv(_BUFFER)):
                    if kind in (NLMSG_DONE, NLMSG_ERROR):  # an error: a protocol that this kernel has no table of
                        return
                    yield raw
        except OSError:
            return


def inet(raw: bytes, protocol: int) -> Socket:
    """One `struct inet_diag_msg` with its attributes. Raises struct.error if it is cut off."""
    fields = _INET_DIAG_MSG.unpack_from(raw)
    family, state, _, _, sport, dport, src, dst, _, low, high, _, _, _, uid, inode = fields
    info = _attributes(raw, _INET_DIAG_MSG.size).get(INET_DIAG_INFO, b"")
    sent = None
    if len(info) >= _BYTES_ACKED + 8:
        sent = max(_U64.unpack_from(info, _BYTES_ACKED)[0] - 1, 0)
    here = address(family, src), int.from_bytes(sport, "big")
    there = address(family, dst), int.from_bytes(dport, "big")
    return Socket(low | high << 32, protocol, state, here, there, inode, uid, sent)


def unix(raw: bytes) -> Unix:
    """One `struct unix_diag_msg` with its attributes. Raises struct.error if it is cut off."""
    _, _, _, _, inode, _, _ = _UNIX_DIAG_MSG.unpack_from(raw)
    attributes = _attributes(raw, _UNIX_DIAG_MSG.size)
    peer = attributes.get(UNIX_DIAG_PEER, b"")
    return Unix(inode, int.from_bytes(peer[:4], "little") if len(peer) >= 4 else 0, attributes.get(UNIX_DIAG_NAME, b""))


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each netlink message in what recv(2) gave."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, _, _, _ = _NLMSGHDR.unpack_from(data, at)
        if length < _NLMSGHDR.size:
            return
        yield kind, data[at + _NLMSGHDR.size : at + length]
        at += (length + 3) & ~3


def _attributes(raw: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + _ATTRIBUTE.size <= len(raw):
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = raw[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _enter(libc: ctypes.CDLL, fd: int) -> None:
    if libc.setns(fd, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "setns")
