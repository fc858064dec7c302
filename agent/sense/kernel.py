"""The kernel's own words: fanotify, file handles, inotify and prctl through ctypes.

Owns: constants under their header names, argument types, and errno → OSError with the file's name. Nothing else in the agent
calls into libc by hand. Must not know: which paths are watched, why, or what an event means; it returns bytes and numbers.
It imports ctypes and the standard library only, so that the small process that holds opens (`holding.py`) can use it too.

Sources: fanotify(7), fanotify_init(2), fanotify_mark(2), open_by_handle_at(2), inotify(7), prctl(2), mount(2) and
<linux/fanotify.h>. A constant that needs more than Linux 5.17 says so.
"""

import ctypes
import errno
import os
import stat
import struct

# fanotify_init(2)
FAN_CLOEXEC, FAN_NONBLOCK = 0x1, 0x2
FAN_CLASS_NOTIF, FAN_CLASS_CONTENT = 0x0, 0x4
FAN_UNLIMITED_QUEUE, FAN_UNLIMITED_MARKS = 0x10, 0x20
FAN_REPORT_TID = 0x100
FAN_REPORT_FID, FAN_REPORT_DIR_FID, FAN_REPORT_NAME, FAN_REPORT_TARGET_FID = 0x200, 0x400, 0x800, 0x1000
FAN_REPORT_DFID_NAME_TARGET = FAN_REPORT_FID | FAN_REPORT_DIR_FID | FAN_REPORT_NAME | FAN_REPORT_TARGET_FID  # Linux 5.17

# fanotify_mark(2): what to do
FAN_MARK_ADD, FAN_MARK_REMOVE, FAN_MARK_DONT_FOLLOW, FAN_MARK_ONLYDIR = 0x1, 0x2, 0x4, 0x8
FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY, FAN_MARK_FLUSH, FAN_MARK_FILESYSTEM = 0x20, 0x40, 0x80, 0x100

# fanotify_mark(2): events
FAN_MODIFY, FAN_ATTRIB, FAN_CLOSE_WRITE, FAN_OPEN = 0x2, 0x4, 0x8, 0x20
FAN_CREATE, FAN_DELETE, FAN_DELETE_SELF, FAN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
FAN_OPEN_EXEC, FAN_Q_OVERFLOW, FAN_OPEN_PERM = 0x1000, 0x4000, 0x10000
FAN_EVENT_ON_CHILD, FAN_RENAME, FAN_ONDIR = 0x08000000, 0x10000000, 0x40000000  # FAN_RENAME: Linux 5.17

FAN_ALLOW, FAN_DENY = 0x1, 0x2
FAN_NOFD = -1

# struct fanotify_event_info_header.info_type
FAN_EVENT_INFO_TYPE_FID, FAN_EVENT_INFO_TYPE_DFID_NAME, FAN_EVENT_INFO_TYPE_DFID = 1, 2, 3
FAN_EVENT_INFO_TYPE_OLD_DFID_NAME, FAN_EVENT_INFO_TYPE_NEW_DFID_NAME = 10, 12

FANOTIFY_METADATA_VERSION = 3
EVENT_METADATA = struct.Struct("=IBBHQii")  # event_len vers reserved metadata_len mask fd pid
INFO_HEADER = struct.Struct("=BBH")  # info_type pad len
FAN_RESPONSE = struct.Struct("=iI")  # fd response

# inotify(7)
IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE = 0x2, 0x4, 0x8
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF, IN_Q_OVERFLOW, IN_IGNORED = 0x400, 0x800, 0x4000, 0x8000
IN_ONLYDIR, IN_DONT_FOLLOW, IN_ISDIR = 0x01000000, 0x02000000, 0x40000000
_INOTIFY_EVENT = struct.Struct("=iIII")  # wd mask cookie len

AT_FDCWD, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x400, 0x1000
AT_HANDLE_FID = 0x200  # Linux 6.5: a handle to compare with, from file systems that can't open by handle (overlay, exfat)
NO_HANDLES = (errno.EXDEV, errno.ENODEV, errno.EOPNOTSUPP, errno.EOVERFLOW)
"""What fanotify_mark and name_to_handle_at say where file handles are of no use: exfat, FUSE, overlay, btrfs subvolumes."""

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_REMOUNT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
MS_MANDLOCK, MS_NOSYMFOLLOW, MS_BIND, MS_LAZYTIME = 0x40, 0x100, 0x1000, 0x2000000

_MAX_HANDLE_SZ = 128
_BTRFS_TOP = struct.pack("=IiQQI", 20, 0x4D, 256, 5, 0)
"""The handle of the top of any btrfs: FILEID_BTRFS_WITHOUT_PARENT; first inode, file tree, any generation (btrfs_tree.h)"""
_HANDLE = struct.Struct("=Ii")  # handle_bytes handle_type
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
AT_SYMLINK_NOFOLLOW, STATX_BTIME = 0x100, 0x800
_SYS_OPEN_TREE, _OPEN_TREE_CLONE = 428, 1  # the same on all architectures
_STATX_SIZE, _STX_BTIME, _STX_DEV = 256, 80, 136  # struct statx, and where its stx_btime and stx_dev_major lie
_AT_STATX_DONT_SYNC = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)
_libc.name_to_handle_at.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
)
_libc.open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_libc.inotify_rm_watch.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)


def _checked(result: int, path: bytes | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


def fanotify_init(flags: int) -> int:
    """A new notification group's descriptor. EPERM without CAP_SYS_ADMIN, EINVAL where the kernel lacks a flag.

    Files are opened for the group, where they are, with O_NONBLOCK: opening a FIFO would else wait for its writer.
    """
    return _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE | os.O_NONBLOCK))


def fanotify_mark(group: int, flags: int, mask: int, path: bytes | None, dir_fd: int = AT_FDCWD) -> None:
    """Add or remove a mark; without `path`, on what `dir_fd` is open on. EXDEV, ENODEV, EOPNOTSUPP: no file handles there."""
    _checked(_libc.fanotify_mark(group, flags, mask, dir_fd, path), path)


def mark_whole(group: int, action: int, mask: int, path: bytes) -> bytes:
    """`fanotify_mark` with FAN_MARK_FILESYSTEM on what `path` lies on, also where that is a btrfs subvolume: then by the top of
    its file system. Returns the f_fsid by which events name it."""
    try:
        fanotify_mark(group, action | FAN_MARK_FILESYSTEM, mask, path)
        return fsid(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    mount = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        top = open_by_handle_at(mount, _BTRFS_TOP, os.O_RDONLY)
    finally:
        os.close(mount)
    try:
        fanotify_mark(group, action | FAN_MARK_FILESYSTEM, mask, None, top)
        return fsid(top)
    finally:
        os.close(top)


def name_to_handle_at(path: bytes, flags: int = 0, dir_fd: int = AT_FDCWD) -> bytes:
    """A file's handle as fanotify writes it: struct file_handle, that is handle_bytes, handle_type, opaque bytes."""
    handle = ctypes.create_string_buffer(_HANDLE.pack(_MAX_HANDLE_SZ, 0), _HANDLE.size + _MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    _checked(_libc.name_to_handle_at(dir_fd, path, handle, ctypes.byref(mount_id), flags), path)
    size, _ = _HANDLE.unpack_from(handle.raw)
    return handle.raw[: _HANDLE.size + size]


def identity_handle(path: bytes, flags: int = 0, dir_fd: int = AT_FDCWD) -> bytes:
    """`name_to_handle_at`, or where that is refused the handle that fanotify tells nevertheless (Linux 6.5)."""
    try:
        return name_to_handle_at(path, flags, dir_fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return name_to_handle_at(path, flags | AT_HANDLE_FID, dir_fd)


def open_by_handle_at(mount_fd: int, handle: bytes, flags: int = os.O_PATH) -> int:
    """A descriptor on the file `handle` names, in the mount `mount_fd` is open on. ESTALE: the file is gone."""
    return _checked(_libc.open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC))


def open_view(path: bytes) -> int:
    """A descriptor on the directory `path` as by a bind mount of our own that nobody else sees (open_tree(2), Linux 5.2): what
    is opened by way of it does not keep the mount at `path` busy. EINVAL: that is in another mount namespace."""
    return _checked(_libc.syscall(_SYS_OPEN_TREE, AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC), path)


def birth_ms(path: bytes) -> int | None:
    """When the file at `path` was made, ms since 1970 UTC (statx(2) stx_btime); None if its file system does not keep that."""
    found = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BTIME, found) < 0:
        return None
    (told,) = struct.unpack_from("=I", found)
    seconds, nanoseconds = struct.unpack_from("=qI", found, _STX_BTIME)
    return seconds * 1000 + nanoseconds // 1_000_000 if told & STATX_BTIME else None


def mount(target: bytes, flags: int, options: bytes) -> None:
    """Change how what is mounted at `target` is mounted (MS_REMOUNT). EBUSY: not read-only yet, as a file is being written."""
    _checked(_libc.mount(None, target, None, flags, options or None), target)


def device_of(fd: int) -> int:
    """st_dev of an open file, as it is known without asking a server (statx(2), AT_STATX_DONT_SYNC); 0 if that can't be had."""
    found = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(fd, b"", AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, 0, found) < 0:
        return 0
    return os.makedev(*struct.unpack_from("=II", found, _STX_DEV))


def fsid(path: bytes | int) -> bytes:
    """The 8 bytes of statfs(2) f_fsid, as fanotify writes them before a handle; where a file system has none (FUSE), st_dev in
    their place (see `fanotify_events.claimed`)."""
    value = os.statvfs(path).f_fsid
    if not value:
        return struct.pack("=Q", os.stat(path).st_dev)  # noqa: PTH116 (raw bytes)
    return struct.pack("=II", value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF)


def file_key(path: bytes, follow: bool = False) -> bytes:
    """What names the inode at `path` for good: fsid and handle, the very bytes fanotify tells; opens nothing.

    Where a file system refuses handles: st_dev and st_ino, packed. `follow` goes through a last symbolic
    link, and so through /proc/PID/fd/N. Raises OSError if there is no such file.
    """
    found = os.stat(path, follow_symlinks=follow)  # noqa: PTH116 (raw bytes)
    try:
        system = fsid(path) if follow or not stat.S_ISLNK(found.st_mode) else fsid(path.rpartition(b"/")[0] or b"/")
        return system + identity_handle(path, AT_SYMLINK_FOLLOW if follow else 0)
    except OSError as error:
        if error.errno not in (*NO_HANDLES, errno.EINVAL):  # EINVAL: AT_HANDLE_FID is not known before Linux 6.5
            raise
    return struct.pack("=QQ", found.st_dev, found.st_ino)


def inotify_init(flags: int) -> int:
    """A new inotify descriptor; flags are os.O_NONBLOCK and os.O_CLOEXEC."""
    return _checked(_libc.inotify_init1(flags))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch a path; returns its watch descriptor. ENOSPC: fs.inotify.max_user_watches is used up."""
    raw = os.fsencode(path)
    return _checked(_libc.inotify_add_watch(fd, raw, mask), raw)


def inotify_rm_watch(fd: int, wd: int) -> None:
    """Stop a watch. EINVAL: it was gone already."""
    _checked(_libc.inotify_rm_watch(fd, wd))


def decode_inotify(buffer: bytes) -> list[tuple[int, int, bytes]]:
    """(wd, mask, name) of every whole record in what read(2) gave; the name is empty for the watched thing itself."""
    records, offset = [], 0
    while offset + _INOTIFY_EVENT.size <= len(buffer):
        wd, mask, _, length = _INOTIFY_EVENT.unpack_from(buffer, offset)
        start = offset + _INOTIFY_EVENT.size
        if start + length > len(buffer):
            break
        records.append((wd, mask, buffer[start : start + length].split(b"\0", 1)[0]))
        offset = start + length
    return records


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send us this signal when the thread that started us ends: prctl(2), PR_SET_PDEATHSIG."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def undumpable() -> None:
    """Keep others with our user id from tracing this process, or reading its memory: prctl(2), PR_SET_DUMPABLE."""
    _checked(_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
