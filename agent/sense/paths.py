# ruff: noqa: PTH115
# (paths are raw bytes here, and pathlib knows only text)
"""From file handles to paths: where a directory or file is now, by way of a watched root on its file system.

Owns: what was resolved before, and what to say where the kernel says nothing: of a medium that was unmounted meanwhile the
path last known, of a path longer than PATH_MAX the deepest part known, then "…". A protected directory that was renamed is
told by its configured path, for the core decides by path what is protected. Must not know events, or what is marked how.

Nothing stays open: a root is opened for some 20 us, or it could not be unmounted.
"""

import errno
import os
import re

from agent.contract.event import path_text
from agent.sense import kernel
from agent.sense.marks import Marks, Root

_CACHED = 4096
_FORMER = 8192
_STEPS_UP = 2000
_BEYOND = "/…".encode()
_INSIDE = re.compile(rb"/proc/\d+/root(/.*)", re.DOTALL)
"""The way into another mount namespace; the kernel tells paths there without it"""
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Paths:
    """`unresolved` counts the handles of which no path could be had, then or ever.

    `displaced`: some path told lately does not lead to its file, as a protected directory was renamed.
    """

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._dirs: dict[bytes, tuple[bytes, str]] = {}
        self._former: dict[bytes, tuple[bytes, str]] = {}
        self.unresolved = 0
        self.displaced = False

    def of(self, handle: bytes) -> tuple[bytes, str]:
        """The path of a directory, raw and as text; remembered."""
        known = self._dirs.get(handle)
        if known is None:
            known = self.resolve(handle)
            if not known[0]:
                return self._last_known(handle)
            if len(self._dirs) >= _CACHED:
                for old in list(self._dirs)[: _CACHED // 4]:
                    del self._dirs[old]
            self._dirs[handle] = known
        return known

    def join(self, folder: bytes, name: bytes) -> tuple[bytes, str]:
        """The path of `name` in a directory; of the directory itself if the name is "." or empty."""
        if not folder:
            return b"", ""
        raw, text = self.of(folder)
        if name == b"." or not name:
            return raw, text
        return (raw + b"/" + name, f"{text}/{path_text(name)}") if raw else (name, path_text(name))

    def resolve(self, handle: bytes) -> tuple[bytes, str]:
        """The path of a handle now, by the configured path of its root; empty when it is gone (ESTALE is normal)."""
        kept = self._marks.kept.get(handle)
        if kept is not None:
            return kept, path_text(kept)
        looked = self.look(handle)
        if looked is None or not looked[0]:
            self.unresolved += 1
            return b"", ""
        raw = self.as_configured(looked[0], handle[:8])
        return raw, path_text(raw)

    def look(self, handle: bytes) -> tuple[bytes, os.stat_result] | None:
        """Where a handle's file really is, and its status, though no path leads to it (then the path is empty); None: gone."""
        seen: os.stat_result | None = None
        for root in self._marks.roots.values():
            if root.fsid != handle[:8] or (mount := _mount_of(root)) < 0:
                continue
            try:
                fd = kernel.open_by_handle_at(mount, handle[8:])
            except OSError:
                continue
            finally:
                os.close(mount)
            try:
                seen = os.fstat(fd)
                raw = _path_of(fd, root)
            finally:
                os.close(fd)
            if raw:
                return raw, seen
        return (b"", seen) if seen else self._elsewhere(handle)

    def _elsewhere(self, handle: bytes) -> tuple[bytes, os.stat_result] | None:
        """The same on a file system that no root lies on."""
        for subvolume in self._marks.tops.get(handle[:8], ()):
            looked = self._look_at(_mount_at(subvolume, kernel.fsid(subvolume)), handle)
            if looked is not None and _is_at(*looked):
                return looked
        path = self._marks.systems.get(handle[:8])
        return self._look_at(_mount_at(path, handle[:8]), handle) if path is not None else None

    @staticmethod
    def _look_at(mount: int, handle: bytes) -> tuple[bytes, os.stat_result] | None:
        if mount < 0:
            return None
        try:
            fd = kernel.open_by_handle_at(mount, handle[8:])
        except OSError:
            return None
        finally:
            os.close(mount)
        try:
            seen = os.fstat(fd)
            return _told_path(fd), seen
        finally:
            os.close(fd)

    def where(self, root: Root) -> bytes:
        """Where a protected root's own directory is now; empty if that can't be known."""
        looked = None if root.opaque else self.look(root.handle)
        return looked[0] if looked else b""

    def as_configured(self, raw: bytes, system: bytes) -> bytes:
        """The path with a renamed root's configured path in place of its present one, on the file system with this id."""
        if self._marks.root_of(raw) is not None:
            return raw
        for root in (*self._marks.roots.values(), *self._marks.replaced.values()):
            if root.medium or root.fsid != system:
                continue
            now = self.where(root)
            if now and (raw == now or raw.startswith(now.rstrip(b"/") + b"/")):
                self.displaced = True
                return root.path + raw[len(now) :]
        return raw

    def forget(self) -> None:
        """A directory has another path now: the known ones are asked for again, and used only if there is no answer."""
        self._former = dict([*self._former.items(), *self._dirs.items()][-_FORMER:])
        self._dirs.clear()
        self.displaced = False

    def drop(self, root: Root) -> None:
        """A root is not watched any more."""
        self.forget()
        self._former = {handle: known for handle, known in self._former.items() if not root.covers(known[0])}

    def _last_known(self, handle: bytes) -> tuple[bytes, str]:
        for root in self._marks.roots.values():
            if root.handle == handle:
                return root.path, path_text(root.path)
        return self._former.get(handle, (b"", ""))


def _is_at(path: bytes, seen: os.stat_result) -> bool:
    """Whether a path leads to a file: of what lies in another subvolume than the one that was asked, it does not."""
    try:
        there = os.lstat(path)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (seen.st_dev, seen.st_ino)


def _mount_of(root: Root) -> int:
    return _mount_at(root.path, root.fsid)


def _mount_at(path: bytes, system: bytes) -> int:
    """A descriptor on the file system `system`, by `path` or, where that is gone, by what is above it; -1: not mounted."""
    while True:
        try:
            fd = os.open(path or b"/", _FOLDER & ~os.O_PATH)
        except OSError:
            fd = -1
        if fd >= 0:
            if kernel.fsid(fd) == system:  # else unmounted since: a handle means another file there
                return fd
            os.close(fd)
        if not path or path == b"/":
            return -1
        path = path.rpartition(b"/")[0]


def _told_path(fd: int) -> bytes:
    """The path of an open file, empty if it has none, or too long a one."""
    try:
        raw = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError:
        return b""
    return raw if raw.startswith(b"/") and not raw.endswith(b" (deleted)") else b""


def _path_of(fd: int, root: Root) -> bytes:
    try:
        raw = os.readlink(b"/proc/self/fd/%d" % fd)
    except OSError as error:
        return _deepest(fd, root) if error.errno == errno.ENAMETOOLONG else b""
    if not raw.startswith(b"/") or raw.endswith(b" (deleted)"):
        return b""
    inside = _INSIDE.match(root.path)
    if inside is not None and (raw + b"/").startswith(inside[1].rstrip(b"/") + b"/"):
        return root.path.rstrip(b"/") + raw[len(inside[1].rstrip(b"/")) :]
    return raw


def _deepest(fd: int, root: Root) -> bytes:
    """Of a path that is too long to tell: the part that can be told, and "…" for the directories left out."""
    here = -1
    try:
        for _ in range(_STEPS_UP):
            above = os.open(b"..", _FOLDER, dir_fd=fd if here < 0 else here)
            if here >= 0:
                os.close(here)
            here = above
            try:
                return os.readlink(b"/proc/self/fd/%d" % here) + _BEYOND
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    break
    except OSError:
        return root.path + _BEYOND  # not a directory, or removed
    finally:
        if here >= 0:
            os.close(here)
    return root.path + _BEYOND
