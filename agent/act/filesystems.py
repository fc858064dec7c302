"""File systems and block devices, made read-only and writable again: mount(2), and BLKROSET of <linux/fs.h>.

Owns: those calls, and what must be known to undo them. Must not know which medium should be stopped, or why. The superblock is
remounted, so it holds in every mount namespace, also when the agent has one of its own; the flags and options it was mounted
with stay. A file that somebody has open for writing keeps a file system from it (EBUSY). FUSE and ntfs-3g (fuseblk) are made
read-only by the kernel above the server, which is not asked. A device set read-only is mounted read-only by whoever mounts it
next, and refuses writes past its file system (dd) with EPERM.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import NamedTuple

from agent.sense import kernel
from agent.sense.mounts import unescape

_BLKROSET, _BLKROGET = 0x125D, 0x125E
_OF_MOUNT = {
    b"nosuid": kernel.MS_NOSUID,
    b"nodev": kernel.MS_NODEV,
    b"noexec": kernel.MS_NOEXEC,
    b"nosymfollow": kernel.MS_NOSYMFOLLOW,
}
_OF_SYSTEM = {b"sync": kernel.MS_SYNCHRONOUS, b"mand": kernel.MS_MANDLOCK, b"lazytime": kernel.MS_LAZYTIME}
_NOT_OPTIONS = {b"rw", b"ro", b"dirsync", *_OF_SYSTEM}
_WANT_OPTIONS = ("ntfs3", "exfat")
"""Those that take a remount without options for one with their defaults (another owner of all files)"""


class Found(NamedTuple):
    """One line of mountinfo, as a remount needs it. `flags` are MS_ flags to be kept, `options` the file system's own."""

    dev: str
    mount: bytes
    source: bytes
    fs: str
    flags: int
    options: bytes
    read_only: bool
    mount_read_only: bool


def parse(raw: bytes) -> dict[int, Found]:
    """Mounts by their mount id; lines that are not of mountinfo's form (proc(5)) are passed over."""
    found = {}
    for line in raw.split(b"\n"):
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
            number, dev, fs = int(fields[0]), fields[2].decode("ascii"), fields[dash + 1].decode("ascii")
            mine, system = fields[5].split(b","), unescape(fields[dash + 3]).split(b",")
        except (ValueError, IndexError):
            continue
        flags = sum(_OF_MOUNT.get(each, 0) for each in mine) | sum(_OF_SYSTEM.get(each, 0) for each in system)
        options = b",".join(each for each in system if each not in _NOT_OPTIONS)
        found[number] = Found(
            dev, unescape(fields[4]), unescape(fields[dash + 2]), fs, flags, options, b"ro" in system, b"ro" in mine
        )
    return found


def mounted() -> dict[int, Found]:
    """All that is mounted in this namespace, by mount id."""
    return parse(Path("/proc/self/mountinfo").read_bytes())


def set_read_only(found: Found, read_only: bool) -> None:
    """Remount the superblock. Raises OSError; EBUSY: a file is open for writing."""
    flags = kernel.MS_REMOUNT | found.flags | (kernel.MS_RDONLY if read_only else 0)
    options = found.options if found.fs in _WANT_OPTIONS else b""
    try:
        kernel.mount(found.mount, flags, options)
    except OSError as error:
        if error.errno != errno.EINVAL or not options:
            raise
        kernel.mount(found.mount, flags, b"")
    if not read_only and found.mount_read_only:  # that mount alone was read-only before we came
        kernel.mount(found.mount, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | found.flags, b"")


def node_path(node: str) -> str:
    """The device file of a block device "major:minor"; empty if there is none."""
    try:
        lines = Path(f"/sys/dev/block/{node}/uevent").read_text().splitlines()
    except OSError:
        return ""
    return next((f"/dev/{line[8:]}" for line in lines if line.startswith("DEVNAME=")), "")


def node_is_read_only(path: str) -> bool:
    """Whether a block device takes no writes. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        (said,) = struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))
        return bool(said)
    finally:
        os.close(fd)


def set_node_read_only(path: str, read_only: bool) -> None:
    """Have a block device take no writes, or take them again. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _BLKROSET, struct.pack("i", read_only))
    finally:
        os.close(fd)
