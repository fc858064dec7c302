"""A user's FUSE mount refuses root (EACCES, even to stat): how to act there with that user's ids, keeping our capabilities.

Owns: who mounted what, and `as_owner`, a block in which this thread, and no other, has the ids of who mounted it. FUSE
compares all six ids with the mount's `user_id` and `group_id` (fuse_allow_current_process, unless `allow_other`). Must not
know why one wants to act there. Only for a process that has nothing else to do (`sharing.py`): while it has a user's ids, that
user may end it, and a FUSE server may let it wait for ever.

Credentials are a thread's own in Linux; the C library's setresuid() changes those of all threads together, so the system call
is made directly. PR_SET_KEEPCAPS keeps the capabilities, capset(2) makes them effective again, so that marks can be set and the
way back is open. Sources: capabilities(7), credentials(7), setresuid(2), capset(2).
"""

import contextlib
import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterator

PR_SET_KEEPCAPS = 8
_CAPABILITY_VERSION_3 = 0x20080522
_CALLS = {"x86_64": (117, 119), "aarch64": (147, 149), "riscv64": (147, 149)}
"""Numbers of setresuid and setresgid"""

_OCTAL = re.compile(rb"\\([0-7]{3})")
_ID = re.compile(rb"(user|group)_id=(\d+)")
_READ_BYTES = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def as_owner(owner: tuple[int, int] | None) -> Iterator[None]:
    """Be (uid, gid) in this thread for the block; None or root's: change nothing. Raises OSError if that is not allowed."""
    if owner is None or not owner[0] or os.geteuid():
        yield
        return
    calls = _CALLS.get(platform.machine())
    if calls is None:
        raise OSError(0, f"no number of setresuid known for {platform.machine()}")
    ours = os.getegid()
    header, held = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), ctypes.create_string_buffer(24)
    _check(_libc.capget(header, held))
    _check(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    try:
        _become(calls, *owner)
        _check(_libc.capset(header, held))
        yield
    finally:
        _become(calls, 0, ours)
        _check(_libc.capset(header, held))
        _check(_libc.prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0))


def owner_at(path: bytes) -> tuple[int, int] | None:
    """(uid, gid) of who mounted the FUSE file system right at `path`; None if there is no such."""
    return next((owner for mount, owner in _mounts() if mount == path), None)


def _mounts() -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(mount point, owner) of FUSE mounts, the newest first: mountinfo of proc(5)."""
    for line in reversed(_read("/proc/self/mountinfo").splitlines()):
        fields = line.split(b" ")
        ids = dict(_ID.findall(fields[-1]))
        if len(ids) == len((b"user", b"group")):
            mount = _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), fields[4])
            yield mount, (int(ids[b"user"]), int(ids[b"group"]))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (a file under /proc)
            return file.read(_READ_BYTES)
    except OSError:
        return b""


def _become(calls: tuple[int, int], uid: int, gid: int) -> None:
    _check(_libc.syscall(calls[1], gid, gid, gid))
    _check(_libc.syscall(calls[0], uid, uid, uid))


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
