"""What is left without privilege: inotify, by way of watchdog.

Owns: the same watches as `fanotify.py` (protected trees, trees of media), told as the same facts, with less. inotify never
names a process, so every fact has pid 0; it sees no file that this user may not list, no raw device, nothing that happens
before a new folder is watched, and it takes one kernel watch a folder. `coverage()` says all of it plainly.

A process is named only if psutil finds, while the file is still open, exactly one that holds it: a program that is over
by then, or one of another user, stays unknown.
"""

import contextlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from watchdog.events import (
    DirMovedEvent,
    FileClosedEvent,
    FileClosedNoWriteEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileOpenedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from agent.contract.event import path_text
from agent.core.facts import Closed, Coverage, Created, Deleted, Fact, FileFact, Grown, Lost, Moved, Opened
from agent.sense import SensorError

_TOLD = [
    FileOpenedEvent,
    FileClosedEvent,
    FileClosedNoWriteEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    DirMovedEvent,
]
_QUEUE = 100_000
BLIND = [
    *("process", "login_user", "raw_devices", "other_namespaces", "unreadable_folders", "fresh_hard_links"),
    *("network_ways", "phones", "staging_elsewhere"),
]


class Fallback(FileSystemEventHandler):
    """A Sensor. watchdog's own thread fills a bounded queue; `drain` empties it and looks each file up."""

    def __init__(self, now_ms: int) -> None:
        self.want_sizes = True
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._queue: deque[FileSystemEvent] = deque()
        self._lost, self._lost_since = 0, now_ms
        self._trees: dict[str, object] = {}
        self._which: dict[str, tuple[int, int]] = {}
        self._media: set[str] = set()
        self._failed: dict[str, str] = {}
        self.behind = False
        self._writing: dict[str, bytes] = {}
        self._wrote: dict[bytes, int] = {}
        self._observer = InotifyObserver()
        self._observer.start()

    def fileno(self) -> int:
        """An eventfd that watchdog's thread rings."""
        return self._wake

    def watch_tree(self, path: str) -> None:
        """Watch a protected directory with all below it. Raises SensorError."""
        try:
            found = Path(path).stat()
        except OSError as error:
            self.unwatch(path)
            raise SensorError(f"{path}: {error.strerror}; it will be watched as soon as it is there") from None
        if path in self._trees:
            if self._which[path] == (found.st_dev, found.st_ino):
                return
            self.unwatch(path)  # removed and made anew: inotify still watches the old one
        self._which[path] = found.st_dev, found.st_ino
        try:
            self._trees[path] = self._observer.schedule(self, path, recursive=True, event_filter=_TOLD)
        except OSError as error:
            hint = "raise fs.inotify.max_user_watches" if error.errno == 28 else "check that it is there and readable"
            self._failed[path] = error.strerror or str(error)
            raise SensorError(f"{path}: can't be watched ({error.strerror}); {hint}") from None
        self._failed.pop(path, None)

    def watch_medium(self, mount: str, alone: bool, reads: bool = False) -> None:
        """Watch a medium's tree. Raises SensorError. To inotify `alone` makes no difference, and it names no readers."""
        self.watch_tree(mount)
        self._media.add(mount)

    def unwatch(self, mount: str) -> None:
        """Stop watching a medium."""
        watch = self._trees.pop(mount, None)
        self._media.discard(mount)
        if watch is not None:
            self._observer.unschedule(watch)  # type: ignore[arg-type]

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog's thread: keep the event, ring the bell. What does not fit is counted."""
        if len(self._queue) >= _QUEUE:
            self._lost += 1
            return
        self._queue.append(event)
        os.eventfd_write(self._wake, 1)

    def drain(self, now_ms: int, on_pid: Callable[[int], None]) -> Iterator[Fact]:
        """Facts for what is queued. `on_pid` is called with a pid before the first fact that names it."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        batch = [self._queue.popleft() for _ in range(len(self._queue))]
        opened = {os.fsdecode(event.src_path) for event in batch if isinstance(event, FileOpenedEvent | FileCreatedEvent)}
        holders = _who_holds(opened) if opened else {}
        for event in batch:
            fact = self._fact(event, now_ms)
            if isinstance(fact, FileFact):
                fact.pid = holders.get(os.fsdecode(event.src_path), self._wrote.get(fact.key, 0))
                if fact.pid:
                    on_pid(fact.pid)
                    self._wrote[fact.key] = fact.pid
            if isinstance(fact, Closed | Deleted):
                self._wrote.pop(fact.key, None)
            if fact is not None:
                yield fact
        if len(self._wrote) > _QUEUE:
            self._wrote.clear()
        if self._lost:
            lost, self._lost = self._lost, 0
            yield Lost(at_ms=now_ms, reason="inotify_overflow", since_ms=self._lost_since, until_ms=now_ms, count=lost)
        self._lost_since = now_ms

    def grown(self, now_ms: int) -> Iterator[Fact]:
        """How large the files are that are being written to media."""
        for path, key in list(self._writing.items()):
            looked = _look(path)
            if looked is None:
                self._writing.pop(path, None)
            else:
                yield Grown(at_ms=now_ms, pid=0, key=key, path=path_text(os.fsencode(path)), size=looked[1])

    def sweep(self, now_ms: int) -> Iterator[Fact]:
        """Nothing: inotify follows names, so a hard link made elsewhere stays unseen (`fresh_hard_links`)."""
        yield from ()

    def coverage(self, now_ms: int) -> Coverage:
        """Always incomplete, and says so."""
        why = "fanotify needs root (CAP_SYS_ADMIN); inotify names no process and no login user"
        if self._failed:
            why += "; not watched: " + ", ".join(sorted(self._failed))
        return Coverage(at_ms=now_ms, sensor="inotify", ok=False, sees=["file_names"], blind=[*BLIND], why=why)

    def close(self) -> None:
        """Stop watchdog's thread and give back its watches."""
        if self._wake >= 0:
            self._observer.stop()
            self._observer.join()
            os.close(self._wake)
            self._wake = -1

    def _fact(self, event: FileSystemEvent, now_ms: int) -> Fact | None:
        raw = os.fsencode(event.src_path)
        path, name = path_text(raw), os.fsdecode(raw)
        if isinstance(event, DirMovedEvent):
            new = path_text(os.fsencode(event.dest_path))
            return Moved(at_ms=now_ms, pid=0, key=_key(new) or raw, path=new, old_path=path, is_dir=True)
        if event.is_directory or isinstance(event, FileClosedNoWriteEvent):
            return None
        if isinstance(event, FileMovedEvent):
            new_name = os.fsdecode(os.fsencode(event.dest_path))
            looked = _look(new_name)
            self._writing.pop(name, None)
            return Moved(
                at_ms=now_ms,
                pid=0,
                key=looked[0] if looked else raw,
                path=path_text(os.fsencode(event.dest_path)) if new_name else "",
                old_path=path,
                size=looked[1] if looked else None,
            )
        looked = _look(name)
        key, size, inode = looked if looked else (self._writing.get(name, raw), None, None)
        kinds: dict[type[FileSystemEvent], type[FileFact]] = {FileCreatedEvent: Created, FileDeletedEvent: Deleted}
        if isinstance(event, FileCreatedEvent) and any(name.startswith(mount + "/") for mount in self._media):
            self._writing[name] = key
        if isinstance(event, FileOpenedEvent):
            return Opened(at_ms=now_ms, pid=0, key=key, path=path, size=size, inode=inode)
        if isinstance(event, FileClosedEvent):
            self._writing.pop(name, None)
            return Closed(at_ms=now_ms, pid=0, key=key, path=path, size=size)
        kind = kinds.get(type(event))
        return kind(at_ms=now_ms, pid=0, key=key, path=path) if kind else None


def _who_holds(paths: set[str]) -> dict[str, int]:
    """The one process that holds each file open now, among those we may look at; absent if none or several do."""
    found: dict[str, int] = {}
    several = set()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            for held in {file.path for file in process.open_files()} & paths:
                several.add(held) if held in found else None
                found[held] = process.pid
    return {path: pid for path, pid in found.items() if path not in several}


def _look(path: str) -> tuple[bytes, int, int] | None:
    """(key, size, inode) of a file by name, None if it is gone. Opens nothing, so tells nothing to itself."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return struct.pack("=QQ", found.st_dev, found.st_ino), found.st_size, found.st_ino


def _key(path: str) -> bytes:
    looked = _look(path)
    return looked[0] if looked else b""
