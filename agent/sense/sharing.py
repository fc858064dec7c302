"""The small process that watches one user's FUSE mount with that user's ids: a program of its own, started by `shares.py`.

Question: which files on it were finished, by whom? Owns: one fanotify group with a mark on that mount's file system, and what
is asked of its server. A server may be slow, hostile or gone, and never answer; and a process with a user's ids may be killed
or stopped by that user. So nothing of this may happen in the agent. Must not know what a file means, nor other mounts.

Who waits for a server that has taken the request can't even be killed before it answers (request_wait_answer in the kernel's
fuse/dev.c); the alarm ends this process where that can be, else as soon as it can be. Meanwhile the agent knows by BUSY.
Written to the parent, one message each: a kind, an errno or pid, a size, then the file's key and its path.
"""

import errno
import os
import select
import signal
import struct
from contextlib import suppress

from agent.sense import fusemount, kernel
from agent.sense.fanotify_events import heads

PATIENCE_S = 3
MESSAGE = struct.Struct("=cqqH")
"""kind, pid (or errno), size, length of the key; the key and the path follow"""
WATCHED, CLOSED, LOST, BUSY, DONE = b"w", b"c", b"l", b"b", b"d"
_SIGKILL = 9


def main(to_agent: int, agent_pid: int, mount: bytes, uid: int, gid: int) -> None:
    """Run on an inherited socket until the agent's end of it closes."""
    kernel.die_with_parent(_SIGKILL)
    if os.getppid() != agent_pid:
        return  # it ended before the line above
    signal.alarm(PATIENCE_S)
    # not "unlimited": what a server that does not answer leaves unread is charged to nobody for ever
    group = kernel.fanotify_init(kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK)
    try:
        with fusemount.as_owner((uid, gid)):
            kernel.die_with_parent(_SIGKILL)  # changing ids took it back
            kernel.undumpable()
            kernel.fanotify_mark(group, kernel.FAN_MARK_ADD | kernel.FAN_MARK_FILESYSTEM, kernel.FAN_CLOSE_WRITE, mount)
            signal.alarm(0)
            os.write(to_agent, MESSAGE.pack(WATCHED, 0, 0, 0))
            _run(group, to_agent)
    except OSError as error:
        with suppress(OSError):  # the agent is gone
            os.write(to_agent, MESSAGE.pack(WATCHED, error.errno or errno.EIO, 0, 0))


def _run(group: int, to_agent: int) -> None:
    poll = select.poll()
    poll.register(group, select.POLLIN)
    poll.register(to_agent, 0)  # POLLHUP: the agent let go
    while True:
        ready = dict(poll.poll())
        if to_agent in ready:
            return
        signal.alarm(PATIENCE_S)
        os.write(to_agent, MESSAGE.pack(BUSY, 0, 0, 0))
        _tell(group, to_agent)
        os.write(to_agent, MESSAGE.pack(DONE, 0, 0, 0))
        signal.alarm(0)


def _tell(group: int, to_agent: int) -> None:
    """What was finished by now. Each file is told before it is let go, so that its mount can't be gone by then."""
    try:
        buffer = os.read(group, 4096)
    except BlockingIOError:
        return
    except OSError:  # the file could not be opened for us; the event is spent
        os.write(to_agent, MESSAGE.pack(LOST, 0, 0, 0))
        return
    for mask, fd, pid, _, _ in heads(buffer):
        if mask & kernel.FAN_Q_OVERFLOW:
            os.write(to_agent, MESSAGE.pack(LOST, 0, 0, 0))
        if fd < 0:
            continue
        link = b"/proc/self/fd/%d" % fd
        try:
            path, size = os.readlink(link), os.fstat(fd).st_size  # noqa: PTH115 (raw bytes)
            key = kernel.file_key(link, follow=True)
            os.write(to_agent, MESSAGE.pack(CLOSED, pid, size, len(key)) + key + path)
        except OSError:
            os.write(to_agent, MESSAGE.pack(LOST, pid, 0, 0))
        finally:
            os.close(fd)
