# (paths are raw bytes here, and pathlib knows only text)
"""What the file sensor finds by looking, where the kernel tells nothing.

Owns: the files on media that are being written, and how large they are by now; the endless slow pass over protected trees
for files with several names; Found facts from a search. Must not know events or what a path means. `fanotify.py` says what
it was told, and hands these facts on.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.contract.event import path_text
from agent.core.facts import Attributes, Fact, Found, Grown
from agent.sense.marks import Marks, Root, Seen, key_of

_MOST_GROWING = 4096
_SWEEP = 400
_FIND_S, _REST = 0.15, 4
"""A file's other name is looked for so long at once, and then not for so many times what that took"""
_LINKS = 2000
_INODES, _INODES_S = 20_000, 1.0
"""Whoever links one file links more: so many files of the trees are remembered for so long"""


@dataclass(slots=True)
class _Growing:
    path: bytes
    pid: int
    size: int = 0


class Growing:
    """Files that were made on a medium and are not closed yet."""

    def __init__(self) -> None:
        self._files: dict[bytes, _Growing] = {}

    def begin(self, key: bytes, path: bytes, pid: int) -> None:
        """It was made."""
        if len(self._files) >= _MOST_GROWING:
            self._files.pop(next(iter(self._files)))
        self._files[key] = _Growing(path, pid)

    def has(self, key: bytes) -> bool:
        """Whether it was made and is not closed yet."""
        return key in self._files

    def end(self, key: bytes) -> bytes:
        """It was closed, or is gone. The path it was made at; empty if that is not known."""
        file = self._files.pop(key, None)
        return file.path if file else b""

    def renamed(self, key: bytes, path: bytes) -> None:
        """It has another name."""
        if key in self._files:
            self._files[key].path = path

    def folder_renamed(self, old: bytes, new: bytes) -> None:
        """All below a directory have other paths."""
        for file in self._files.values():
            if file.path.startswith(old + b"/"):
                file.path = new + file.path[len(old) :]

    def forget(self, root: Root) -> None:
        """A medium is not watched any more."""
        self._files = {key: file for key, file in self._files.items() if not root.covers(file.path)}

    def look(self, now_ms: int) -> Iterator[Fact]:
        """Grown for each that grew since the last look."""
        for key, file in list(self._files.items()):
            now = lstat(file.path)
            if now is None or not stat.S_ISREG(now.st_mode):
                self.end(key)
            elif now.st_size != file.size:
                file.size = now.st_size
                yield Grown(at_ms=now_ms, pid=file.pid, key=key, path=path_text(file.path), size=now.st_size)


class Sweep:
    """One pass after the other over all protected trees: `some` takes the next few hundred steps.

    link(2) tells nothing to the directory of the file linked; so a hard link made elsewhere is noticed here, later. Also
    marks again what lost its mark.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._running: Iterator[tuple[bytes, Seen] | None] | None = None
        self._rest_until = self._inodes_until = 0.0
        self._inodes: dict[tuple[int, int], bytes] = {}

    def some(self, now_ms: int) -> Iterator[Fact]:
        """Attributes for each file that turns out to have several names."""
        if self._inodes and time.monotonic() >= self._inodes_until:
            self._inodes = {}
        if self._running is None:
            self._running = self._pass()
        for _ in range(_SWEEP):
            try:
                step = next(self._running)
            except StopIteration:
                self._running = None
                return
            if step is not None:
                key, (raw, seen) = step
                yield _linked(key, raw, seen, now_ms)

    def other_name(self, path: bytes, key: bytes, now_ms: int, made: bool = False) -> Iterator[Fact]:
        """Attributes of the protected file that is the same as this one elsewhere, which somebody holds open, or (`made`) has
        just linked onto a medium. Nothing if the pass found it already, or if it can't be found in a short time."""
        seen, began = lstat(path), time.monotonic()
        if seen is None or seen.st_nlink < 2 or not stat.S_ISREG(seen.st_mode):
            return
        if not made and self._marks.root_of(path) is not None:
            return
        found = self._inodes.get((seen.st_dev, seen.st_ino), b"") if began < self._inodes_until else b""
        if not found and began >= self._rest_until:
            self._inodes = {}
            for root in [root for root in self._marks.roots.values() if not root.medium]:
                found = found or _by_inode(root.path, seen, began + _FIND_S, self._inodes)
            now = time.monotonic()
            self._rest_until = now + _REST * (now - began)
            self._inodes_until = now + _INODES_S
        if found and key_of(found) == key and self._marks.mark_link(key, found, seen):
            yield _linked(key, found, seen, now_ms)

    def _pass(self) -> Iterator[tuple[bytes, Seen] | None]:
        """A step a directory and a file."""
        for root in [root for root in self._marks.roots.values() if not root.medium]:
            try:
                for files in self._marks.visit(root, root.path, again=True):
                    yield None
                    for path, seen in files:
                        linked = seen.st_nlink > 1 and (key := key_of(path)) and self._marks.mark_link(key, path, seen)
                        yield (key, (path, seen)) if linked else None
            except OSError:
                continue  # the root is gone; the daemon waits for it


def links(marks: Marks, now_ms: int) -> Iterator[Fact]:
    """Attributes for each file with several names that a search has found; at most `_LINKS` of them in one call."""
    told, marks.fresh_links = marks.fresh_links[:_LINKS], marks.fresh_links[_LINKS:]
    for key, (raw, seen) in told:
        yield _linked(key, raw, seen, now_ms)


def found(files: Iterable[Seen], now_ms: int, pid: int, since_ms: int, told: set[bytes]) -> Iterator[Fact]:
    """Found for each regular file changed at or after `since_ms` whose key was not `told` by the kernel."""
    for raw, seen in files:
        changed_ms = int(max(seen.st_mtime, seen.st_ctime) * 1000)
        if not stat.S_ISREG(seen.st_mode) or changed_ms < since_ms:
            continue
        key, modified_ms = key_of(raw), int(seen.st_mtime * 1000)
        if key and key not in told:
            yield Found(at_ms=now_ms, pid=pid, key=key, path=path_text(raw), size=seen.st_size, modified_ms=modified_ms)


def lstat(raw: bytes) -> os.stat_result | None:
    """The status of a file, None if it is gone or its path is not known."""
    try:
        return os.lstat(raw) if raw.startswith(b"/") else None
    except OSError:
        return None


def _by_inode(top: bytes, wanted: os.stat_result, deadline: float, inodes: dict[tuple[int, int], bytes]) -> bytes:
    """Where below a directory of the same file system a file lies, by its number; empty if that is not found. Others on the way
    are noted in `inodes`, as long as there is room."""
    there = lstat(top)
    pending = [top] if there is not None and there.st_dev == wanted.st_dev else []
    here = b""
    while pending and not (here and len(inodes) >= _INODES) and time.monotonic() < deadline:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif len(inodes) < _INODES:
                        inodes[wanted.st_dev, entry.inode()] = entry.path
                    if entry.inode() == wanted.st_ino:
                        here = entry.path
        except OSError:
            continue  # it went away meanwhile
    return here


def _linked(key: bytes, raw: bytes, seen: os.stat_result, now_ms: int) -> Attributes:
    return Attributes(at_ms=now_ms, pid=0, key=key, path=path_text(raw), inode=seen.st_ino, links=seen.st_nlink)
