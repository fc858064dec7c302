"""Whose writes are worth a look: processes that opened protected files, and those that may have got the bytes from them.

Question: can this writer have protected bytes in hand, and is there anybody left who can? Owns: the readers and when they
last read, their parents (whose other children may be the next stage of a pipeline), and a verdict a pid. A wide net, and
cheap: what is in it is looked at and then judged by the core (`core/grading.py`); a build in another session is not.
Must not know files. Told of readers by whoever sees opens; asked by `arming.py`.
"""

import os
from collections.abc import Callable

from agent.sense import procfs

READER_MS = 900_000
"""A living reader counts for so long after its last opening; what it writes later is not seen unless somebody else reads."""
LINGER_MS = 10_000
"""So long after its end: what a pipe still holds, and a child that nobody told of."""
GROUP_MS = 120_000
"""So long after its end while others of its process group live: the last stages of a pipeline, a script."""
_MOST = 4_096
_NEAR = 3
_ANCESTORS = 12


class _Reader:
    __slots__ = ("gone_ms", "group", "last_ms")

    def __init__(self, now_ms: int, group: int) -> None:
        self.last_ms, self.group = now_ms, group
        self.gone_ms: int | None = None


class Interest:
    """`read` for each opener, `concerns` for each writer. `parent` answers with the parent of a pid, 0 if unknown."""

    def __init__(self, parent: Callable[[int], int]) -> None:
        self._parent = parent
        self._readers: dict[int, _Reader] = {}
        self._near: dict[int, int] = {}
        self._verdicts: dict[int, bool] = {}

    def read(self, pid: int, now_ms: int) -> None:
        """A process opened something protected."""
        known = self._readers.get(pid)
        if known is not None:
            known.last_ms, known.gone_ms = now_ms, None
            return
        if len(self._readers) >= _MOST:
            self._forget(next(iter(self._readers)))
        seen = procfs.stat(pid)
        self._readers[pid] = _Reader(now_ms, seen.pgrp if seen is not None else 0)
        for above in self._close_ancestors(pid):
            self._near[above] = self._near.get(above, 0) + 1
        self._verdicts.clear()

    def concerns(self, pid: int) -> bool:
        """Whether what this process writes is to be looked at."""
        known = self._verdicts.get(pid)
        if known is None:
            if len(self._verdicts) >= _MOST:
                self._verdicts.clear()
            known = self._verdicts[pid] = self._judge(pid)
        return known

    def left(self, now_ms: int) -> bool:
        """Whether anybody is left who may write what was read; forgets the others. Costs a system call a reader."""
        for pid, reader in list(self._readers.items()):
            if reader.gone_ms is None and not _alive(pid):
                reader.gone_ms = now_ms
            age_ms = now_ms - reader.last_ms
            gone_ms = 0 if reader.gone_ms is None else now_ms - reader.gone_ms
            most_ms = LINGER_MS if gone_ms <= LINGER_MS or not _group_alive(reader.group) else GROUP_MS
            if not 0 <= age_ms <= READER_MS or not 0 <= gone_ms <= most_ms:
                self._forget(pid)
        return bool(self._readers)

    def _judge(self, pid: int) -> bool:
        if pid in self._readers or pid in self._near:
            return True
        for step in range(_ANCESTORS):
            pid = self._parent(pid)
            if pid <= 1:
                return False
            if pid in self._readers or (step < _NEAR and pid in self._near):
                return True
        return False

    def _close_ancestors(self, pid: int) -> list[int]:
        """Its parent and grandparent; not one that is a service manager, whose children have nothing in common."""
        above = self._parent(pid)
        beyond = self._parent(above) if above > 1 else 0
        return [each for each in (above, beyond if beyond > 1 and self._parent(beyond) > 1 else 0) if each > 1]

    def _forget(self, pid: int) -> None:
        del self._readers[pid]
        self._verdicts.clear()
        if not self._readers:
            self._near.clear()
            return
        for above in self._close_ancestors(pid):
            count = self._near.get(above, 0) - 1
            if count > 0:
                self._near[above] = count
            else:
                self._near.pop(above, None)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _group_alive(group: int) -> bool:
    if group <= 1 or group == os.getpgrp():
        return False
    try:
        os.killpg(group, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
