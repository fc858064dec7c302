"""The small process that refuses opens with EPERM: a program of its own, started by `refusing.py`, by tables given beforehand.

Question: may this open go on? Owns: one permission group and the marks in it; the answer by where the file lies. "all": a
stopped medium, no. "writes": a medium that may only be read, not for writing. "tainted": a medium that may not get certain
protected directories' content, not by who read there; and who has a file there open for writing may not read these
("sources"). Must not know approvals, users or why.

**One group, and no other fanotify descriptor in this process**, whatever its kind. The kernel counts an opener that waits for
one group on every group that has a mark of another type on the same object, and a group that is closed waits for that count:
a process that is killed with two could close the one, wait for an opener that waits for the other, and never close that.

An event does not tell how a file is opened. Whoever opens it stands still in that system call, and /proc/TID/syscall shows its
arguments: 10 to 30 us. What is no known call (io_uring, a 32-bit program, the kernel itself) counts as writing. Who read a
protected file is known here, from the open that was held for it, before the agent is told of it; a pipe that a reader and a
writer share joins them, in whichever order the two open their files. Nothing is opened but below /proc.

Spoken with the agent over a SOCK_SEQPACKET pair, one marshalled tuple a message. From it: ("rules", [(directory, dev, kind,
whether a folder plays it, protected directories)]) in parts, then ("ruled", serial); ("folders", paths, gone); ("sources",
paths, gone). To it: ("ruled", serial, {directory: errno}), ("seen", looks), ("denied", pid, path, whether it is a protected
file's), ("ping",).
"""

import errno
import marshal
import os
import select
import struct
import time

from agent.sense import kernel, procfs

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in `holding.py`
    from typing import Any

    Place = tuple[bytes, int, str, bool, tuple[bytes, ...]]
    """A medium's directory ending in "/", st_dev (0: a folder), kind, folder, protected directories ending in "/" """
    Way = int | str

_MACHINES: "dict[str, dict[int, int]]" = {
    "x86_64": {2: 1, 257: 2, 304: 2, 85: -1, 59: -2, 322: -2, 437: -3},
    "aarch64": {56: 2, 265: 2, 221: -2, 281: -2, 437: -3},
    "riscv64": {56: 2, 265: 2, 221: -2, 281: -2, 437: -3},
}
"""Number of a system call → which argument holds the flags; always for writing; never; in a struct open_how"""
_WRITES, _NEVER, _HOW = -1, -2, -3
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_PERM, _CHILD = kernel.FAN_OPEN_PERM, kernel.FAN_EVENT_ON_CHILD
_ON_FOLDER = kernel.FAN_MARK_ONLYDIR | kernel.FAN_MARK_DONT_FOLLOW
_TRIES, _LATER_S, _AT_MOST_S = 4, 0.0005, 2.0
_MOST_KNOWN = 4096
_AGAIN_S, _PING_S = 1.0, 0.5
_SIGKILL = 9


class Refusal:
    """`run` until the agent is gone."""

    def __init__(self, to_agent: int, agent_pid: int) -> None:
        self._agent, self._own = to_agent, (os.getpid(), agent_pid)
        flags = kernel.FAN_CLASS_CONTENT | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_TID
        self._group = kernel.fanotify_init(flags | kernel.FAN_UNLIMITED_QUEUE | kernel.FAN_UNLIMITED_MARKS)
        self._calls = _MACHINES.get(os.uname().machine, {})
        self._coming: list[Place] = []
        self._places: list[Place] = []
        self._roots: tuple[bytes, ...] = ()
        self._folders: dict[bytes, None] = {}
        self._sources: dict[bytes, None] = {}
        self._readers: dict[Way, dict[bytes, None]] = {}
        self._writers: dict[Way, dict[bytes, None]] = {}
        self._looked: dict[int, tuple[float, int, tuple[Way, ...]]] = {}
        self._later: list[tuple[int, int, float]] = []
        self._told: dict[int, float] = {}

    def run(self) -> None:
        """Orders first, so that an open is judged by the tables that were sent before it."""
        poll = select.poll()
        poll.register(self._group, select.POLLIN)
        poll.register(self._agent, select.POLLIN)
        next_ping = 0.0
        while True:
            wait_s = _LATER_S if self._later else next_ping - time.monotonic()
            ready = dict(poll.poll(max(0.0, wait_s) * 1000))
            if ready and not self._obey():
                return
            if self._group in ready:
                self._answer()
            later, self._later = self._later, []
            for fd, tid, since in later:
                self._judge(fd, tid, since, time.monotonic())
            if time.monotonic() >= next_ping:
                next_ping = time.monotonic() + _PING_S
                self._send(("ping",))

    # -- the answer ----------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """For each event: judge, tell of a refusal while the opener stands still, close, answer."""
        try:
            buffer = os.read(self._group, 8192)
        except OSError:
            return  # nothing there; or the file could not be opened for us (EIO), and its opener was refused, too
        offset, now = 0, time.monotonic()
        while offset + kernel.EVENT_METADATA.size <= len(buffer):
            length, _, _, _, _, fd, tid = kernel.EVENT_METADATA.unpack_from(buffer, offset)
            offset += length
            if fd == kernel.FAN_NOFD:
                continue
            self._judge(fd, tid, now, now)

    def _judge(self, fd: int, tid: int, since: float, now: float) -> None:
        """Answer, or put aside whoever can't be judged yet: it waits for a core, and so for nothing that we do."""
        allowed: bool | None = False
        try:
            path = procfs.link(f"/proc/self/fd/{fd}")
            place = self._place(path, fd)
            allowed = True if self._is_own(tid) else self._may(place, path, tid, now)
            if allowed is None and now - since < _AT_MOST_S:
                self._later.append((fd, tid, since))
                return
            if not allowed:
                self._tell(tid, path, place is None, now)
        finally:
            if (fd, tid, since) not in self._later[-1:]:
                os.close(fd)  # before the answer, as in `holding.py`
                os.write(self._group, kernel.FAN_RESPONSE.pack(fd, kernel.FAN_ALLOW if allowed else kernel.FAN_DENY))

    def _place(self, path: bytes, fd: int) -> "Place | None":
        """The medium that a file lies on, by its path, or by its device where it is mounted at another place, too."""
        for place in self._places:
            if path.startswith(place[0]) or path + b"/" == place[0]:
                return place
        if any(path.startswith(root) for root in self._roots):
            return None
        dev = kernel.device_of(fd)
        return next((place for place in self._places if place[1] == dev and not place[3]), None)

    def _is_own(self, tid: int) -> bool:
        return tid in self._own or os.path.exists(f"/proc/{self._own[1]}/task/{tid}")  # noqa: PTH110

    def _may(self, place: "Place | None", path: bytes, tid: int, now: float) -> bool | None:
        if place is None:
            return self._may_read(path, tid, now)
        if place[2] == "all":
            return False
        for_writing = self.writes(tid)
        if not for_writing:
            return None if for_writing is None else True
        return place[2] == "tainted" and self._may_write(place[4], tid, now)

    def _may_write(self, roots: "tuple[bytes, ...]", tid: int, now: float) -> bool:
        ways = self._ways(tid, now)
        if any(root in self._readers.get(way, ()) for way in ways for root in roots):
            return False
        for way in ways:
            _note(self._writers, way, roots)
        return True

    def _may_read(self, path: bytes, tid: int, now: float) -> bool:
        within = tuple(root for root in self._roots if path.startswith(root))
        if not within:
            return True
        ways = self._ways(tid, now)
        if any(root in self._writers.get(way, ()) for way in ways for root in within):
            return False
        for way in ways:
            _note(self._readers, way, within)
        return True

    def _ways(self, tid: int, now: float) -> "tuple[Way, ...]":
        """What stands for this process in the tables: itself in this life, and the pipes it holds."""
        seen = procfs.stat(tid)
        if seen is None:
            return (f"gone:{tid}",)
        looked_at, start, ways = self._looked.get(tid, (0.0, -1, ()))
        if start == seen.start and now - looked_at < _AGAIN_S:
            return ways
        pid = _process_of(tid)
        main = procfs.stat(pid) or seen
        pipes, _ = procfs.held(tid, 64, want_files=False)
        ways = (f"{pid}/{main.start}", *pipes)
        if len(self._looked) >= _MOST_KNOWN:
            self._looked.clear()
        self._looked[tid] = (now, seen.start, ways)
        return ways

    def writes(self, tid: int) -> bool | None:
        """Whether the open in which this thread stands still is one for writing; True too if that can't be told. None: it was
        told a moment before the thread lay down to wait, and it has not got a core for that yet."""
        fields: list[bytes] = []
        for _ in range(_TRIES):
            fields = procfs.read(f"/proc/{tid}/syscall").split()
            if not fields or fields[0] != b"running":
                break
        if fields and fields[0] == b"running":
            return None
        try:
            where = self._calls.get(int(fields[0]), _WRITES)
            if where == _WRITES:
                return True
            if where == _NEVER:
                return False
            if where == _HOW:
                return bool(_open_how(tid, int(fields[3], 16)) & _FOR_WRITING)
            return bool(int(fields[1 + where], 16) & _FOR_WRITING)
        except (ValueError, IndexError, OSError):
            return True

    def _tell(self, tid: int, path: bytes, source: bool, now: float) -> None:
        """Who was refused, after what is known of it: it stands still as yet."""
        pid = _process_of(tid)
        if now - self._told.get(pid, -_AGAIN_S) >= _AGAIN_S and (look := procfs.look(pid)) is not None:
            if len(self._told) >= _MOST_KNOWN:
                self._told.clear()
            self._told[pid] = now
            self._send(("seen", [procfs.plain(look)]))
        self._send(("denied", pid, path, source))

    # -- orders --------------------------------------------------------------------------------------------------------

    def _obey(self) -> bool:
        """All orders there are. False: the agent is gone."""
        while True:
            try:
                message = os.read(self._agent, 65536)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False  # it was killed with words of ours unread (ECONNRESET)
            if not message:
                return False
            order, *given = marshal.loads(message)  # noqa: S302 (from our own parent, over a private socket)
            if order == "rules":
                self._coming += [(path, dev, kind, folder, tuple(roots)) for path, dev, kind, folder, roots in given[0]]
            elif order == "ruled":
                self._send(("ruled", given[0], self._rule()))
            elif order == "folders":
                self._known(self._folders, *given)
            else:
                self._known(self._sources, *given)

    def _rule(self) -> "dict[bytes, int]":
        """From now on the rules that came, and no others; those whose marks the kernel refuses, with its errno."""
        before, self._places = self._places, sorted(self._coming, key=lambda place: -len(place[0]))
        self._coming = []
        roots = tuple({root for place in self._places if place[2] == "tainted" for root in place[4]})
        failed: dict[bytes, int] = {}
        for place in [each for each in before if each not in self._places]:
            for path in self._marks_of(place):
                self._mark(kernel.FAN_MARK_REMOVE, place, path)
        for place in self._places:  # also those that are marked already: another mount may be there now
            for path in self._marks_of(place):
                if (code := self._mark(kernel.FAN_MARK_ADD, place, path)) and not place[3]:
                    failed[place[0]] = code
        if bool(roots) != bool(self._roots):
            for path in self._sources:
                self._mark_source(path, not roots)
        if not roots:
            self._readers.clear()
            self._writers.clear()
        self._roots = roots
        return failed

    def _known(self, table: "dict[bytes, None]", paths: "list[bytes]", gone: bool) -> None:
        for path in paths:
            if gone:
                table.pop(path, None)
                continue
            table[path] = None
            if table is self._sources:
                if self._roots:
                    self._mark_source(path, False)
                continue
            for place in self._places:
                if place[3] and (path + b"/").startswith(place[0]):
                    self._mark(kernel.FAN_MARK_ADD, place, path)

    def _marks_of(self, place: "Place") -> "list[bytes]":
        if not place[3]:
            return [place[0].rstrip(b"/") or b"/"]
        return [folder for folder in self._folders if (folder + b"/").startswith(place[0])]

    def _mark(self, action: int, place: "Place", path: bytes) -> int:
        flags = _ON_FOLDER if place[3] else kernel.FAN_MARK_FILESYSTEM
        mask = _PERM | (_CHILD if place[3] else 0) | (kernel.FAN_ONDIR if place[2] == "all" else 0)
        try:
            kernel.fanotify_mark(self._group, action | flags, mask, path)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _mark_source(self, path: bytes, gone: bool) -> None:
        action = kernel.FAN_MARK_REMOVE if gone else kernel.FAN_MARK_ADD
        try:
            kernel.fanotify_mark(self._group, action | kernel.FAN_MARK_DONT_FOLLOW, _PERM | _CHILD, path)
        except OSError:
            return  # it went meanwhile, and its files with it

    def _send(self, message: "tuple[Any, ...]") -> None:
        try:
            os.write(self._agent, marshal.dumps(message))
        except OSError:
            return  # full, or gone: a refusal that is not told is still one


def _process_of(tid: int) -> int:
    """The process of a thread."""
    said = procfs.parse_status(procfs.read(f"/proc/{tid}/status")).get(b"Tgid", b"")
    return int(said) if said.isdigit() else tid


def _open_how(tid: int, address: int) -> int:
    """`flags` of a struct open_how (openat2(2)) in a process' memory."""
    fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        (flags,) = struct.unpack("=Q", os.pread(fd, 8, address))
        return int(flags)
    finally:
        os.close(fd)


def _note(table: "dict[Way, dict[bytes, None]]", way: "Way", roots: "tuple[bytes, ...]") -> None:
    if not roots:
        return
    if way not in table and len(table) >= _MOST_KNOWN:
        del table[next(iter(table))]
    table.setdefault(way, {}).update(dict.fromkeys(roots))


def main(to_agent: int, agent_pid: int) -> None:
    """Run on an inherited socket until the agent is gone."""
    kernel.die_with_parent(_SIGKILL)
    if os.getppid() != agent_pid:
        return  # it ended before the line above
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        os.write(to_agent, marshal.dumps(("unhurried",)))  # RLIMIT_RTPRIO is 0 here; the holder says so, too
    Refusal(to_agent, agent_pid).run()
