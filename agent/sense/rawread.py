# ruff: noqa: PTH116
# (paths are raw bytes here, and pathlib knows only text)
"""What was read past the file system: a program opened the block device under a protected directory, and wrote a file.

Question: is a file that it wrote one of those that lie on the device? Owns: which devices protected trees lie on, and the
search for a protected file of the very size and bytes of what was written. Only the bytes say so: who has opened the device
may have read anything, and nobody tells what. A part, or a packed or an encrypted file, is not found. Must not know who writes
where (`nodes.py` and the file sensor do), nor what follows.

The search ends after BUDGET_S: some 50,000 files. Nothing stays open.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator

from agent.contract.event import path_bytes, path_text
from agent.core.facts import Closed, Opened
from agent.sense import kernel, likeness

BUDGET_S = 0.15
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOATIME


def devices(trees: Iterable[str]) -> list[str]:
    """The block devices ("major:minor") that these directories lie on; none for those that have a number of their own."""
    found: dict[str, None] = {}
    for tree in trees:
        try:
            device = os.stat(os.fsencode(tree)).st_dev
        except OSError:
            continue  # it comes later
        if os.major(device):
            found[f"{os.major(device)}:{os.minor(device)}"] = None
    return list(found)


def read_for(written: Closed, trees: Iterable[str]) -> Iterator[Opened]:
    """The protected file that a finished one is, told as opened by who wrote it."""
    if not written.size or not written.path.startswith("/"):
        return
    deadline = time.monotonic() + BUDGET_S
    copy = path_bytes(written.path)
    for path, seen in _files(trees, deadline):
        if seen.st_size == written.size and path != copy and _same(copy, path, seen.st_size):
            told = Opened(at_ms=written.at_ms, pid=written.pid, key=kernel.file_key(path), path=path_text(path))
            told.size, told.inode = seen.st_size, seen.st_ino
            yield told
            return


def _files(trees: Iterable[str], deadline: float) -> Iterator[tuple[bytes, os.stat_result]]:
    pending = [os.fsencode(tree) for tree in trees]
    while pending and time.monotonic() < deadline:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif stat.S_ISREG((seen := entry.stat(follow_symlinks=False)).st_mode):
                        yield entry.path, seen
        except OSError:
            continue  # it went away meanwhile


def _same(one: bytes, other: bytes, size: int) -> bool:
    try:
        return _blocks(one, size) == _blocks(other, size)
    except OSError:
        return False


def _blocks(path: bytes, size: int) -> list[bytes]:
    fd = os.open(path, _FLAGS)
    try:
        return [os.pread(fd, likeness.BLOCK, at) for at in likeness.places(size, likeness.BLOCKS, likeness.BLOCK)]
    finally:
        os.close(fd)
