# ruff: noqa: PTH116, PTH120, PTH123, PTH208
# (paths are raw bytes here, and pathlib knows only text)
"""Which file systems are mounted where: /proc/PID/mountinfo, proc(5).

Owns: parsing mountinfo, the difference between two looks at it, and the name a file system was given (UUID, label, from
udev's database). Pure kernel file systems (proc, cgroup …) are passed over. Must not know which mounts are media.

How to wait for change: register `fileno()` with `Mounts.EVENTS` (POLLPRI; POLLERR comes by itself), not POLLIN, which is
always true; each return of poll(2) takes the news with it, so call `drain` every time.
Mounts made inside another mount namespace tell us nothing; `also(pid)` looks there, `elsewhere` looks again. Such a mount is
reached through /proc/PID/root + its path while that process lives; so the eldest of its namespace is taken. Nothing is kept
open: a descriptor of /proc/PID/mountinfo would keep the namespace, and its media, from going.
"""

import math
import os
import re
import select
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from agent.contract.event import path_text
from agent.core.facts import Coverage, Fact, Mounted, Unmounted
from agent.sense import SensorError, behind, procfs, serving
from agent.sense.pairs import Pairs

_OCTAL = re.compile(rb"\\([0-7]{3})")
_KERNEL_ONLY = {
    *("autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs", "fusectl"),
    *("hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs", "securityfs", "selinuxfs", "sysfs", "tracefs"),
}
_NOT_LOCAL = {
    *("nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "coda", "ocfs2", "gfs2", "lustre", "davfs", "virtiofs"),
    *("overlay", "aufs", "unionfs", "ramfs", "rootfs"),
}
_LABEL = (b"E:ID_FS_UUID=", b"E:ID_FS_LABEL=")
_LABEL_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


_LOOKED_S = (0, 1, 4, 16, 64)
_LOOKED_EVERY_S, _ASKED_EVERY_S = 300, 2
"""When, after it was mounted, it is looked who serves a FUSE file system; and how often, whom these talk to"""
_MOST_SERVED = 32


class _Served:
    """Who serves a FUSE file system, by looks: `far` is the machine that they were seen to talk to."""

    __slots__ = ("asked_s", "far", "hands", "looked_s", "looks")

    def __init__(self) -> None:
        self.hands: list[int] = []
        self.far = ""
        self.looks = 0
        self.looked_s = self.asked_s = -math.inf


class Mount(NamedTuple):
    """One line of mountinfo. `dev` is "major:minor"; paths are raw, escapes undone. `owner`: the uid that mounted it (FUSE)."""

    mount_id: int
    parent_id: int
    dev: str
    root: bytes
    mount: bytes
    read_only: bool
    fs: str
    source: bytes
    owner: int = 0


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
            owners = [int(each[8:]) for each in fields[dash + 3].split(b",") if each.startswith(b"user_id=")]
        except (ValueError, IndexError):
            continue
        mounts.append(Mount(mount_id, parent_id, dev, root, mount, read_only, fs, source, max(owners, default=0)))
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
        self._home = {0, self._mnt_ns("self")}
        """Namespaces whose mounts are told by `drain`; 0 stands for what can't be known"""
        if follows(self._read(), procfs.read(f"{proc}/1/mountinfo")):
            self._home.add(self._mnt_ns("1"))
        self._served: dict[str, _Served] = {}
        self._pairs: Pairs | None = None
        self._known: dict[int, dict[int, Mount]] = {}
        self._inside: dict[int, int] = {}
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
        """Block devices, and views by FUSE, that `pid` sees mounted and we do not; nothing if it lives in our namespace."""
        namespace = self._mnt_ns(str(pid))
        if namespace in self._home:
            return
        if self._mnt_ns(str(self._inside.get(namespace, 0))) != namespace:
            yield from self._differ(namespace, {}, now_ms)  # they were reached by a process that is gone
            self._inside[namespace] = self.eldest(pid)
        yield from self._look_inside(namespace, now_ms)

    def foreign(self, pid: int) -> bool:
        """Whether a process lives in another mount namespace."""
        return self._mnt_ns(str(pid)) not in self._home

    def eldest(self, pid: int) -> int:
        """The forefather of `pid` that lives in the same mount namespace: what a container lives as long as."""
        namespace = self._mnt_ns(str(pid))
        while (seen := procfs.stat(pid)) is not None and self._mnt_ns(str(seen.ppid)) == namespace:
            pid = seen.ppid
        return pid

    def elsewhere(self, now_ms: int) -> Iterator[Fact]:
        """What changed in the other namespaces that are known, and Unmounted for what was mounted in those that ended."""
        for namespace, pid in list(self._inside.items()):
            if self._mnt_ns(str(pid)) == namespace:
                yield from self._look_inside(namespace, now_ms)
                continue
            had = bool(self._known.get(namespace))
            yield from self._differ(namespace, {}, now_ms)
            del self._inside[namespace], self._known[namespace]
            if had and (heir := self._somebody(namespace)):
                yield from self.also(heir, now_ms)

    def served_afar(self, now_ms: int) -> Iterator[Fact]:
        """Mounted once more for each FUSE file system whose server turns out to talk to another machine; once a second."""
        there = {mount.dev: mount for mount in self._known.get(0, {}).values() if _is_fuse(mount)}
        self._served = {dev: served for dev, served in self._served.items() if dev in there}
        for mount in there.values():
            known = self._served.get(mount.dev)
            if (known is None or not known.far) and self._far(mount):
                yield self._mounted(mount, 0, now_ms)

    def _far(self, mount: Mount) -> str:
        """The machine that the server of a FUSE file system talks to, as far as is known by now."""
        served, now = self._served.get(mount.dev), time.monotonic()
        if served is None:
            if len(self._served) >= _MOST_SERVED:
                return ""
            served = self._served[mount.dev] = _Served()
        wait = _LOOKED_S[served.looks] if served.looks < len(_LOOKED_S) else _LOOKED_EVERY_S
        if served.far:
            return served.far
        if now - served.looked_s >= wait:
            served.looked_s, served.looks = now, served.looks + 1
            if self._pairs is None:
                self._pairs = Pairs()
            found = serving.servers(int(mount.dev.partition(":")[2]))
            served.hands = [pid for server in found[:1] for pid in serving.hands(server, self._pairs)]
        elif now - served.asked_s < _ASKED_EVERY_S:
            return ""
        served.asked_s = now
        served.far = serving.far_end(served.hands)
        return served.far

    def _holds(self, mount: Mount) -> list[str]:
        """What the server of a FUSE file system holds open, whose source is no directory and no device."""
        known = parse(self._read())
        devices = {each.mount_id: each.dev for each in known}
        devices[0] = next((each.dev for each in known if each.mount == b"/"), "")
        pids = serving.servers(int(mount.dev.partition(":")[2]))
        return list(dict.fromkeys(each for pid in pids[:1] for each in behind.held(pid, devices)))

    def _look_inside(self, namespace: int, now_ms: int) -> Iterator[Fact]:
        try:
            with open(f"{self._proc}/{self._inside[namespace]}/mountinfo", "rb") as file:
                there = parse(file.read())
        except OSError:
            return
        ours = {mount.dev for mount in self._known.get(0, {}).values()}
        known = self._known.get(namespace, {})
        new = {m.mount_id: m for m in there if m.mount_id in known or (m.fs not in _KERNEL_ONLY and m.dev not in ours)}
        block = {number: m for number, m in new.items() if m.source.startswith(b"/dev/") or shown(m)}
        if block.keys() - known.keys():  # a mount that reaches them and us is told as ours, even if we are not told yet
            ours = {mount.dev for mount in parse(self._read())}
            block = {number: m for number, m in block.items() if number in known or m.dev not in ours}
        yield from self._differ(namespace, block, now_ms)

    def _somebody(self, namespace: int) -> int:
        """Any process of a namespace; 0 if there is none."""
        pids = (name for name in os.listdir(self._proc) if name.isdigit())
        return next((int(name) for name in pids if self._mnt_ns(name) == namespace), 0)

    def mount_at(self, path: str) -> tuple[str, bool] | None:
        """(file system, read-only) if one is mounted right at `path`; else None. Looks anew."""
        raw = os.path.realpath(os.fsencode(path))
        here = [mount for mount in parse(self._read()) if mount.mount == raw]
        return (here[-1].fs, here[-1].read_only) if here else None

    def local(self, media: list[str], read_only: bool = False) -> list[bytes]:
        """One mount point each of the file systems on this machine that can be written to (`read_only`: others too), but for
        those of `media`.

        Those of other machines and those in user space are left out (what lies below a FUSE file system is seen, and asking
        one can take for ever), and overlays, whose files are those of the file system below.
        """
        away = {os.fsencode(path) for path in media}
        mounts = list(self._known.get(0, {}).values())
        taken = {mount.dev for mount in mounts if mount.mount in away}
        found: dict[tuple[str, bytes], bytes] = {}
        for mount in mounts:
            if mount.read_only > read_only or mount.dev in taken or mount.fs.startswith("fuse") or mount.fs in _NOT_LOCAL:
                continue
            at = (mount.dev, mount.root if mount.fs == "btrfs" else b"")  # from one subvolume no path leads into another
            known = found.get(at)
            if known is None or len(mount.mount) < len(known):
                found[at] = mount.mount
        return sorted(found.values())

    def views(self, paths: list[str]) -> list[str]:
        """Where FUSE servers of root's show one of these directories, or a part of it, once more.

        What somebody else mounted may claim any source, and its server need never answer whoever looks.
        """
        found = []
        for mount in self._known.get(0, {}).values():
            lies_on, at = b"" if mount.owner else shown(mount), mount.mount.rstrip(b"/")
            for path in paths if lies_on else ():
                raw = os.fsencode(path) + b"/"
                if lies_on.startswith(raw):
                    found.append(os.fsdecode(mount.mount))
                elif raw.startswith(lies_on):
                    found.append(os.fsdecode(at + b"/" + raw[len(lies_on) : -1]))
        return list(dict.fromkeys(found))

    def coverage(self, now_ms: int) -> Coverage:
        """Always whole for our own namespace."""
        return Coverage(at_ms=now_ms, sensor="mounts", ok=True, sees=["mounts"], blind=["other_namespaces_until_used"])

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._pairs is not None:
            self._pairs.close()

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
        far = self._far(mount) if _is_fuse(mount) and not namespace else ""
        below = (b"" if far else shown(mount)) or image_below(f"/sys/dev/block/{dev}")
        unsaid = _is_fuse(mount) and not namespace and not far and not below and dev == mount.dev
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
            reach=f"{self._proc}/{self._inside[namespace]}/root{path_text(mount.mount)}" if namespace else "",
            lies_on=path_text(below),
            holds=self._holds(mount) if unsaid else [],
            far=far,
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


def follows(ours: bytes, theirs: bytes) -> bool:
    """Whether what is mounted in their namespace appears in ours, too: our root receives (`master:N`) what theirs hands on
    (`shared:N`), as in a unit of systemd's with PrivateMounts=. Both are the bytes of a mountinfo file."""
    return bool(_group_of_root(ours, b"master:") & _group_of_root(theirs, b"shared:"))


def _group_of_root(raw: bytes, key: bytes) -> set[bytes]:
    fields = next((fields for fields in map(bytes.split, raw.split(b"\n")) if fields[4:5] == [b"/"]), [])
    return {field.removeprefix(key) for field in fields[6:] if field.startswith(key)}


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


def shown(mount: Mount) -> bytes:
    """The directory that a FUSE file system shows in another form, as its server gave it (encrypted, or as it is); empty if it
    gave none."""
    if mount.fs.partition(".")[0] not in ("fuse", "ecryptfs") or not mount.source.startswith(b"/"):
        return b""
    return mount.source.rstrip(b"/") + b"/"


def _is_fuse(mount: Mount) -> bool:
    return mount.fs.partition(".")[0] == "fuse"


def image_below(device: str) -> bytes:
    """The file that a block device is made of by loop(4), also under partitions, LUKS and LVM; empty if there is none.

    `device` is its folder in sysfs.
    """
    device = os.path.realpath(device)
    for folder in (device, os.path.dirname(device)):  # a partition's disk is the folder above
        try:
            with open(f"{folder}/loop/backing_file", "rb") as file:
                return file.read().rstrip(b"\n")
        except OSError:
            continue
    try:
        below = sorted(os.listdir(f"{device}/slaves"))
    except OSError:
        return b""
    return next((image for name in below if (image := image_below(f"{device}/slaves/{name}"))), b"")


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
