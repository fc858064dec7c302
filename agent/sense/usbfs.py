# ruff: noqa: PTH208
# (a Path for each entry of /proc would cost thrice as much)
"""Who holds a USB device by its own node, /dev/bus/usb/BBB/DDD, the one place where every way to a phone shows (MTP, PTP).

Owns: one fanotify group with a mark on the node of each device that is told as plugged in; the processes that hold such a
node, whoever opened it (jmtpfs opens, then forks); and the file systems that such a process serves by FUSE, which lie on the
device as a partition lies on a disk. Must not know what is a phone, nor what was read. Nothing is opened here.

How many bytes went to the device is counted where the kernel tells it (`urbs`) and told as `sent`. Requests, both ways, are
counted everywhere (`urbnum` of sysfs) and told as `uses`, so that who reads a file and then says nothing to the device is not
taken for who sent it. Between an open and the next look, `_LOOKS_MS` apart, a holder that lives shorter is known by its open
alone.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator

from msgspec import structs

from agent.contract.event import path_text
from agent.core.facts import Coverage, Device, Fact, Mounted, Plugged, Unmounted, Unplugged, WayClosed, WayHeld
from agent.sense import SensorError, kernel, procfs
from agent.sense.fanotify_events import heads, names
from agent.sense.urbs import Urbs

_READ_BYTES = 4096
_NODES = b"/dev/bus/usb/"
_FUSE = b"/dev/fuse"
_LOOKS_MS = (30, 300, 1_500, 5_000)
"""When to look for holders after an open: programs fork, and take their time"""
_MOST_FUSE = 64
_PRINTER, _IMAGE, _VENDOR = "07", "06", "ff"
OnPid = Callable[[int], None]


class _Node:
    """One device. `way` is what leaves by it; `served` are the file systems that its holders serve."""

    __slots__ = ("device", "holders", "idle", "key", "path", "served", "since_ms", "told", "unsent", "way")

    def __init__(self, device: Device, path: bytes, way: str) -> None:
        self.device, self.path, self.way = device, path, way
        self.key = b""
        """The inode of the node, as the kernel names it in events"""
        self.idle = -1
        """Requests when nobody was known to hold it"""
        self.unsent: int | None = None
        """Bytes sent to it by then; None where they are not counted"""
        self.since_ms: int | None = None
        """When that was; None: somebody may have held it for long"""
        self.holders: dict[int, int] = {}
        """pid → when its process began, clock ticks since boot"""
        self.served: list[str] = []
        self.told: tuple[int, int | None] | None = None
        """Requests and bytes as they were told last"""

    @property
    def id(self) -> str:
        """The way's id: the node below /dev/bus."""
        return f"usb:{path_text(self.path[len(_NODES) :])}"


class Usbfs:
    """A Sensor. `learn` tells it of devices and mounts; `fileno()` is readable when a device was opened."""

    def __init__(self) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_FID
        try:
            self._group = kernel.fanotify_init(flags)
        except OSError as error:
            raise SensorError(f"fanotify: {error.strerror}; it needs CAP_SYS_ADMIN (root)") from None
        self._nodes: dict[bytes, _Node] = {}
        self._fuse: dict[str, Mounted] = {}
        self._looks: deque[int] = deque()
        self._urbs = Urbs()
        self._refused = 0

    def fileno(self) -> int:
        """The group's descriptor, -1 when closed."""
        return self._group

    def learn(self, fact: Fact) -> None:
        """A device or a mount came, changed or went. What is served from a device is added to its nodes."""
        if isinstance(fact, Plugged):
            self._plugged(fact)
        elif isinstance(fact, Unplugged):
            for node in [node for node in self._nodes.values() if node.device.id == fact.id]:
                del self._nodes[node.path]  # and its mark went with the node
                self._urbs.forget(node.device.id)
        elif isinstance(fact, Mounted) and fact.fs.startswith("fuse") and fact.namespace == 0 and self._nodes:
            self._fuse[fact.dev] = fact
            while len(self._fuse) > _MOST_FUSE:
                del self._fuse[next(iter(self._fuse))]
            self._look_soon(fact.at_ms)
        elif isinstance(fact, Unmounted) and fact.namespace == 0:
            for dev in [dev for dev, mounted in self._fuse.items() if mounted.mount_id == fact.mount_id]:
                del self._fuse[dev]
                for node in self._nodes.values():
                    node.served = [each for each in node.served if each != dev]

    def _plugged(self, fact: Plugged) -> None:
        path = _node_of(fact.device)
        if not path:
            return
        node = self._nodes.get(path)
        if node is None or node.device.id != fact.device.id:
            node = self._nodes[path] = _Node(fact.device, path, _way(fact.device))
            node.idle = _requests(node)
            self._urbs.watch(fact.device.id)
            node.unsent = self._urbs.sent(fact.device.id)
            try:
                kernel.fanotify_mark(self._group, kernel.FAN_MARK_ADD, kernel.FAN_OPEN, path)
                node.key = kernel.file_key(path)
            except OSError:
                self._refused += 1  # pulled again already, or a kernel that tells nothing of device nodes
            self._look_soon(fact.at_ms)
        node.device = fact.device
        fact.device = structs.replace(fact.device, nodes=list(dict.fromkeys([*fact.device.nodes, *node.served])))

    def due(self, now_ms: int) -> bool:
        """Whether it is time to look for holders."""
        return bool(self._looks) and not now_ms < self._looks[0] <= now_ms + _LOOKS_MS[-1]

    def drain(self, now_ms: int, on_pid: OnPid | None = None) -> Iterator[Fact]:
        """Who holds which device by now, how much it was used, who let go, and what is served from it.

        `on_pid` is called for whoever opened or holds one before it is told.
        """
        self._urbs.count()
        before = {node.path: (_requests(node), self._urbs.sent(node.device.id)) for node in self._nodes.values()}
        opened = self._openers()  # not before: what is sent from here on is theirs, or told of by the next look
        keys = {key for _, key in opened}
        if opened:
            self._look_soon(now_ms)
        for pid, key in opened:
            yield from self._holds(pid, now_ms, on_pid)
            yield from self._held_by(pid, key, now_ms, on_pid)
        if self.due(now_ms):
            while self.due(now_ms):
                self._looks.popleft()
            yield from self._search(now_ms, on_pid)
        for node in self._nodes.values():
            if node.holders:
                yield from self._again(node, now_ms)
            elif node.key not in keys and node.path in before:
                (node.idle, node.unsent), node.since_ms = before[node.path], now_ms

    def coverage(self, now_ms: int) -> Coverage:
        """Whether devices can be watched here."""
        why = f"{self._refused} USB devices could not be watched" if self._refused else ""
        return Coverage(at_ms=now_ms, sensor="usbfs", ok=not why, sees=["phones"], blind=["phones"] if why else [], why=why)

    def close(self) -> None:
        """Give the group back."""
        self._urbs.close()
        if self._group >= 0:
            os.close(self._group)
            self._group = -1

    # -- who holds -----------------------------------------------------------------------------------------------------

    def _openers(self) -> set[tuple[int, bytes]]:
        """Pids, and the key of the node that each opened."""
        opened: set[tuple[int, bytes]] = set()
        while self._group >= 0:
            try:
                buffer = os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                break
            opened |= {(pid, names(buffer, start, end).target) for _, _, pid, start, end in heads(buffer)}
        return {(pid, key) for pid, key in opened if pid not in (os.getpid(), 0)}

    def _look_soon(self, now_ms: int) -> None:
        self._looks = deque(sorted({*self._looks, *(now_ms + wait_ms for wait_ms in _LOOKS_MS)}))
        while len(self._looks) > 2 * len(_LOOKS_MS):
            self._looks.popleft()

    def _search(self, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        """All processes: the node may have been handed on."""
        if not self._nodes:
            return
        for node in self._nodes.values():
            self._urbs.leave(node.device.id)
            if not node.holders and self._urbs.sent(node.device.id) is None:
                self._urbs.watch(node.device.id)  # its interfaces are there a moment after itself
        for name in os.listdir("/proc"):
            if name.isdigit():
                yield from self._holds(int(name), now_ms, on_pid)

    def _holds(self, pid: int, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        held, serves = _devices(pid)
        mine = [self._nodes[path] for path in held if path in self._nodes]
        stat = procfs.stat(pid) if mine else None
        if stat is None or pid == os.getpid():
            return
        for node in mine:
            if node.holders.get(pid) != stat.start:
                if on_pid is not None:
                    on_pid(pid)
                node.holders[pid] = stat.start
                node.told = None
                yield from self._used(node, pid, now_ms)
            if serves:
                yield from self._serving(node, pid, now_ms)

    def _held_by(self, pid: int, key: bytes, now_ms: int, on_pid: OnPid | None) -> Iterator[Fact]:
        """It opened a node and is gone, or let go of it, before anybody looked: known by its open alone."""
        for node in self._nodes.values():
            if key and node.key == key and pid not in node.holders and procfs.stat(pid) is None:
                if on_pid is not None:
                    on_pid(pid)
                node.told = None
                yield from self._used(node, pid, now_ms)
                yield WayClosed(at_ms=now_ms, id=node.id, pid=pid)

    def _again(self, node: _Node, now_ms: int) -> Iterator[Fact]:
        """Those that are known to hold it: whether they still do, and then, how much it was used until now."""
        gone = [pid for pid, start in node.holders.items() if not _still(pid, start, node.path)]
        yield from self._used(node, next(iter(node.holders)), now_ms)
        for pid in gone:
            del node.holders[pid]
            self._look_soon(now_ms)  # a child may hold it now
            yield WayClosed(at_ms=now_ms, id=node.id, pid=pid)

    def _used(self, node: _Node, pid: int, now_ms: int) -> Iterator[Fact]:
        self._urbs.count()
        uses, sent = _requests(node), self._urbs.sent(node.device.id)
        if uses < 0 and node.told is not None:
            uses = node.told[0]  # pulled: nobody tells requests any more, but bytes
        if (uses, sent) == node.told:
            return
        node.told = uses, sent
        yield WayHeld(
            at_ms=now_ms,
            pid=pid,
            way=node.way,
            id=node.id,
            device=node.device.id,
            sent=sent,
            idle_sent=node.unsent or 0,
            since_ms=node.since_ms if sent is not None else None,
            uses=uses if uses >= 0 else None,
            idle_uses=node.idle if node.idle >= 0 else None,
        )

    def _serving(self, node: _Node, pid: int, now_ms: int) -> Iterator[Fact]:
        """The holder serves a file system: the one whose mount point it was given, else the only one that may be its own."""
        free = {dev for dev in self._fuse if not any(dev in each.served for each in self._nodes.values())}
        words = procfs.read(f"/proc/{pid}/cmdline").split(b"\0")
        mine = {dev for dev in free if self._fuse[dev].mount in {path_text(_absolute(pid, word)) for word in words if word}}
        for dev in mine or (free if len(free) == 1 else set()):
            node.served.append(dev)
            yield Plugged(at_ms=now_ms, device=structs.replace(node.device, nodes=[*node.device.nodes, *node.served]))


def _requests(node: _Node) -> int:
    """How many the kernel has sent to a device by now; -1 if it does not say."""
    text = procfs.read(f"{node.device.id}/urbnum").strip()
    return int(text) if text.isdigit() else -1


def _still(pid: int, start: int, path: bytes) -> bool:
    """Whether it is the same process yet, and holds the node yet."""
    stat = procfs.stat(pid)
    return stat is not None and stat.start == start and path in _devices(pid)[0]


def _devices(pid: int) -> tuple[set[bytes], bool]:
    """USB nodes that a process holds, and whether it serves a file system."""
    base = f"/proc/{pid}/fd"
    try:
        links = [procfs.link(f"{base}/{number}") for number in os.listdir(base)]
    except OSError:
        return set(), False
    return {link for link in links if link.startswith(_NODES)}, _FUSE in links


def _node_of(device: Device) -> bytes:
    """The node of a USB device, by the numbers that sysfs gives; empty for what is none."""
    if device.bus != "usb" or device.simulated:
        return b""
    numbers = [procfs.read(f"{device.id}/{name}").strip() for name in ("busnum", "devnum")]
    if not all(number.isdigit() for number in numbers):
        return b""
    return _NODES + b"%03d/%03d" % (int(numbers[0]), int(numbers[1]))


def _way(device: Device) -> str:
    """What leaves by a device that is used without a driver of the kernel's: by its interfaces' classes (usb.org)."""
    classes = {interface[:2] for interface in device.interfaces}
    if classes & {_IMAGE} or device.properties.get("ID_MTP_DEVICE") == "1" or device.properties.get("ID_GPHOTO2") == "1":
        return "mtp"
    return "print" if _PRINTER in classes else "usb"


def _absolute(pid: int, word: bytes) -> bytes:
    """A path as a process meant it. What lies there is not asked: a file system's own server may be asleep."""
    folder, name = os.path.split(os.path.join(procfs.link(f"/proc/{pid}/cwd"), word.rstrip(b"/")))  # noqa: PTH118
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118
