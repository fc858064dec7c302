# ruff: noqa: PTH112, PTH116
# (paths are raw bytes here, and pathlib knows only text)
"""Where fanotify's marks lie: protected trees, media, single files; the search that marks each directory.

Owns: the list of watched roots, and which way each is watched: a mark on every directory ("directories"), one on a file
system of its own ("filesystem"), or one in the descriptor group where file handles are refused ("descriptors"). Must not
know what the events say; `fanotify.py` reads them and asks here whose root a path belongs to.

Directories are marked through an open descriptor, before they are listed, so that what is made in them meanwhile is either
told or found. Symbolic links are never followed, file systems mounted below never entered.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agent.contract.event import path_text
from agent.sense import SensorError, kernel

_DIRS = kernel.FAN_ONDIR | kernel.FAN_EVENT_ON_CHILD
_WRITES = kernel.FAN_CREATE | kernel.FAN_CLOSE_WRITE | kernel.FAN_DELETE | kernel.FAN_RENAME
_TREE = kernel.FAN_OPEN | kernel.FAN_ATTRIB | _WRITES | _DIRS
_SELF = kernel.FAN_MOVE_SELF | kernel.FAN_DELETE_SELF
_FOLDER = _WRITES | _DIRS
_FILESYSTEM = _WRITES | kernel.FAN_ONDIR
_FILE = kernel.FAN_OPEN | kernel.FAN_CLOSE_WRITE | kernel.FAN_ATTRIB
_STAGED = _FILE | _SELF
_SYSTEM = (b"/", b"/usr", b"/var", b"/etc", b"/home", b"/boot", b"/dev", b"/run")
_STRONG = b"/dev"  # a tmpfs or devtmpfs everywhere
_SEARCH_MAX = 200_000
_LINKS_MAX = 100_000
_FRESH_MAX = 20_000
_REPLACED_MAX = 64
_NAME_MAX = 255
_PATH_MAX = 4096

Seen = tuple[bytes, os.stat_result]
"""A file's path and its lstat"""


@dataclass
class Root:
    """A watched tree or medium. `way`: "directories", "filesystem", or "descriptors" (finished writes only).

    `opaque`: its handles can't be opened (overlay), so the path of each marked directory is kept. `handle` names its own
    directory, with fsid, wherever that is moved.
    """

    path: bytes
    dev: int
    ino: int
    fsid: bytes
    medium: bool
    way: str = "directories"
    opaque: bool = False
    handle: bytes = b""
    reads: bool = False
    """Of a medium: what is opened there is told, too"""

    def mask(self, folder: bytes) -> int:
        """What is asked of a directory: of a protected root also, whether it goes away itself."""
        if self.medium:
            return _FOLDER | kernel.FAN_OPEN if self.reads else _FOLDER
        return _TREE | _SELF if folder == self.path else _TREE

    def covers(self, path: bytes) -> bool:
        """Whether `path` is it or below it."""
        return path == self.path or path.startswith(self.path.rstrip(b"/") + b"/")


class Marks:
    """The marks of two groups: `group` tells handles and names, `plain` descriptors. `count` is of marks put and not taken.

    `kept`: fsid and handle of a directory → its path, where the kernel will not tell the path (`Root.opaque`), or of a medium.
    `replaced`: by handle, protected directories in whose place there is another one now; they are protected all the same.
    `fresh_links`: key and file of each protected file that a search found to have several names; whoever reads it empties it.
    `another` opens one more group, for a file system that may share none (`apart`).
    `systems`: by fsid, where other file systems are on which a handle may be asked for; marked or not is not known here.
    `tops`: the same of btrfs, by the fsid of the whole: where its subvolumes are, of which each has one of its own.
    `on_mark` is called with each directory and file of protected content that is marked (True: unmarked) by its path,
    `on_folder` with each directory of a plain folder that plays a medium.
    """

    def __init__(self, group: int, plain: int, another: Callable[[], int]) -> None:
        self._group, self._plain, self._another = group, plain, another
        self._apart: dict[int, int] = {}
        self._claims: dict[int, bytes] = {}
        self.roots: dict[bytes, Root] = {}
        self.replaced: dict[bytes, Root] = {}
        self.count = 0
        self.cut: set[bytes] = set()
        self.kept: dict[bytes, bytes] = {}
        self.fresh_links: list[tuple[bytes, Seen]] = []
        self.systems: dict[bytes, bytes] = {}
        self.tops: dict[bytes, list[bytes]] = {}
        self.on_mark: Callable[[bytes, bool], None] = lambda path, gone: None
        self.on_folder: Callable[[bytes, bool], None] = lambda path, gone: None
        self._linked: set[bytes] = set()

    def add_tree(self, path: str) -> bool:
        """Mark a protected directory and all below; False if it is already. Raises SensorError."""
        root = _root(os.fsencode(path), medium=False)
        known = self.roots.get(root.path)
        if known and (known.handle, known.medium) == (root.handle, False):
            return False
        try:
            self._keep_apart(root.dev, root.path)
            self.search(root, root.path)
        except OSError as error:
            raise SensorError(f"{path}: can't be watched ({error.strerror}); protect a directory on a local disk") from None
        if known and not known.medium:
            self.replaced[known.handle] = known
            if len(self.replaced) > _REPLACED_MAX:
                del self.replaced[next(iter(self.replaced))]
        self.replaced.pop(root.handle, None)
        self.roots[root.path] = root
        return True

    def add_medium(self, mount: str, alone: bool, reads: bool = False) -> bool:
        """Mark a medium: its file system if that is its own, else each directory; False if it is so already. SensorError."""
        root = _root(os.fsencode(mount), medium=True)
        root.reads = reads
        known = self.roots.get(root.path)
        if known and (known.dev, known.ino) == (root.dev, root.ino):
            return False
        self.remove(root.path)
        if alone and root.dev in self._taken():
            raise SensorError(f"{mount}: shares its file system with the system or a protected directory; watch it as a folder")
        try:
            if alone:
                self._mark_filesystem(root)
            else:
                self._keep_apart(root.dev, root.path)
                self.search(root, root.path)
        except OSError as error:
            raise SensorError(f"{mount}: can't be watched ({error.strerror}); copies to it will not be seen") from None
        self.roots[root.path] = root
        return True

    def remove(self, path: bytes) -> Root | None:
        """Forget a root; its marks go too, unless the kernel took them when it was unmounted."""
        root = self.roots.pop(path, None)
        if root is None:
            return None
        self.cut.discard(path)
        self.replaced = {handle: other for handle, other in self.replaced.items() if other.path != path}
        twins = [other for other in self.roots.values() if other.fsid == root.fsid and other.way == root.way]
        try:
            if os.stat(path).st_dev != root.dev:
                self.count -= root.way != "directories"
                return root  # unmounted: the path belongs to another file system now
            if root.way == "directories":
                self.search(root, path, remove=True)
            elif not twins:
                group, mask = (self._group, _FILESYSTEM) if root.way == "filesystem" else (self._plain, kernel.FAN_CLOSE_WRITE)
                mask |= kernel.FAN_OPEN
                kernel.fanotify_mark(group, kernel.FAN_MARK_REMOVE | kernel.FAN_MARK_FILESYSTEM, mask, path)
                self.count -= 1
        except OSError:
            return root  # gone, and its marks with it
        return root

    def renamed(self, old: bytes, new: bytes) -> None:
        """A directory has another path now, and so has all below it."""
        for handle, path in self.kept.items():
            if path == old or path.startswith(old + b"/"):
                self.kept[handle] = new + path[len(old) :]

    def root_of(self, path: bytes) -> Root | None:
        """The innermost root over a path."""
        covering = [root for root in self.roots.values() if root.covers(path)]
        return max(covering, key=lambda root: len(root.path), default=None)

    def on_medium(self, path: bytes) -> bool:
        """Whether a path lies on a medium."""
        root = self.root_of(path)
        return root is not None and root.medium

    def mark_file(self, path: bytes) -> bool:
        """Mark one file, so that it is seen under any name and wherever it is moved on its file system; False if refused."""
        return self._mark_one(path, _FILE)

    def mark_staged(self, path: bytes) -> bool:
        """Mark a copy of protected content: as `mark_file`, and told when it is renamed or gone."""
        return self._mark_one(path, _STAGED)

    def _mark_one(self, path: bytes, mask: int) -> bool:
        add = kernel.FAN_MARK_ADD | kernel.FAN_MARK_DONT_FOLLOW
        try:
            dev = os.lstat(path).st_dev if self._apart or self.tops else 0
            if self.tops and dev not in self._apart and kernel.fsid(path) not in self.tops:
                self._keep_apart(dev, path.rpartition(b"/")[0] or b"/")
            kernel.fanotify_mark(self._apart.get(dev, self._group), add, mask, path)
        except OSError:
            return False
        self.count += 1
        self.on_mark(path, False)
        return True

    @property
    def apart(self) -> dict[int, bytes]:
        """Groups of file systems that may share none, with the id by which each is known here."""
        return self._claims

    def again(self) -> Iterator[None]:
        """Go through all protected trees once more, marking (and telling `on_mark`); one step a directory."""
        for root in [root for root in self.roots.values() if not root.medium]:
            try:
                for _ in self.visit(root, root.path, again=True):
                    yield
            except OSError:
                continue  # the root is gone; the daemon waits for it

    def mark_link(self, key: bytes, path: bytes, seen: os.stat_result) -> bool:
        """Mark a file of a protected tree that has several names; True if that is new to us."""
        if seen.st_nlink < 2 or not stat.S_ISREG(seen.st_mode) or key in self._linked or self.on_medium(path):
            return False
        if len(self._linked) >= _LINKS_MAX:
            self._linked.clear()
        self._linked.add(key)
        return self.mark_file(path)

    def search(self, root: Root, top: bytes, found: list[Seen] | None = None, remove: bool = False) -> None:
        """Mark (or unmark) `top` and every directory below, and files with several names; collect files in `found`.

        Raises OSError for `top` itself. A search of more than 200,000 files ends early and is remembered in `cut`.
        """
        files = 0
        for below in self.visit(root, top, remove):
            files += len(below)
            if found is not None:
                found += below
            if not root.medium and not remove:
                for path, seen in below:
                    if seen.st_nlink < 2 or len(self.fresh_links) >= _FRESH_MAX:
                        continue  # the sweep comes to those that are too many
                    if (key := key_of(path)) and self.mark_link(key, path, seen):
                        self.fresh_links.append((key, (path, seen)))
            if files > _SEARCH_MAX and root.medium:
                self.cut.add(root.path)
                return

    def visit(self, root: Root, top: bytes, remove: bool = False, again: bool = False) -> Iterator[list[Seen]]:
        """Mark directories one by one and yield the files of each. `again`: marks there already, not counted anew."""
        pending = [top]
        while pending:
            folder = pending.pop()
            try:
                below, files = self._directory(root, folder, remove)
            except OSError:
                if folder == top:
                    raise
                continue  # removed meanwhile
            if not again and root.way == "directories":
                self.count += -1 if remove else 1
            pending += below
            yield files

    def _directory(self, root: Root, folder: bytes, remove: bool) -> tuple[list[bytes], list[Seen]]:
        fd = _open_folder(folder)
        try:
            if os.fstat(fd).st_dev != root.dev:
                return [], []
            if root.way == "directories":
                action = kernel.FAN_MARK_REMOVE if remove else kernel.FAN_MARK_ADD
                group = self._apart.get(root.dev, self._group)
                kernel.fanotify_mark(group, action | kernel.FAN_MARK_ONLYDIR, root.mask(folder), None, fd)
                (self.on_folder if root.medium else self.on_mark)(folder, remove)
            if root.opaque and not remove:
                self.kept[root.fsid + kernel.identity_handle(b"", kernel.AT_EMPTY_PATH, fd)] = folder
            below: list[bytes] = []
            files: list[Seen] = []
            with os.scandir(fd) as entries:
                for entry in entries:
                    path = folder.rstrip(b"/") + b"/" + os.fsencode(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        below.append(path)
                    else:
                        files.append((path, entry.stat(follow_symlinks=False)))
            return below, files
        finally:
            os.close(fd)

    def _mark_filesystem(self, root: Root) -> None:
        for twin in self.roots.values():
            if twin.dev == root.dev and twin.way != "directories":
                root.way = twin.way  # one mark covers every mount of a file system
                return
        add = kernel.FAN_MARK_ADD | kernel.FAN_MARK_FILESYSTEM
        opens = kernel.FAN_OPEN if root.reads else 0
        try:
            kernel.fanotify_mark(self._group, add, _FILESYSTEM | opens, root.path)
            root.way = "filesystem"
            if self.kept.get(root.handle) not in self.roots:  # known without opening anything on what may be ejected now
                self.kept[root.handle] = root.path
        except OSError as error:
            if error.errno not in kernel.NO_HANDLES:
                raise
            # never OPEN on FUSE: the kernel would open each file for us, and that breaks a phone's mount under jmtpfs
            kernel.fanotify_mark(self._plain, add, kernel.FAN_CLOSE_WRITE | opens, root.path)
            root.way = "descriptors"
        self.count += 1

    def _keep_apart(self, dev: int, path: bytes) -> None:
        """Give a btrfs subvolume or a FUSE file system a group of its own: since Linux 6.8 no group may hold marks of such a
        one (its file-system id is "weak") and of any other besides. Raises OSError if there can be no more groups."""
        if dev in self._apart:
            return
        group, mask = self._another(), kernel.FAN_DELETE_SELF
        try:
            kernel.fanotify_mark(group, kernel.FAN_MARK_ADD | kernel.FAN_MARK_ONLYDIR, mask, _STRONG)
            kernel.fanotify_mark(group, kernel.FAN_MARK_ADD | kernel.FAN_MARK_ONLYDIR, mask, path)
        except OSError as error:
            if error.errno == errno.EXDEV:
                kernel.fanotify_mark(group, kernel.FAN_MARK_REMOVE | kernel.FAN_MARK_ONLYDIR, mask, _STRONG)
                self._apart[dev], self._claims[group] = group, kernel.fsid(path)
        if dev not in self._apart:
            os.close(group)

    def _taken(self) -> set[int]:
        return system_devices() | {root.dev for root in self.roots.values() if not root.medium}


def system_devices() -> set[int]:
    """st_dev of the file systems that carry the system: no hold, and no whole-file-system mark, may go on them."""
    return {os.stat(path).st_dev for path in _SYSTEM if os.path.isdir(path)}


def alone(mount: str) -> bool:
    """Whether the file system at `mount` is not one that carries the system, and starts at that path."""
    raw = os.fsencode(mount)
    try:
        return os.stat(raw).st_dev not in system_devices() and os.path.ismount(raw)
    except OSError:
        return False


def real(path: bytes) -> bytes:
    """The path without symbolic links, but /proc/PID/root stays: it leads into another mount namespace."""
    return path if path.startswith(b"/proc/") else os.path.realpath(path)


def _root(path: bytes, medium: bool) -> Root:
    raw = real(path)
    try:
        found = os.stat(raw)
        system = kernel.fsid(raw)
        handle = kernel.file_key(raw, follow=True)
    except OSError as error:
        raise SensorError(f"{path_text(path)}: {error.strerror}; it will be watched as soon as it is there") from None
    if not stat.S_ISDIR(found.st_mode):
        raise SensorError(f"{path_text(path)}: is not a directory; only directories can be watched")
    return Root(raw, found.st_dev, found.st_ino, system, medium, opaque=_opaque(raw), handle=handle)


def _opaque(path: bytes) -> bool:
    """Whether handles there can't be turned into paths."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        os.close(kernel.open_by_handle_at(fd, kernel.name_to_handle_at(path)))
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _open_folder(path: bytes) -> int:
    """A directory's descriptor, in several steps where the path is longer than open(2) takes (PATH_MAX)."""
    here: int | None = None
    try:
        while len(path) >= _PATH_MAX:
            cut = path.rindex(b"/", 0, _PATH_MAX - _NAME_MAX) + 1
            below = os.open(path[:cut], os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            if here is not None:
                os.close(here)
            here, path = below, path[cut:]
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    finally:
        if here is not None:
            os.close(here)


def key_of(path: bytes) -> bytes:
    """A file's key, empty if it is gone."""
    try:
        return kernel.file_key(path)
    except OSError:
        return b""
