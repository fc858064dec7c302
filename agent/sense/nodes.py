# ruff: noqa: PTH123
"""Who opens the block devices of media: whoever is about to mount one, perhaps where we can't see it, or writes to it.

Owns: one fanotify group with a mark on each such node in /dev, so that other devices cost nothing. A mount made inside another
mount namespace tells us nothing (see `mounts.py`); but mount(8) opens the node first, to see which file system is on it. And
who writes to the node itself (dd, an image writer, debugfs) does so past every file system. Must not know what is a medium,
nor what was written. Nothing is opened here, so no stick is kept from being pulled.

Of a writer the first write is told only: until it closes the device, its mark asks for no more of them.
"""

import os
from collections.abc import Iterator

from agent.core.facts import NodeWritten
from agent.sense import SensorError, kernel
from agent.sense.fanotify_events import heads, names

_READ_BYTES = 4096
_MOST_READERS = 64
_MASK = kernel.FAN_OPEN | kernel.FAN_MODIFY | kernel.FAN_CLOSE_WRITE


class Nodes:
    """`fileno()` is readable when `openers()` has something to say, and then perhaps `written()`. `readers`: who opened
    a device that protected directories lie on, with when."""

    def __init__(self) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_FID
        try:
            self._group = kernel.fanotify_init(flags)
        except OSError as error:
            raise SensorError(f"fanotify: {error.strerror}; it needs CAP_SYS_ADMIN (root)") from None
        self._nodes: dict[bytes, tuple[str, bytes]] = {}
        self._since: dict[bytes, int] = {}
        self._writers: dict[bytes, dict[int, None]] = {}
        self._written: list[NodeWritten] = []
        self._below: dict[bytes, str] = {}
        self.readers: dict[int, int] = {}

    def fileno(self) -> int:
        """The group's descriptor, -1 when closed."""
        return self._group

    def watch(self, nodes: list[str]) -> None:
        """Notice who opens these block devices ("major:minor"). What has no node in /dev is passed over."""
        for number in nodes:
            path = _path_of(number)
            try:
                if path:
                    kernel.fanotify_mark(self._group, kernel.FAN_MARK_ADD, _MASK, path)
                    self._nodes[kernel.file_key(path)] = number, path
            except OSError:
                continue  # pulled again already; its mark goes with the node

    def watch_below(self, nodes: list[str]) -> None:
        """Notice who opens these block devices, which protected directories lie on; those of media are watched closer."""
        for number in [each for each in nodes if each not in self._below.values()]:
            path = _path_of(number)
            try:
                if path and path not in [known for _, known in self._nodes.values()]:
                    kernel.fanotify_mark(self._group, kernel.FAN_MARK_ADD, kernel.FAN_OPEN, path)
                    self._below[kernel.file_key(path)] = number
            except OSError:
                continue  # it went away; what lies on it did so, too

    def openers(self, now_ms: int) -> set[int]:
        """Pids of those who opened or wrote to one since the last call."""
        pids, own = set[int](), os.getpid()
        while self._group >= 0:
            try:
                buffer = os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                break
            for mask, _, pid, start, end in heads(buffer):
                if pid != own:
                    pids.add(pid)
                    self._learn(mask, pid, names(buffer, start, end).target, now_ms)
        return pids

    def written(self) -> Iterator[NodeWritten]:
        """What `openers` met of finished writing."""
        written, self._written = self._written, []
        return iter(written)

    def _learn(self, mask: int, pid: int, key: bytes, now_ms: int) -> None:
        if key in self._below:
            self.readers.pop(pid, None)
            self.readers[pid] = now_ms
            if len(self.readers) > _MOST_READERS:
                del self.readers[next(iter(self.readers))]
        if key not in self._nodes:
            return
        number, path = self._nodes[key]
        since_ms = self._since.setdefault(key, now_ms)
        if mask & kernel.FAN_MODIFY:
            self._writers.setdefault(key, {})[pid] = None
            self._mark(kernel.FAN_MARK_REMOVE, path)
        if mask & kernel.FAN_CLOSE_WRITE:
            self._mark(kernel.FAN_MARK_ADD, path)
            del self._since[key]
            for writer in self._writers.pop(key, {}):
                told = NodeWritten(at_ms=now_ms, pid=writer, node=number, path=os.fsdecode(path), since_ms=since_ms)
                self._written.append(told)

    def _mark(self, action: int, path: bytes) -> None:
        try:
            kernel.fanotify_mark(self._group, action, kernel.FAN_MODIFY, path)
        except OSError:
            return  # pulled; its mark went with it

    def close(self) -> None:
        """Give the group back."""
        if self._group >= 0:
            os.close(self._group)
            self._group = -1


def _path_of(number: str) -> bytes:
    """ "8:17" → b"/dev/sdb1"; empty for what is no block device here."""
    try:
        with open(f"/sys/dev/block/{number}/uevent", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return b""
    return next((b"/dev/" + line.removeprefix(b"DEVNAME=") for line in lines if line.startswith(b"DEVNAME=")), b"")
