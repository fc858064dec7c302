"""The small process that holds opens on media while it looks who opens: a program of its own, started by `holder.py`.

Owns: one fanotify permission group (FAN_OPEN_PERM; a mark on each medium's file system, or on every directory of a plain
folder that plays one), the answer to each event, and the look at the opener's /proc in between. Every open is allowed here;
what is refused, in mode "enforce", is so by a process of its own (`refusal.py`). It runs apart from the agent so that whoever
is held never waits for the agent's GIL, locks, disk or name service; so it opens nothing on a marked file system, logs nothing,
keeps no file.

How long somebody waits: a pid is looked at once a second at most; a look ends after 10 ms of work (it takes 0.2) and is
done in real time (SCHED_FIFO), so that a busy machine does not prolong it. A process that opens many files at once (more
than STORM_HOLDS in STORM_S) is known by then, so holding it longer tells nothing new: the marks are lifted for SUSPEND_S. While
they are, another process could write unheld; the notification marks still tell its pid, and the agent then reads its /proc
a little later (99 % of the time early enough), so what is at risk is the argv of a program that lives less than a
millisecond in that fifth of a second.

Spoken with the parent over a SOCK_SEQPACKET pair, one marshalled tuple a message. From it: ("watch", mount),
("unwatch", mount), ("folders", [directories], gone), ("tripwire", order, paths) for `tripwire.py`. To it: ("ping", lost),
("seen", [looks]), ("watched", mount, errno or 0), ("tripped", trips), ("disarmed", trips, refused), and at the start
("refused", errno) where the kernel has no permission events, ("unhurried",) where it may not run in real time.
"""

import errno
import marshal
import os
import select
import time

from agent.sense import kernel, procfs
from agent.sense.tripwire import Tripwire

BUDGET_S = 0.01
REMEMBER_S = 1.0
STORM_HOLDS, STORM_S, SUSPEND_S = 64, 0.1, 0.2
PING_S = 0.5
_GROUP_MAX = 16
_KNOWN_MAX = 4096
_MARK = kernel.FAN_MARK_FILESYSTEM
_IGNORED = _MARK | kernel.FAN_MARK_IGNORED_MASK | kernel.FAN_MARK_IGNORED_SURV_MODIFY
_FOLDER = kernel.FAN_MARK_ONLYDIR | kernel.FAN_MARK_DONT_FOLLOW
_SIGKILL = 9
TYPE_CHECKING = False
if TYPE_CHECKING:  # typing, like socket and signal, costs half a megabyte each
    from typing import Any

    Seen = tuple[Any, ...]


class Holding:
    """The permission group and what is remembered of pids. `to_agent` is the socket's descriptor, non-blocking.

    `writes` is the agent's group for writes elsewhere, -1: no tripwire is wanted.
    """

    def __init__(self, to_agent: int, writes: int = -1) -> None:
        self._agent = to_agent
        self._tripwire = Tripwire(writes) if writes >= 0 else None
        # Last of the groups here: of a process that is killed the kernel lets go of the newest file first. Whoever is held on a
        # folder counts on the tripwire's marks, too: that group must not be closed before this one let all go (`refusal.py`).
        flags = kernel.FAN_CLASS_CONTENT | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK
        self._group = kernel.fanotify_init(flags | kernel.FAN_UNLIMITED_QUEUE | kernel.FAN_UNLIMITED_MARKS)
        self._mounts: dict[bytes, int] = {}
        self._folders: dict[bytes, int] = {}
        self._looked: dict[int, float] = {}
        self._near: dict[int, float] = {}
        self._holds: dict[int, tuple[float, int]] = {}
        self._suspended_until = 0.0
        self._lost = 0
        self._own = (os.getpid(), os.getppid())

    def run(self) -> None:
        """Until the agent's end of the socket closes."""
        poll = select.poll()
        poll.register(self._group, select.POLLIN)
        poll.register(self._agent, select.POLLIN)
        if self._tripwire is not None:
            poll.register(self._tripwire.group, select.POLLIN)
        next_ping = 0.0
        while True:
            now = time.monotonic()
            wait_until = min(next_ping, self._suspended_until) if self._suspended_until else next_ping
            ready = dict(poll.poll(max(0.0, wait_until - now) * 1000))
            if self._tripwire is not None and self._tripwire.group in ready and self._tripwire.answer(self._tripped_by):
                self._send(("tripped", self._tripwire.trips))
            if self._group in ready:
                self._answer()
            if self._agent in ready and not self._obey():
                return
            now = time.monotonic()
            if self._suspended_until and now >= self._suspended_until:
                self._resume()
            if now >= next_ping:
                next_ping = now + PING_S
                if self._send(("ping", self._lost)):
                    self._lost = 0

    def _answer(self) -> None:
        """For each event: look, send what was learned, close, allow.

        Sent before it is allowed (about 10 us), so that the agent finds it before the kernel tells of the file that is opened.
        Closed before it is allowed, so that the medium is not busy when a quick opener is done and unmounts it: the kernel
        knows an answer by the descriptor's number alone.
        """
        try:
            buffer = os.read(self._group, 8192)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self._lost += 1  # the file could not be opened for us (EIO: a stick pulled out); its opener was refused, too
            return
        offset = 0
        while offset + kernel.EVENT_METADATA.size <= len(buffer):
            length, _, _, _, _, fd, pid = kernel.EVENT_METADATA.unpack_from(buffer, offset)
            offset += length
            if fd == kernel.FAN_NOFD:
                continue
            now = time.monotonic()
            try:
                if self._tripwire is not None and pid not in self._own and self._tripwire.trip():
                    self._send(("tripped", self._tripwire.trips))
                if pid not in self._own and now - self._looked.get(pid, 0.0) >= REMEMBER_S:
                    learned = self._look(pid, now)
                    if learned:
                        self._send(("seen", learned))
            finally:
                os.close(fd)
                os.write(self._group, kernel.FAN_RESPONSE.pack(fd, kernel.FAN_ALLOW))
            self._count(pid, now)

    def _tripped_by(self, pid: int) -> None:
        """The first who opens a protected file: of a pipeline the other stages are known by this look."""
        if pid not in self._own and (learned := self._look(pid, time.monotonic())):
            self._looked.pop(pid, None)  # what it will have open when it opens a file on a medium is not known by this look
            self._send(("seen", learned))

    def _look(self, pid: int, now: float) -> "list[Seen]":
        """The opener, and the pipes of its parent, siblings and children in the same process group."""
        if len(self._looked) >= _KNOWN_MAX:
            self._looked.clear()
            self._near.clear()
        self._looked[pid] = now
        deadline = time.thread_time() + BUDGET_S  # of our own work: on a busy machine the wall clock runs on without us
        opener = procfs.look(pid)
        if opener is None:
            return []
        learned = [procfs.plain(opener)]
        ppid, pgrp = opener.stat.ppid, opener.stat.pgrp
        if not opener.pipes:
            return learned  # nobody near can hold the other end
        siblings = procfs.children(ppid) if any(opener.ends) else []  # sockets alone: does the parent hold the same?
        here = siblings.index(pid) if pid in siblings else len(siblings)
        kin = [ppid, *_nearest(siblings, here), *procfs.children(pid)] if siblings else [ppid]
        for other in kin[:_GROUP_MAX]:
            if time.thread_time() >= deadline:
                break
            seen = procfs.stat(other) if other > 1 and other != pid else None
            lately = max(self._looked.get(other, 0.0), self._near.get(other, 0.0))
            if seen is not None and seen.pgrp == pgrp and now - lately >= REMEMBER_S:
                near = procfs.look(other, 16)
                if near is not None:
                    self._near[other] = now  # not `_looked`: it may become another program before it opens something
                    learned.append(procfs.plain(near))
        return learned

    def _count(self, pid: int, now: float) -> None:
        since, holds = self._holds.get(pid, (now, 0))
        if now - since > STORM_S:
            since, holds = now, 0
        if len(self._holds) >= _KNOWN_MAX:
            self._holds.clear()
        self._holds[pid] = since, holds + 1
        if holds + 1 > STORM_HOLDS and not self._suspended_until:
            self._lift(True)
            self._suspended_until = now + SUSPEND_S
            self._holds.clear()

    def _resume(self) -> None:
        self._suspended_until = 0.0
        self._lift(False)

    def _lift(self, lifted: bool) -> None:
        """Take the marks of media off, or put them on again; of folders, which may have thousands, ignore what they tell."""
        for mount in list(self._mounts):
            self._mark(kernel.FAN_MARK_REMOVE if lifted else kernel.FAN_MARK_ADD, mount)
        for folder in {dev: folder for folder, dev in self._folders.items()}.values():
            try:
                action = kernel.FAN_MARK_ADD if lifted else kernel.FAN_MARK_REMOVE
                kernel.fanotify_mark(self._group, action | _IGNORED, kernel.FAN_OPEN_PERM, folder)
            except OSError:
                continue  # the folder is gone, and its marks with it

    def _mark(self, action: int, mount: bytes) -> int:
        try:
            if os.stat(mount).st_dev != self._mounts[mount]:  # noqa: PTH116 (raw bytes)
                return errno.ENODEV  # unmounted: what is there now is not ours to mark
            kernel.fanotify_mark(self._group, action | _MARK, kernel.FAN_OPEN_PERM, mount)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _obey(self) -> bool:
        """All orders there are. False: the agent is gone."""
        while True:
            try:
                message = os.read(self._agent, 65536)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError:
                return False  # the agent was killed with words of ours unread (ECONNRESET)
            if not message:
                return False
            self._do(message)

    def _do(self, message: bytes) -> None:
        order, mount, dev = marshal.loads(message)  # noqa: S302 (from our own parent, over a private socket)
        if order == "tripwire":
            if self._tripwire is not None and (said := self._tripwire.obey(mount, dev)) is not None:
                self._send(said)
        elif order == "folders":
            self._hold_folders(mount, dev)
        elif order == "watch":
            self._mounts[mount] = dev
            code = self._mark(kernel.FAN_MARK_ADD, mount)
            if code:
                del self._mounts[mount]
            self._send(("watched", mount, code))
        elif mount in self._mounts:
            self._mark(kernel.FAN_MARK_REMOVE, mount)
            del self._mounts[mount]

    def _hold_folders(self, folders: "list[bytes]", gone: bool) -> None:
        """Directories of a plain folder that plays a medium: only what is opened right in them is held."""
        action = kernel.FAN_MARK_REMOVE if gone else kernel.FAN_MARK_ADD
        for folder in folders:
            try:
                dev = os.stat(folder).st_dev  # noqa: PTH116 (raw bytes)
                kernel.fanotify_mark(self._group, action | _FOLDER, kernel.FAN_OPEN_PERM | kernel.FAN_EVENT_ON_CHILD, folder)
                self._folders[folder] = dev
            except OSError as error:
                if not gone and error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    self._send(("watched", folder, error.errno or errno.EIO))
            if gone:
                self._folders.pop(folder, None)

    def _send(self, message: "tuple[Any, ...]") -> bool:
        try:
            os.write(self._agent, marshal.dumps(message))
        except OSError:
            self._lost += message[0] == "seen"
            return False
        return True


def _nearest(siblings: "list[int]", here: int) -> "list[int]":
    """Those forked next to the one at `here` first: the stages of a pipeline are."""
    return [siblings[at] for at in sorted(range(len(siblings)), key=lambda at: abs(at - here))]


def main(to_agent: int, agent_pid: int, writes: int = -1) -> None:
    """Run on an inherited socket until the agent is gone."""
    kernel.die_with_parent(_SIGKILL)
    if os.getppid() != agent_pid:
        return  # it ended before the line above
    try:  # a look is short and bounded, so that no other work of a busy machine may stand before whoever waits for it
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        os.write(to_agent, marshal.dumps(("unhurried",)))  # RLIMIT_RTPRIO is 0 here
    try:
        holding = Holding(to_agent, writes)
    except OSError as error:
        os.write(to_agent, marshal.dumps(("refused", error.errno)))
        return
    holding.run()
