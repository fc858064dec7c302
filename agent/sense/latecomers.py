"""Files that reached a medium between its mount and our mark: found by looking, as the kernel told nobody.

Owns: one short look at a medium that was just marked, breadth first, for files changed since. It is cut off after
BUDGET_S: a stick with a million files must neither stall whoever senses nor be kept busy when its user pulls it.
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


def look(mount: str, now_ms: int, since_ms: int) -> Iterator[Fact]:
    """Found for each regular file below `mount` whose ctime is `since_ms` or later, on its own file system."""
    end = time.monotonic() + BUDGET_S
    pending = deque([os.fsencode(mount)])
    try:
        device = os.lstat(pending[0]).st_dev
    except OSError:
        return
    while pending and time.monotonic() < end:
        try:
            with os.scandir(pending.popleft()) as entries:
                seen = [(entry.path, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue  # pulled, or removed meanwhile
        for path, found in seen:
            if stat.S_ISDIR(found.st_mode) and found.st_dev == device:
                pending.append(path)
            elif stat.S_ISREG(found.st_mode) and max(found.st_ctime, found.st_mtime) * 1000 >= since_ms:
                try:
                    key = kernel.file_key(path)
                except OSError:
                    continue
                modified_ms = int(found.st_mtime * 1000)
                yield Found(
                    at_ms=now_ms, pid=0, key=key, path=path_text(path), size=found.st_size, modified_ms=modified_ms
                )
