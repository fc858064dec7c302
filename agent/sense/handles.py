"""What a process holds that leads elsewhere, and who its relatives are: /proc/PID/fd, /proc/PID/io, /proc/net; proc(5).

Owns: the inode numbers of sockets and pipes among its descriptors, which of them are Bluetooth sockets, how much it wrote, and
its nearest ancestors and descendants. Must not know why somebody asks, nor what a socket is connected to.
"""

import os

from agent.sense import procfs

_SOCKET, _PIPE = b"socket:[", b"pipe:["
_MOST_RELATIVES, _MOST_FDS = 48, 1_024


def descriptors(pid: int) -> tuple[set[int], set[int]]:
    """(inode numbers of the sockets, of the pipes) that a process holds; empty if it is gone."""
    base = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(base)[:_MOST_FDS]  # noqa: PTH208 (a Path for each descriptor would cost thrice as much)
    except OSError:
        return set(), set()
    links = [procfs.link(f"{base}/{number}") for number in numbers]
    sockets = {int(link[len(_SOCKET) : -1]) for link in links if link.startswith(_SOCKET)}
    return sockets, {int(link[len(_PIPE) : -1]) for link in links if link.startswith(_PIPE)}


def bluetooth_inodes(root: str = "/proc/net") -> frozenset[int]:
    """Inode numbers of sockets to Bluetooth peers that can carry files: RFCOMM and L2CAP (not audio)."""
    found = set()
    for name in ("rfcomm", "l2cap"):
        lines = [line.split() for line in procfs.read(f"{root}/{name}").splitlines()]
        column = lines[0].index(b"Inode") if lines and b"Inode" in lines[0] else -1
        found |= {int(line[column]) for line in lines[1:] if 0 <= column < len(line) and line[column].isdigit()}
    return frozenset(found)


def written(pid: int) -> int | None:
    """Bytes that a process has handed to write(2) and its kin so far."""
    count = procfs.parse_status(procfs.read(f"/proc/{pid}/io")).get(b"wchar", b"")
    return int(count) if count.isdigit() else None


def relatives(stat: procfs.Stat) -> list[int]:
    """Its nearest ancestors, and all below the last of them that is of its process group (a job of a shell)."""
    found: list[int] = []
    top, above = stat.pid, stat.ppid
    for _ in range(3):
        parent = procfs.stat(above) if above > 1 else None
        if parent is None:
            break
        found.append(above)
        if parent.pgrp == stat.pgrp:
            top = above
        else:
            found += [each for each in procfs.children(above) if (other := procfs.stat(each)) and other.pgrp == stat.pgrp]
            break
        above = parent.ppid
    return [each for each in dict.fromkeys([*found, *below(top)]) if each != stat.pid][:_MOST_RELATIVES]


def below(top: int) -> list[int]:
    """Its descendants."""
    found: list[int] = []
    todo = [top] if top > 1 else []
    while todo and len(found) < _MOST_RELATIVES:
        children = procfs.children(todo.pop())
        found += children
        todo += children
    return found[:_MOST_RELATIVES]
