# ruff: noqa: PTH115, PTH208
# (a Path for each descriptor of each process would cost thrice as much)
"""Whether the server of a FUSE file system talks to another machine: then what is written there leaves by it.

Question: where do files on this mount go? Its type and source are chosen by who mounts (`sshfs -o fsname=x,subtype=y`); so the
server itself is looked at: the process that holds this connection of /dev/fuse (the kernel names it in fdinfo), and who of the
same user is at the other end of its sockets (sshfs talks to an ssh that it started). A TCP connection of theirs to elsewhere
says so. One over loopback does not, nor what it inherited as its standard input or output. Must not know what a share is.

Before the kernel named the connection (`fuse_connection`, Linux 6.14), no server is found, and type and source decide alone.
"""

import os

from agent.sense import procfs
from agent.sense.pairs import Pairs
from agent.sense.sockdiag import LISTEN, TCP, Namespace, loopback, spoken

_FUSE, _SOCKET = "/dev/fuse", "socket:["
_KEY = b"fuse_connection:"
_FIRST_OWN = 3
_MOST = 64


def servers(connection: int) -> list[int]:
    """Who holds this connection of /dev/fuse (the minor number of the mount's device)."""
    found = []
    for pid in _everybody():
        for number, link in _links(pid):
            if link == _FUSE and _connection(pid, number) == connection:
                found.append(pid)
                break
    return found


def hands(server: int, pairs: Pairs) -> list[int]:
    """The server, and processes of the same user that its sockets lead to."""
    own = {int(link[len(_SOCKET) : -1]) for number, link in _links(server) if _is_own_socket(number, link)}
    others: set[int] = set()
    for name in pairs.of(sorted(own)[:_MOST]):
        kind, _, ends = name.partition(":")
        others |= {int(end) for end in ends.split(":")} - own if kind == "unix" else set()
    if not others:
        return [server]
    user = _user(server)
    near = [pid for pid in _everybody() if pid != server and _user(pid) == user]
    links = {f"{_SOCKET}{inode}]" for inode in others}
    return [server, *[pid for pid in near if any(link in links for _, link in _links(pid))]][:_MOST]


def far_end(pids: list[int]) -> str:
    """The other end of a TCP connection to elsewhere that one of these holds; empty if none does."""
    held = {link for pid in pids for _, link in _links(pid)}
    for pid in pids[:1]:
        try:
            namespace = Namespace(pid)
        except OSError:
            continue  # it ended
        try:
            for each in namespace.dump((TCP,)):
                if each.state != LISTEN and f"{_SOCKET}{each.inode}]" in held and not loopback(each.there[0]):
                    return spoken(each.there)
        finally:
            namespace.close()
    return ""


def _everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _links(pid: int) -> list[tuple[str, str]]:
    """(number, what it leads to) of each descriptor; empty if the process is gone."""
    found = []
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            try:
                found.append((number, os.readlink(f"/proc/{pid}/fd/{number}")))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return found
    return found


def _is_own_socket(number: str, link: str) -> bool:
    return link.startswith(_SOCKET) and int(number) >= _FIRST_OWN


def _connection(pid: int, number: str) -> int:
    for line in procfs.read(f"/proc/{pid}/fdinfo/{number}").splitlines():
        if line.startswith(_KEY):
            return int(line[len(_KEY) :])
    return -1


def _user(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116 (as above)
    except OSError:
        return -1
