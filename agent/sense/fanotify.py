# ruff: noqa: PTH115
# (paths are raw bytes here, and pathlib knows only text)
"""Which files are opened, written, renamed and removed, in protected directories and on media: fanotify(7).

Owns: two notification groups and what is read from them (where their marks lie is in `marks.py`, the way from a handle to a
path in `paths.py`). Protected trees carry a mark on every directory (work elsewhere costs nothing) and on single files that
are reached from elsewhere too: hard links, moved-out files. A medium with a file system of its own carries one mark on that
file system; a plain folder, marks on its directories; a file system that refuses handles (exfat, FUSE, a btrfs subvolume)
is read through the second, descriptor group, which tells finished writes only. Facts for unprotected and protected paths
look the same: what a path means is the core's to know. Must not know: processes (it names pids, and `on_pid` lets the
daemon look while they live), policy.

No descriptor stays open on a medium, so that it can be unmounted at any time. New directories are marked, then searched:
what is in them by then is told as Found, with the pid of whoever made the directory as a hint.
Paths given are as the os module has them, paths inside raw bytes; facts carry `path_text`.
"""

import os
import select
import time
from collections.abc import Callable, Iterable, Iterator

from agent.contract.event import path_bytes, path_text
from agent.core.facts import Attributes, Closed, Coverage, Created, Deleted, Fact, Lost, MediumRead, Moved, Opened, OpenFile
from agent.sense import SensorError, kernel
from agent.sense.fanotify_events import FIRST as _FIRST
from agent.sense.fanotify_events import FIXED, Names, claimed, heads, names
from agent.sense.looking import Growing, Sweep, found, links, lstat
from agent.sense.marks import Marks, Seen, key_of, real
from agent.sense.paths import Paths

_CACHED = 4096
_WRITERS = 1024
_MISSED = 256
_TOO_LONG = 4096  # PATH_MAX
_NAMELESS = 256
_SAY_MOVED_MS = 5_000  # longer than a tick of the daemon, which asks for `coverage`
_READ_BYTES = 1 << 18
_MOST_FINISHED = 2_048
_READS = 16  # buffers in one drain, and
_ENOUGH_S = 0.3  # how long it goes on at most, so that a storm can't keep the daemon from its other sensors

OnPid = Callable[[int], None]
_Folder = tuple[bytes, str, bool]
_OPEN, _CREATE, _CLOSE_WRITE = kernel.FAN_OPEN, kernel.FAN_CREATE, kernel.FAN_CLOSE_WRITE
_SELF = kernel.FAN_MOVE_SELF | kernel.FAN_DELETE_SELF
_STORMS = _OPEN | _CREATE | _CLOSE_WRITE
_DFID_NAME, _FID = kernel.FAN_EVENT_INFO_TYPE_DFID_NAME, kernel.FAN_EVENT_INFO_TYPE_FID


class Fanotify:
    """A Sensor. `want_sizes`: of what a program opens after it wrote to a medium, look up size and inode. `ignore`: pids whose
    events are nobody's business. `behind`: the last `drain` left something in the kernel's queue."""

    def __init__(self) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK
        flags |= kernel.FAN_UNLIMITED_QUEUE | kernel.FAN_UNLIMITED_MARKS
        try:
            self._group = kernel.fanotify_init(flags | kernel.FAN_REPORT_DFID_NAME_TARGET)
        except OSError as error:
            raise SensorError(f"fanotify: {error.strerror}; it needs CAP_SYS_ADMIN (root) and Linux 5.17 or later") from None
        self._plain = kernel.fanotify_init(flags)
        self._poll = select.epoll()
        self._poll.register(self._group, select.EPOLLIN)
        self._poll.register(self._plain, select.EPOLLIN)
        self.want_sizes = self.behind = False
        self.ignore = {os.getpid()}
        self._marks = Marks(self._group, self._plain, lambda: kernel.fanotify_init(flags | kernel.FAN_REPORT_DFID_NAME_TARGET))
        self._apart: list[int] = []
        self._paths = Paths(self._marks)
        self._folders: dict[bytes, _Folder] = {}
        self._writers: dict[int, None] = {}
        self._growing = Growing()
        self._sweep = Sweep(self._marks)
        self._drained_ms = 0
        self._inside: list[tuple[int, list[Seen]]] = []
        self._told: set[bytes] = set()
        self._missed: set[bytes] = set()
        self._nameless: dict[bytes, bool] = {}
        self._moved: dict[bytes, int] = {}

    def watch_tree(self, path: str) -> None:
        """Watch a protected directory with all below it, on its own file system. Raises SensorError if it can't be."""
        if self._marks.add_tree(path):
            self._folders.clear()
            self._listen_apart()

    def watch_medium(self, mount: str, alone: bool, reads: bool = False) -> None:
        """Watch what is written below `mount`, and (`reads`) opened there. `alone`: its file system is the medium's own.
        Raises SensorError."""
        if self._marks.add_medium(mount, alone, reads):
            self._folders.clear()
            self._listen_apart()

    def unwatch(self, mount: str) -> None:
        """Forget a medium or a tree; its marks go too, unless the kernel took them at unmount."""
        root = self._marks.remove(real(os.fsencode(mount)))
        if root is not None:
            self._paths.drop(root)
            self._folders.clear()
            self._growing.forget(root)

    def follow(self, path: str) -> bool:
        """Watch one file under any name, wherever it goes on its file system; False if that can't be."""
        return self._marks.mark_file(os.fsencode(path))

    @property
    def marks(self) -> Marks:
        """Where the marks lie, for `arming.py`."""
        return self._marks

    @property
    def paths(self) -> Paths:
        """The way from a handle to a path, for `arming.py`."""
        return self._paths

    def follow_staged(self, key: bytes, path: str, now_ms: int) -> Iterator[Fact]:
        """Watch a copy of protected content, the file `key`, last known at `path`: Moved if it lies elsewhere by now, Deleted
        if it is gone (another file may have its path) or can't be watched."""
        raw = path_bytes(path)
        if key_of(raw) != key:
            looked = self._paths.look(key)
            raw = looked[0] if looked is not None and looked[1].st_nlink else b""
            if raw:
                yield Moved(at_ms=now_ms, pid=0, key=key, path=path_text(raw), old_path="")
        if not raw or not self._marks.mark_staged(raw):
            yield Deleted(at_ms=now_ms, pid=0, key=key, path="")
        self._listen_apart()

    # -- the sensor ---------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """An epoll descriptor over both groups."""
        return self._poll.fileno() if not self._poll.closed else -1

    def drain(self, now_ms: int, on_pid: OnPid | None = None) -> Iterator[Fact]:
        """What happened since the last call.

        `on_pid` is called for each pid of a buffer before any path in it is resolved, so that short-lived programs are looked
        at while they are there; for every buffer anew, so remember whom you have looked at.
        """
        yield from links(self._marks, now_ms)
        self.behind = True
        finished = self._read_finished(now_ms, on_pid)  # before the others are read: what was read for them is told by then
        enough = time.monotonic() + _ENOUGH_S
        for _ in range(_READS):
            if time.monotonic() >= enough:
                break
            try:
                buffer = os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                self.behind = False
                break
            yield from self._read_apart(now_ms, on_pid)  # what was read there, before what was written meanwhile
            yield from self._facts(buffer, now_ms, on_pid)
        yield from self._read_apart(now_ms, on_pid)
        yield from finished
        if len(finished) >= _MOST_FINISHED:
            self.behind = True
        if not self.behind:
            self._drained_ms = now_ms
        inside, self._inside = self._inside, []
        for pid, seen in inside:  # last, for what is in the queue by now is older than our look
            yield from found(seen, now_ms, pid, 0, self._told)
        self._told.clear()

    def _read_finished(self, now_ms: int, on_pid: OnPid | None) -> list[Fact]:
        """What the descriptor group has to tell."""
        told: list[Fact] = []
        while len(told) < _MOST_FINISHED:
            try:
                buffer = os.read(self._plain, 4096)
            except BlockingIOError:
                break
            except OSError:
                continue  # the file could not be opened for us (a FUSE server is gone); the event is spent
            told += self._finished(buffer, now_ms, on_pid)
        return told

    def _read_apart(self, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        """What groups of single file systems have to tell."""
        for group in self._apart:
            try:
                buffer = os.read(group, _READ_BYTES)
            except BlockingIOError:
                continue
            yield from self._facts(claimed(buffer, self._marks.apart[group]), now_ms, on_pid)

    def _listen_apart(self) -> None:
        for group in self._marks.apart:
            if group not in self._apart:
                self._apart.append(group)
                self._poll.register(group, select.EPOLLIN)

    def grown(self, now_ms: int) -> Iterator[Fact]:
        """How large the files are that were made on a medium and are not closed yet; only those that grew."""
        return self._growing.look(now_ms)

    def sweep(self, now_ms: int) -> Iterator[Fact]:
        """A few hundred files of the protected trees, each call the next ones: those reached by more than one name."""
        yield from links(self._marks, now_ms)
        yield from self._sweep.some(now_ms)

    def other_names(self, files: Iterable[OpenFile], now_ms: int) -> Iterator[Fact]:
        """Attributes of each protected file that one of these, which somebody holds open elsewhere, is another name of."""
        for file in files:
            yield from self._sweep.other_name(path_bytes(file.path), file.key, now_ms)

    def rescan(self, mount: str, now_ms: int, since_ms: int = 0) -> Iterator[Fact]:
        """Found for each file below `mount` changed (ctime or mtime) at or after `since_ms`."""
        root = self._marks.roots.get(real(os.fsencode(mount)))
        if root is None:
            return
        seen: list[Seen] = []
        try:
            self._marks.search(root, root.path, seen)
        except OSError:
            self._marks.cut.add(root.path)
        yield from found(seen, now_ms, 0, since_ms, self._told)

    def coverage(self, now_ms: int) -> Coverage:
        """Which roots are seen fully, which in part."""
        blind: list[str] = []
        why: list[str] = []
        trees = [root for root in self._marks.roots.values() if not root.medium]
        if trees:
            blind.append("fresh_hard_links")
        for root in self._marks.roots.values():
            if root.way == "descriptors":
                blind += ["medium_new_files", "medium_renames", "medium_deletes"]
                why.append(f"{path_text(root.path)} tells finished writes only (its file system has no file handles)")
        if any(root.way == "directories" and root.medium for root in self._marks.roots.values()):
            blind.append("first_files_of_new_directories")
        for path in sorted(self._marks.cut):
            blind.append("search_cut_short")
            why.append(f"{path_text(path)} could not be searched to its end")
        for root in trees:
            now = self._paths.where(root)
            name = path_text(root.path)
            if now and now != root.path:
                blind.append("protected_moved")
                why.append(f"{name} was renamed to {path_text(now)}; what is done in it is told as if it were in its place")
            elif abs(now_ms - self._moved.get(root.path, -_SAY_MOVED_MS)) < _SAY_MOVED_MS:
                blind.append("protected_moved")
                why.append(f"{name} was renamed or removed a moment ago")
        ok = not why
        counts = f"{self._marks.count} marks on {len(self._marks.roots)} directories and media"
        if self._paths.unresolved:
            why.append(f"{self._paths.unresolved} times a file was gone before its path was known")
        return Coverage(
            at_ms=now_ms,
            sensor="fanotify",
            ok=ok,
            sees=["protected_files", "media_files"],
            blind=list(dict.fromkeys(blind)),
            why="; ".join([counts, *why]),
        )

    def close(self) -> None:
        """Closing a group drops its marks and what is unread."""
        if self._group >= 0:
            self._poll.close()
            for group in (self._group, self._plain, *self._apart):
                os.close(group)
            self._group = self._plain = -1

    # -- from records to facts ----------------------------------------------------------------------------------------

    def _facts(self, buffer: bytes, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        """Facts of one buffer. What comes in storms, a file in a marked directory, is told here; the rest by `_happened`."""
        records = heads(buffer)
        ignore = self.ignore
        if on_pid is not None:
            for pid in {head[2] for head in records} - ignore:
                on_pid(pid)
        folders, told, growing, writers, paths = self._folders, self._told, self._growing, self._writers, self._paths
        for mask, _, pid, start, end in records:
            if pid in ignore:
                continue
            if mask & ~_STORMS or start + 16 > end:
                yield from self._rarely(mask, pid, names(buffer, start, end), now_ms)
                continue
            kind, length, handle_bytes = _FIRST(buffer, start)
            opaque, second = start + FIXED + handle_bytes, start + length
            if kind != _DFID_NAME or opaque >= second or second + 16 > end or buffer[second] != _FID:
                yield from self._happened(mask, pid, names(buffer, start, end), now_ms)
                continue
            handle = buffer[start + 4 : opaque]
            folder = folders.get(handle) or self._folder(handle)
            name = buffer[opaque : buffer.find(0, opaque, second)]
            raw = folder[0] + name
            path = folder[1] + (str(name, "ascii") if name.isascii() and b"\\" not in name else path_text(name))
            key = buffer[second + 4 : second + FIXED + _FIRST(buffer, second)[2]]
            if mask == _OPEN:
                if folder[2]:
                    if not growing.has(key):  # by who made it a moment ago
                        yield MediumRead(at_ms=now_ms, pid=pid, key=key, path=path)
                elif (pid in writers or paths.displaced) and (seen := lstat(raw) or self._by_handle(key)[1]):
                    yield Opened(at_ms=now_ms, pid=pid, key=key, path=path, size=seen.st_size, inode=seen.st_ino)
                else:
                    yield Opened(at_ms=now_ms, pid=pid, key=key, path=path)
            elif folder[2]:
                told.add(key)
                if self.want_sizes and pid not in writers:
                    self._writes(pid)
                if not mask & _CLOSE_WRITE:
                    yield from self._created(pid, key, raw, path, now_ms)
                    continue
                at, made = growing.end(key), mask & _CREATE != 0
                if seen := lstat(raw):
                    yield Closed(at_ms=now_ms, pid=pid, key=key, path=path, size=seen.st_size, made=made)
                    continue
                if made:
                    yield Created(at_ms=now_ms, pid=pid, key=key, path=path)
                yield self._closed(pid, key, raw, path, at, now_ms)
            else:
                yield from self._happened(mask, pid, Names(key, handle, name), now_ms)

    def _created(self, pid: int, key: bytes, raw: bytes, path: str, now_ms: int) -> Iterator[Fact]:
        """A file was made on a medium; if it was finished before it had this name (linkat(2)), its end is told too."""
        closed = self._nameless.pop(key, None)
        if closed:
            return  # told, size and all, when it was closed
        seen = lstat(raw) or self._by_handle(key)[1]
        if seen and seen.st_nlink > 1:  # linked here: the other name may be a protected one
            yield from self._sweep.other_name(raw, key, now_ms, made=True)
        size = seen.st_size if seen and seen.st_nlink > 1 else None
        yield Created(at_ms=now_ms, pid=pid, key=key, path=path, size=size)
        if seen and seen.st_size and (seen.st_nlink > 1 or closed is not None):
            yield Closed(at_ms=now_ms, pid=pid, key=key, path=path, size=seen.st_size)
        else:
            self._growing.begin(key, raw, pid)

    def _closed(self, pid: int, key: bytes, raw: bytes, path: str, made: bytes, now_ms: int) -> Closed:
        """A written file was closed that is not at its path: removed, moved along with its directory, or made without a name.

        `made` is where it was made, if that was told. A file made by O_TMPFILE is called "#INODE" until it gets its name.
        """
        now, seen = self._by_handle(key)
        if seen is None:
            return Closed(at_ms=now_ms, pid=pid, key=key, path=path)
        first = raw.rpartition(b"/")[2] == b"#%d" % seen.st_ino
        if first or not path.startswith("/"):
            named = next((each for each in (now, made) if _is_at(each, seen)), b"")
            path = path_text(named) if named else path
        if first and not made:  # how it gets its name is not told yet
            self._nameless = dict([*self._nameless.items(), (key, seen.st_nlink > 0)][-_NAMELESS:])
        size = seen.st_size if seen.st_nlink else None
        return Closed(at_ms=now_ms, pid=pid, key=key, path=path, size=size)

    def _by_handle(self, key: bytes) -> tuple[bytes, os.stat_result | None]:
        """Where a file is by its handle, and its status: the way that costs an open, for when the path leads nowhere."""
        return self._paths.look(key) or (b"", None)

    def _rarely(self, mask: int, pid: int, told: Names, now_ms: int) -> Iterator[Fact]:
        if mask & _SELF:
            handle = told.dir or told.target
            if handle in self._marks.replaced or any(root.handle == handle for root in self._marks.roots.values()):
                self._went_away(handle, now_ms)
            elif told.target and not mask & kernel.FAN_ONDIR:
                yield from self._staged_moved(mask, pid, told.target, now_ms)
            mask &= ~_SELF
            if not mask:
                return
        if mask & kernel.FAN_ONDIR:
            if mask & ~(kernel.FAN_OPEN | kernel.FAN_ONDIR | kernel.FAN_DELETE):
                yield from self._directory(mask, pid, told, now_ms)
        elif mask & kernel.FAN_Q_OVERFLOW:
            yield from self._overflowed(now_ms)
        elif mask & kernel.FAN_RENAME:
            yield from self._renamed(pid, told, now_ms)
        else:
            yield from self._happened(mask, pid, told, now_ms)

    def _went_away(self, handle: bytes, now_ms: int) -> None:
        """A protected directory itself was renamed or removed."""
        self._forget_paths()
        for root in self._marks.roots.values():
            if root.handle == handle:
                self._moved[root.path] = now_ms

    def _staged_moved(self, mask: int, pid: int, key: bytes, now_ms: int) -> Iterator[Fact]:
        """A file that is watched by itself was renamed, or is gone for good."""
        looked = self._paths.look(key)
        if looked is None or not looked[1].st_nlink:
            yield Deleted(at_ms=now_ms, pid=pid, key=key, path="")
        elif mask & kernel.FAN_MOVE_SELF and looked[0] and self._marks.root_of(looked[0]) is None:  # else its directory tells
            yield Moved(at_ms=now_ms, pid=pid, key=key, path=path_text(looked[0]), old_path="", size=looked[1].st_size)

    def _folder(self, handle: bytes) -> _Folder:
        """A directory by its handle: its path with "/" at the end, raw and as text, and whether it lies on a medium."""
        raw, text = self._paths.of(handle)
        if not raw:
            return b"", "", False
        if len(self._folders) >= _CACHED:
            for old in list(self._folders)[: _CACHED // 4]:
                del self._folders[old]
        known = self._folders[handle] = (raw + b"/", text + "/", self._marks.on_medium(raw))
        return known

    def _writes(self, pid: int) -> None:
        """A program writes to a medium: of what it opens from now on, the size is of interest."""
        if len(self._writers) >= _WRITERS:
            del self._writers[next(iter(self._writers))]
        self._writers[pid] = None

    def _happened(self, mask: int, pid: int, told: Names, now_ms: int) -> Iterator[Fact]:
        """Facts of one record about a file; the kernel merges kinds, so they are told in the order of a file's life."""
        if told.dir:
            folder = self._folders.get(told.dir) or self._folder(told.dir)
            raw, path, medium = folder[0] + told.name, folder[1] + path_text(told.name), folder[2]
        else:
            raw, path = self._paths.resolve(told.target)
            medium = self._marks.on_medium(raw)
        key = told.target or told.dir
        if mask == kernel.FAN_ATTRIB and not raw:
            return  # the last name of a file marked by itself is gone, which its directory told
        if medium and self.want_sizes and mask & ~_OPEN:
            self._writes(pid)
        seen = None
        if mask != _OPEN or pid in self._writers or self._paths.displaced:
            seen = lstat(raw) or (None if mask & kernel.FAN_DELETE else self._by_handle(key)[1])
        size, inode = (seen.st_size, seen.st_ino) if seen else (None, None)
        if mask & _CREATE:
            if medium:
                self._growing.begin(key, raw, pid)
            self._told.add(key)
            yield Created(at_ms=now_ms, pid=pid, key=key, path=path)
            if seen and seen.st_nlink > 1:
                self._marks.mark_link(key, raw, seen)
        if mask & _OPEN and not medium:
            yield Opened(at_ms=now_ms, pid=pid, key=key, path=path, size=size, inode=inode)
        elif mask & _OPEN and not mask & (_CREATE | _CLOSE_WRITE) and not self._growing.has(key):
            yield MediumRead(at_ms=now_ms, pid=pid, key=key, path=path)
        if mask & kernel.FAN_ATTRIB:
            count = seen.st_nlink if seen else None
            yield Attributes(at_ms=now_ms, pid=pid, key=key, path=path, inode=inode, links=count)
            if seen and seen.st_nlink > 1:
                self._marks.mark_link(key, raw, seen)
        if mask & _CLOSE_WRITE:
            self._growing.end(key)
            self._told.add(key)
            yield Closed(at_ms=now_ms, pid=pid, key=key, path=path, size=size)
        if mask & kernel.FAN_DELETE:
            self._growing.end(key)
            yield Deleted(at_ms=now_ms, pid=pid, key=key, path=path)

    def _renamed(self, pid: int, told: Names, now_ms: int) -> Iterator[Fact]:
        raw, path = self._paths.join(told.dir, told.name)
        _, old_path = self._paths.join(told.old_dir, told.old_name)
        if not told.dir:  # to where nothing is marked: follow the file itself
            raw, path = self._paths.resolve(told.target)
            if raw:
                self._marks.mark_file(raw)
        self._growing.renamed(told.target, raw)
        seen = lstat(raw) or self._by_handle(told.target)[1]
        size = seen.st_size if seen else None
        yield Moved(at_ms=now_ms, pid=pid, key=told.target, path=path, old_path=old_path, size=size)

    def _directory(self, mask: int, pid: int, told: Names, now_ms: int) -> Iterator[Fact]:
        """Something happened to a directory: a new one is marked and searched, a moved one makes known paths wrong."""
        if mask & kernel.FAN_RENAME:
            self._forget_paths()
            raw, path = self._paths.join(told.dir, told.name) if told.dir else self._paths.resolve(told.target)
            old_raw, old_path = self._paths.join(told.old_dir, told.old_name)
            self._marks.renamed(old_raw, raw)
            self._growing.folder_renamed(old_raw, raw)
            yield Moved(at_ms=now_ms, pid=pid, key=told.target, path=path, old_path=old_path, is_dir=True)
            came_in = bool(told.dir) and (not told.old_dir or told.target in self._missed)
        else:
            raw, path = self._paths.join(told.dir, told.name)
            came_in = bool(mask & kernel.FAN_CREATE)
        if mask & kernel.FAN_ATTRIB:
            seen = lstat(raw)
            yield Attributes(at_ms=now_ms, pid=pid, key=told.target or told.dir, path=path, inode=seen and seen.st_ino)
        root = self._marks.root_of(raw)
        if came_in and root and root.way == "directories":
            inside: list[Seen] = []
            try:
                self._marks.search(root, raw, inside)
            except OSError:  # it has another name by now, or is gone again
                there = self._by_handle(told.target)[0] or raw
                try:
                    self._marks.search(root, there, inside)
                except OSError:
                    if len(there) >= _TOO_LONG:
                        self._marks.cut.add(root.path)
                    self._missed = {*list(self._missed)[-_MISSED:], told.target}  # should it be renamed: then
                    return
            self._missed.discard(told.target)
            self._inside.append((pid, inside))

    def _finished(self, buffer: bytes, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        """The descriptor group: path and size by the open file, which is closed before anything else is done."""
        closed: list[Closed | MediumRead] = []
        for mask, fd, pid, _, _ in heads(buffer):
            if mask & kernel.FAN_Q_OVERFLOW:
                yield from self._overflowed(now_ms)
            if fd < 0:
                continue
            try:
                if pid not in self.ignore:
                    done = _finished_by(pid, fd, now_ms)
                    opened = not mask & _CLOSE_WRITE
                    closed.append(MediumRead(at_ms=now_ms, pid=pid, key=done.key, path=done.path) if opened else done)
            except OSError:
                self._paths.unresolved += 1
            finally:
                os.close(fd)
        if on_pid is not None:
            for pid in {fact.pid for fact in closed}:
                on_pid(pid)
        yield from closed

    def _overflowed(self, now_ms: int) -> Iterator[Fact]:
        since_ms = self._drained_ms or now_ms
        yield Lost(at_ms=now_ms, reason="fanotify_overflow", since_ms=since_ms, until_ms=now_ms)
        self._forget_paths()
        for root in list(self._marks.roots.values()):
            facts = self.rescan(os.fsdecode(root.path), now_ms, since_ms)
            if root.medium:
                yield from facts
            else:
                for _ in facts:  # only for the marks: directories may have been made that nobody told us of
                    continue

    # -- what is found by looking --------------------------------------------------------------------------------------

    def _forget_paths(self) -> None:
        self._paths.forget()
        self._folders.clear()


def _finished_by(pid: int, fd: int, now_ms: int) -> Closed:
    """What was closed, by a descriptor of it. Raises OSError."""
    link = b"/proc/self/fd/%d" % fd
    raw, size = os.readlink(link), os.fstat(fd).st_size
    return Closed(at_ms=now_ms, pid=pid, key=kernel.file_key(link, follow=True), path=path_text(raw), size=size)


def _is_at(path: bytes, seen: os.stat_result) -> bool:
    there = lstat(path)
    return there is not None and (there.st_dev, there.st_ino) == (seen.st_dev, seen.st_ino)
