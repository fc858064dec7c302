# ruff: noqa: PTH116, PTH123
# (paths are raw bytes here, and pathlib knows only text)
"""Which file systems are mounted where: /proc/PID/mountinfo, proc(5).

Owns: parsing mountinfo, the difference between two looks at it, and the name a file system was given (UUID, label, from
udev's database). Pure kernel file systems (proc, cgroup …) are passed over. Must not know which mounts are media.

How to wait for change: register `fileno()` with `Mounts.EVENTS` (POLLPRI; POLLERR comes by itself), not POLLIN, which is
always true; each return of poll(2) takes the news with it, so call `drain` every time.
Mounts made inside another mount namespace tell us nothing; `also(pid)` looks there. Such a mount can be marked through
/proc/PID/root + its path, while that process or another one of its namespace lives; a file-system mark stays after that.
"""

import os
import re
import select
import stat
from collections.abc import Iterator
from typing import NamedTuple

from agent.contract.event import path_text
from agent.core.facts import Coverage, Fact, Mounted, Unmounted
from agent.sense import SensorError

_OCTAL = re.compile(rb"\\([0-7]{3})")
_KERNEL_ONLY = {
    *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl"),
    *("hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs"),
}
_LABEL = (b"E:ID_FS_UUID=", b"E:ID_FS_LABEL=")
_LABEL_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


class Mount(NamedTuple):
    """One line of mountinfo. `dev` is "major:minor"; paths are raw, escapes undone."""

    mount_id: int
    parent_id: int
    dev: str
    root: bytes
    mount: bytes
    read_only: bool
    fs: str
    source: bytes


def parse(raw: bytes) -> list[Mount]:
    """All lines of a mountinfo file; lines that are not of its form are passed over."""
    mounts = []
    for line in raw.split(b"\n"):
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)  # any number of optional fields come before it
            read_only = b"ro" in fields[5].split(b",") or b"ro" in fields[dash + 3].split(b",")
            mount_id, parent_id, dev = int(fields[0]), int(fields[1]), fields[2].decode("ascii")
            root, mount, source = (unescape(field) for field in (fields[3], fields[4], fields[dash + 2]))
            fs = unescape(fields[dash + 1]).decode("utf-8", "backslashreplace")
        except (ValueError, IndexError):
            continue
        mounts.append(Mount(mount_id, parent_id, dev, root, mount, read_only, fs, source))
    return mounts


def unescape(field: bytes) -> bytes:
    """Undo the kernel's octal escapes: blank, tab, newline, backslash and '#' come as a backslash and three digits."""
    return _OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field)


class Mounts:
    """A Sensor over our own mount namespace, and by `also` over others."""

    EVENTS = select.POLLPRI

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        try:
            self._fd = os.open(f"{proc}/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SensorError(f"{proc}/self/mountinfo: {error.strerror}; mount /proc") from None
        self._namespace = self._mnt_ns("self")
        self._known: dict[int, dict[int, Mount]] = {}
        self._cold = True

    def fileno(self) -> int:
        """/proc/self/mountinfo, to be polled with `EVENTS`."""
        return self._fd

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """Mounted and Unmounted since the last call; at the first, every mount there is (`cold`)."""
        now = {mount.mount_id: mount for mount in parse(self._read()) if mount.fs not in _KERNEL_ONLY}
        yield from self._differ(0, now, now_ms)
        self._cold = False

    def also(self, pid: int, now_ms: int) -> Iterator[Fact]:
        """Block devices that `pid` sees mounted and we do not; nothing if it lives in our mount namespace, or is gone."""
        namespace = self._mnt_ns(str(pid))
        if namespace in (0, self._namespace):
            return
        try:
            with open(f"{self._proc}/{pid}/mountinfo", "rb") as file:
                there = parse(file.read())
        except OSError:
            return
        ours = {mount.dev for mount in self._known.get(0, {}).values()}
        block = {
            m.mount_id: m for m in there if m.fs not in _KERNEL_ONLY and m.source.startswith(b"/dev/") and m.dev not in ours
        }
        yield from self._differ(namespace, block, now_ms)

    def mount_at(self, path: str) -> tuple[str, bool] | None:
        """(file system, read-only) if one is mounted right at `path`; else None. Looks anew."""
        raw = os.path.realpath(os.fsencode(path))
        here = [mount for mount in parse(self._read()) if mount.mount == raw]
        return (here[-1].fs, here[-1].read_only) if here else None

    def coverage(self, now_ms: int) -> Coverage:
        """Always whole for our own namespace."""
        return Coverage(at_ms=now_ms, sensor="mounts", ok=True, sees=["mounts"], blind=["other_namespaces_until_used"])

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _differ(self, namespace: int, now: dict[int, Mount], now_ms: int) -> Iterator[Fact]:
        before = self._known.get(namespace, {})
        self._known[namespace] = now
        for mount_id, old in before.items():
            new = now.get(mount_id)
            if new is None or (new.dev, new.root, new.mount) != (old.dev, old.root, old.mount):  # ids are used again
                yield Unmounted(at_ms=now_ms, mount_id=mount_id, namespace=namespace)
        for mount_id, new in now.items():
            if before.get(mount_id) != new:
                yield self._mounted(new, namespace, now_ms)

    def _mounted(self, mount: Mount, namespace: int, now_ms: int) -> Mounted:
        dev = block_device(mount)
        uuid, label = file_system_names(dev)
        return Mounted(
            at_ms=now_ms,
            mount_id=mount.mount_id,
            dev=dev,
            mount=path_text(mount.mount),
            fs=mount.fs,
            source=path_text(mount.source),
            root=path_text(mount.root),
            fs_uuid=uuid,
            label=label,
            read_only=mount.read_only,
            namespace=namespace,
            cold=self._cold,
        )

    def _read(self) -> bytes:
        """The whole file: the kernel writes it in pieces of a page or more, and only a read of nothing is its end."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        pieces = []
        while piece := os.read(self._fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)

    def _mnt_ns(self, pid: str) -> int:
        try:
            return os.stat(f"{self._proc}/{pid}/ns/mnt").st_ino
        except OSError:
            return 0


def block_device(mount: Mount) -> str:
    """The block device's "major:minor". btrfs and others mount under a number of their own; then the source's node counts."""
    if mount.dev.startswith("0:") and mount.source.startswith(b"/dev/"):
        try:
            node = os.stat(mount.source)
        except OSError:
            return mount.dev
        if stat.S_ISBLK(node.st_mode):
            return f"{os.major(node.st_rdev)}:{os.minor(node.st_rdev)}"
    return mount.dev


def file_system_names(dev: str, run: str = "/run/udev/data") -> tuple[str, str]:
    """(UUID, label) as udev found them on a block device, empty where it did not look."""
    try:
        with open(f"{run}/b{dev}", "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return "", ""
    uuid, label = (next((line[len(key) :] for line in lines if line.startswith(key)), b"") for key in _LABEL)
    label = _LABEL_ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), label)
    return uuid.decode("utf-8", "backslashreplace"), label.decode("utf-8", "backslashreplace")
