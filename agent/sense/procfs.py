# ruff: noqa: PTH115, PTH116
# (pathlib would triple what a look at a process costs)
"""What /proc says of one process, now: proc(5).

Owns: reading and parsing the files under /proc/PID; each function answers None or empty when the process is gone or hides
it. Must not know: facts, caches, names of users. `holding.py` works with it while somebody is kept waiting, in a process
that must stay small: nothing of the standard library that is not tiny. A process is read in the order in which its things
vanish: argv and exe go first, at exit.
"""

import os
import time

from agent.sense import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in `holding.py`
    from typing import Any

_READ_BYTES = 65536
_ARGV_BYTES = 16384
_S_IFMT, _S_IFREG, _S_IFIFO = 0o170000, 0o100000, 0o010000  # the stat module would be one more in the small process
UNSET = 4294967295


HeldFile = tuple[bytes, int, bytes]
"""A regular file a process has open: its path now, size in bytes, key as `kernel.file_key`"""


class Stat:
    """A part of /proc/PID/stat. `start`: clock ticks since boot; `tty`: device number, 0 if none."""

    __slots__ = ("comm", "pgrp", "pid", "ppid", "session", "start", "state", "tty")

    def __init__(self, pid: int, comm: bytes, fields: list[bytes]) -> None:
        self.pid, self.comm, self.state = pid, comm, fields[0]
        self.ppid, self.pgrp, self.session, self.tty = int(fields[1]), int(fields[2]), int(fields[3]), int(fields[4])
        self.start = int(fields[19])


class Look:
    """All that is read of a process at once. Numbers are None, the rest is empty, where /proc did not say. `blind`: it had
    closed its output already, as programs do that are ending."""

    __slots__ = ("argv", "at_ns", "blind", "ends", "exe", "files", "loginuid", "pipes", "session", "stat", "uid")

    def __init__(self, stat: Stat, exe: bytes, argv: list[bytes], descriptors: int, at_ns: int) -> None:
        base = f"/proc/{stat.pid}"
        self.at_ns = at_ns
        self.stat, self.exe, self.argv = stat, exe, argv
        self.loginuid, self.session = number(f"{base}/loginuid"), number(f"{base}/sessionid")
        self.uid = uid(stat.pid)
        ends, self.files = held(stat.pid, descriptors)
        self.pipes, self.ends = list(ends), list(ends.values())
        self.blind = not ends and not has_output(stat.pid)


def parse_stat(raw: bytes) -> Stat | None:
    """One line of /proc/PID/stat; a program's name may hold blanks and parentheses. None if it is not such a line."""
    opening, closing = raw.find(b"("), raw.rfind(b")")
    fields = raw[closing + 1 :].split()
    if opening < 0 or closing < opening or len(fields) < 20:
        return None
    try:
        return Stat(int(raw[:opening]), raw[opening + 1 : closing], fields)
    except ValueError:
        return None


def parse_status(raw: bytes) -> dict[bytes, bytes]:
    """/proc/PID/status as its fields, values stripped."""
    pairs = (line.partition(b":") for line in raw.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def read(path: str) -> bytes:
    """A small file under /proc, empty if it can't be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(fd, _READ_BYTES)
    except OSError:
        return b""
    finally:
        os.close(fd)


def number(path: str) -> int | None:
    """A file that holds one number; None if unset (4294967295) or not readable."""
    raw = read(path).strip()
    return int(raw) if raw.isdigit() and int(raw) != UNSET else None


def link(path: str) -> bytes:
    """Where a symbolic link under /proc points, empty if that can't be read."""
    try:
        return os.fsencode(os.readlink(path))
    except OSError:
        return b""


def stat(pid: int) -> Stat | None:
    """/proc/PID/stat, None if there is no such process."""
    return parse_stat(read(f"/proc/{pid}/stat"))


def uid(pid: int) -> int | None:
    """The real uid."""
    fields = parse_status(read(f"/proc/{pid}/status")).get(b"Uid", b"").split()
    return int(fields[0]) if fields and fields[0].isdigit() else None


def argv(pid: int) -> list[bytes]:
    """The command line, cut after 16 KiB; empty for a kernel thread and after exit."""
    raw = read(f"/proc/{pid}/cmdline")[:_ARGV_BYTES]
    return raw.removesuffix(b"\0").split(b"\0") if raw else []


def held(pid: int, most: int, want_files: bool = True) -> tuple[dict[int | str, int], list[HeldFile]]:
    """What is among the first `most` descriptors: pipes with the ends held (1 to read, 2 to write), and regular files. A pipe
    is its inode number, a named one `fifo:DEV:INODE`, a socket `socket:INODE` (end 0). Nothing is opened."""
    base = f"/proc/{pid}/fd"
    pipes: dict[int | str, int] = {}
    files: list[HeldFile] = []
    try:
        numbers = sorted(map(int, os.listdir(base)))[:most]  # noqa: PTH208
    except (OSError, ValueError):
        return pipes, files
    for fd in numbers:
        target = link(f"{base}/{fd}")
        if target.startswith(b"pipe:[") and target[6:-1].isdigit():
            pipe = int(target[6:-1])
            pipes[pipe] = pipes.get(pipe, 0) | _ends(f"{base}/{fd}")
        elif target.startswith(b"socket:[") and target[8:-1].isdigit():
            pipes[f"socket:{int(target[8:-1])}"] = 0
        elif want_files and target.startswith(b"/") and not target.startswith((b"/dev/", b"/proc/", b"/memfd:")):
            try:
                found = os.stat(f"{base}/{fd}")
                if (found.st_mode & _S_IFMT) == _S_IFREG:
                    key = kernel.file_key(f"{base}/{fd}".encode(), follow=True)
                    files.append((target, found.st_size, key))
                elif (found.st_mode & _S_IFMT) == _S_IFIFO:
                    fifo = f"fifo:{found.st_dev}:{found.st_ino}"
                    pipes[fifo] = pipes.get(fifo, 0) | _ends(f"{base}/{fd}")
            except OSError:
                continue  # closed meanwhile
    return pipes, files


def has_output(pid: int) -> bool:
    """Whether its standard output is open. Many programs close it as the last they do, and then the kernel all else."""
    return link(f"/proc/{pid}/fd/1") != b""


def _ends(descriptor: str) -> int:
    """1: open to read, 2: to write, 3: both; proc(5): the link's own mode says so. 0 if it is closed meanwhile."""
    try:
        mode = os.lstat(descriptor).st_mode
    except OSError:
        return 0
    return (1 if mode & 0o400 else 0) | (2 if mode & 0o200 else 0)


def children(pid: int) -> list[int]:
    """Children of the main thread; empty where the kernel was built without CONFIG_PROC_CHILDREN."""
    return [int(child) for child in read(f"/proc/{pid}/task/{pid}/children").split()]


def look(pid: int, descriptors: int = 64) -> Look | None:
    """Everything of one process, None if it is gone. `at_ns` is the moment before, by CLOCK_MONOTONIC."""
    at_ns = time.monotonic_ns()
    seen = stat(pid)
    if seen is None:
        return None
    arguments, exe = argv(pid), link(f"/proc/{pid}/exe")
    return Look(seen, exe, arguments, descriptors, at_ns)


def plain(look: Look) -> "tuple[Any, ...]":
    """A look as marshal can carry it, for `holder.process`."""
    stat = look.stat
    who = (stat.pid, stat.start, stat.ppid, look.uid, look.loginuid, look.session, look.exe, look.argv)
    return (look.at_ns, *who, look.pipes, look.ends, look.blind, look.files)
