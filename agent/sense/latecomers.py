"""Files that reached a medium between its mount and our mark: found by looking, as the kernel told nobody.

Owns: one short look at a medium that was just marked, breadth first, for files changed since. It is cut off after
BUDGET_S: a stick with a million files must not stall whoever senses. The look is taken through a view of our own, so that the
stick can be unmounted meanwhile.
Must not know what a file means; who wrote it is not known (pid 0). `fanotify.py` sees all that comes later.
"""

import os
import stat
import time
from collections import deque
from collections.abc import Iterator

from agent.contract.event import path_text
from agent.core.facts import Fact, Found
from agent.sense import kernel

BUDGET_S = 0.05
_COARSE_MS, _FINE_MS = 2_000, 10
"""How much older than the write a file's times may be: vfat keeps them to two seconds, others to a tick of the kernel's clock.
Not two seconds for all: a stick plugged in again at once would have its last copies told anew."""


def look(mount: str, now_ms: int, since_ms: int) -> Iterator[Fact]:
    """Found for each regular file below `mount` changed (ctime or mtime) at `since_ms` or later, on its own file system."""
    raw = os.fsencode(mount)
    try:
        view = kernel.open_view(raw)
    except OSError:
        yield from _look(raw, raw, now_ms, since_ms)  # of another mount namespace, or an old kernel
        return
    try:
        yield from list(_look(b"/proc/self/fd/%d" % view, raw, now_ms, since_ms))
    finally:
        os.close(view)


def _look(top: bytes, mount: bytes, now_ms: int, since_ms: int) -> Iterator[Fact]:
    """The same by the path `top`, told as below `mount`."""
    end = time.monotonic() + BUDGET_S
    pending = deque([top])
    try:
        device = os.stat(top).st_dev  # noqa: PTH116 (raw bytes)
    except OSError:
        return
    while pending:
        fresh: list[tuple[bytes, os.stat_result]] = []
        try:
            with os.scandir(pending.popleft()) as entries:
                for entry in entries:
                    if time.monotonic() >= end:  # also within one directory: it may hold a million
                        pending.clear()
                        break
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode) and found.st_dev == device:
                        pending.append(entry.path)
                    elif stat.S_ISREG(found.st_mode) and _changed_ms(found) >= since_ms:
                        fresh.append((entry.path, found))
        except OSError:
            continue  # pulled, or removed meanwhile
        for path, found in fresh:  # only now: whoever takes a fact may be slow, and no descriptor may stay on a medium
            try:
                key = kernel.file_key(path)
            except OSError:
                continue
            modified_ms, told = int(found.st_mtime * 1000), path_text(mount + path[len(top) :])
            yield Found(at_ms=now_ms, pid=0, key=key, path=told, size=found.st_size, modified_ms=modified_ms)


def _changed_ms(found: os.stat_result) -> int:
    """The latest moment at which the file can have been changed."""
    newest_ns = max(found.st_ctime_ns, found.st_mtime_ns)
    return newest_ns // 1_000_000 + (_FINE_MS if newest_ns % 1_000_000_000 else _COARSE_MS)
