"""Simulated media: the descriptor folder, told as the very facts of udev and mounts.

Owns: watching `agent.media.simulated_dir` (inotify) and the difference between two looks at it. A folder that is a real
mount point is told with that mount's file system. Must not know what becomes of the facts, nor how a folder is marked;
`folders()` lets the daemon mark what may become a medium before its descriptor is there, so that no first write is missed.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from agent import simulate
from agent.contract.event import path_text
from agent.core.facts import Coverage, Device, Fact, Mounted, Plugged, Unmounted, Unplugged
from agent.sense import kernel

_WATCH = kernel.IN_CREATE | kernel.IN_CLOSE_WRITE | kernel.IN_MOVED_FROM | kernel.IN_MOVED_TO | kernel.IN_DELETE
MountAt = Callable[[str], tuple[str, bool] | None]
"""path → (file system, read-only) if a file system of its own is mounted there, else None."""


class Simulated:
    """A Sensor over one directory. `mount_at` answers what is mounted at a path."""

    def __init__(self, root: str, mount_at: MountAt) -> None:
        self.root = Path(os.path.realpath(root))
        self._mount_at = mount_at
        self._fd = kernel.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched = False
        self._present: dict[str, tuple[Device, Mounted | None]] = {}
        self._next_mount_id = -1
        self._cold = True

    def fileno(self) -> int:
        """The inotify descriptor."""
        return self._fd

    def folders(self) -> list[str]:
        """Every folder in the directory: a medium, or what may become one."""
        try:
            return [entry.path for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return []

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """What was plugged or pulled since the last look."""
        if not self._watched:
            self._watch()
        try:
            while os.read(self._fd, 65536):
                pass
        except BlockingIOError:
            pass
        yield from self.look(now_ms)

    def look(self, now_ms: int) -> Iterator[Fact]:
        """Compare the directory with what was last told; also called when mounts changed."""
        now = {medium.name: medium for medium in simulate.present(self.root)}
        for name in [name for name in self._present if name not in now]:
            device, known = self._present.pop(name)
            if known is not None:
                yield Unmounted(at_ms=now_ms, mount_id=known.mount_id)
            yield Unplugged(at_ms=now_ms, id=device.id)
        for name, medium in now.items():
            device, mounted = _device(medium), None if medium.descriptor.device else self._mounted(medium, now_ms)
            before = self._present.get(name)
            if before and before[0] == device and _alike(before[1], mounted):
                continue
            if mounted is not None:
                mounted.mount_id, self._next_mount_id = self._next_mount_id, self._next_mount_id - 1
            self._present[name] = device, mounted
            if before and before[1] is not None:
                yield Unmounted(at_ms=now_ms, mount_id=before[1].mount_id)
            if not before or before[0] != device:
                yield Plugged(at_ms=now_ms, device=device, cold=self._cold)
            if mounted is not None:
                yield mounted
        self._cold = False

    def coverage(self, now_ms: int) -> Coverage:
        """Whether the directory is there to be watched."""
        why = "" if self._watched else f"{self.root} is not there yet; make it, or clear agent.media.simulated_dir"
        return Coverage(
            at_ms=now_ms,
            sensor="simulated",
            ok=self._watched,
            sees=["simulated_media"] if self._watched else [],
            blind=[] if self._watched else ["simulated_dir_missing"],
            why=why,
        )

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _watch(self) -> None:
        try:
            kernel.inotify_add_watch(self._fd, str(self.root), _WATCH | kernel.IN_ONLYDIR)
            self._watched = True
        except OSError:
            self._watched = False

    def _mounted(self, medium: simulate.Medium, now_ms: int) -> Mounted:
        path = path_text(os.fsencode(medium.path))
        own = self._mount_at(path)
        return Mounted(
            at_ms=now_ms,
            mount_id=0,
            dev=f"sim:{medium.name}",
            mount=path,
            fs=own[0] if own else "folder",
            source=str(medium.descriptor_path),
            read_only=medium.descriptor.read_only or bool(own and own[1]),
            cold=self._cold,
        )


def _alike(one: Mounted | None, other: Mounted | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.fs, one.read_only) == (other.fs, other.read_only)


def _nodes(device: str) -> list[str]:
    """The numbers of a block device, of its partitions, and of what is stacked on them (LUKS, LVM), as udev would tell them."""
    try:
        found = Path(device).stat() if device else None
    except OSError:
        return []
    if found is None or not stat.S_ISBLK(found.st_mode):
        return []
    numbers: list[str] = []
    folders = [Path(os.path.realpath(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"))]
    for folder in folders:  # grows while it is walked
        try:
            numbers.append((folder / "dev").read_text().strip())
            parts = [each for each in sorted(folder.iterdir()) if (each / "partition").exists()]
            folders += parts + [each.resolve() for each in sorted((folder / "holders").iterdir())]
        except OSError:
            continue  # it went while it was looked at
    return list(dict.fromkeys(numbers))


def _device(medium: simulate.Medium) -> Device:
    said = medium.descriptor
    return Device(
        id=f"sim:{medium.name}",
        bus=said.bus,
        subsystem="simulated",
        vendor=said.vendor,
        model=said.model,
        serial=said.serial,
        vendor_id=said.vendor_id,
        product_id=said.product_id,
        interfaces=list(said.interfaces),
        nodes=[f"sim:{medium.name}", *_nodes(said.device)],
        removable=True,
        read_only=said.read_only,
        declared_kind=said.kind,
        simulated=True,
    )
