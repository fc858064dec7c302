"""What is plugged in, by udev (pyudev): raw properties of each device that could carry data.

Owns: finding, for a block device, a USB device or a part of one that appears, the one physical device it belongs to, and
telling that device with all that is known of it (`describe.py`). Told again when that changed: partitions, a card, a mapped
device. And how much went over it, every few seconds, since its counters go with it. Must not judge: whether it is a medium
at all, and of which kind, is `core/media.py`'s. Device ids are sysfs paths (sysfs(5)).

A device was there at the machine's start if udev set it up in the same sweep as the machine's own (USEC_INITIALIZED).
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyudev
from msgspec import structs

from agent.core.facts import Coverage, Device, Fact, Plugged, Transferred, Unplugged
from agent.sense import describe

_SUBSYSTEMS = ("usb", "block", "thunderbolt", "bluetooth", "mmc", "input", "net")
_USB_HUB = "09"
_FAR = {"tcp", "rdma", "fc"}
"""Transports of NVMe that lead to another machine"""
_COUNT_EVERY_MS = 5_000
_SWEEP_US = 15_000_000
"""So long udev takes at most to set up all that is there at the start"""
_START_US = 60_000_000
"""Taken for the start of a machine on which nothing tells how long that took"""


class Udev:
    """A Sensor over the udev monitor socket. `drain` tells what was there before on its first call, as `cold`."""

    def __init__(self) -> None:
        self._context = pyudev.Context()
        self._settled = Path("/run/udev/control").exists()
        self._monitor = pyudev.Monitor.from_netlink(self._context, "udev" if self._settled else "kernel")
        for subsystem in _SUBSYSTEMS:
            self._monitor.filter_by(subsystem)
        with contextlib.suppress(OSError):  # SO_RCVBUFFORCE needs CAP_NET_ADMIN; the default does for a few devices
            self._monitor.set_receive_buffer_size(4 << 20)
        self._monitor.start()
        self._told: dict[str, Device] = {}
        self._since: dict[str, tuple[int | None, bool | None]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._counted_ms = 0
        self._started_us = self._start()
        self._cold = True

    def fileno(self) -> int:
        """The monitor's netlink socket."""
        return int(self._monitor.fileno())

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """Plugged and Unplugged since the last call; the first call starts with all that is there."""
        if self._cold:
            for subsystem in _SUBSYSTEMS:
                for device in self._context.list_devices(subsystem=subsystem):
                    yield from self._appeared(device, now_ms)
            self._cold = False
        while (device := self._monitor.poll(timeout=0)) is not None:
            if device.action == "remove":
                yield from self._gone(device, now_ms)
            elif device.action in ("add", "change", "bind", "online", "move"):
                yield from self._appeared(device, now_ms)

    def count(self, now_ms: int) -> Iterator[Fact]:
        """How much went over each device, if it is time to ask; nothing for what carried nothing since."""
        if 0 <= now_ms - self._counted_ms < _COUNT_EVERY_MS:
            return
        self._counted_ms = now_ms
        for told in list(self._told.values()):
            brought = told.bus == "usb" or told.hotplugged or told.removable
            amount = describe.transferred(told) if brought else None
            if amount is not None and amount != self._counted.get(told.id):
                self._counted[told.id] = amount
                yield Transferred(at_ms=now_ms, id=told.id, bytes_in=amount[0], bytes_out=amount[1])

    def coverage(self, now_ms: int) -> Coverage:
        """Without udevd the kernel's own messages are used, which lack names and file systems."""
        why = "" if self._settled else "systemd-udevd does not run here; devices are told by the kernel's bare messages"
        blind = [] if self._settled else ["device_properties"]
        return Coverage(at_ms=now_ms, sensor="udev", ok=True, sees=["devices"], blind=blind, why=why)

    def close(self) -> None:
        """Nothing to give back but the socket, which goes with the monitor."""
        self._told.clear()

    def _appeared(self, device: Any, now_ms: int) -> Iterator[Fact]:
        try:
            said = self._physical(device, now_ms)
        except (pyudev.DeviceNotFoundError, OSError, KeyError):
            return  # it went away while it was being looked at; its removal follows
        if said is None and device.sys_path in self._told:  # nothing is connected to it any more (nbd)
            yield from self._gone(device, now_ms)
        elif said is not None and self._told.get(said.id) != said:
            self._told[said.id] = said
            yield Plugged(at_ms=now_ms, device=said, cold=self._cold)

    def _gone(self, device: Any, now_ms: int) -> Iterator[Fact]:
        if device.sys_path in self._told:
            del self._told[device.sys_path]
            self._since.pop(device.sys_path, None)
            self._counted.pop(device.sys_path, None)
            yield Unplugged(at_ms=now_ms, id=device.sys_path)
            return
        node = describe.node(device)
        for told in [told for told in self._told.values() if node and node in told.nodes]:
            nodes, blocks = [each for each in told.nodes if each != node], [each for each in told.blocks if each.node != node]
            self._told[told.id] = structs.replace(told, nodes=nodes, blocks=blocks)
            yield Plugged(at_ms=now_ms, device=self._told[told.id])

    def _physical(self, device: Any, now_ms: int) -> Device | None:
        """The device that a person would hold in the hand, or None if it can't carry data or is a part of the machine."""
        if device.subsystem == "block" and device.device_type == "disk":
            device = describe.lowest(self._context, device)
        usb = device if device.device_type == "usb_device" else device.find_parent("usb", "usb_device")
        if usb is not None:
            interfaces = describe.interfaces(usb)
            if interfaces and all(each.startswith(_USB_HUB) for each in interfaces):
                return None
            children = [child for child in usb.children if child.subsystem == "block"]
            return self._describe(usb, "usb", describe.with_stacked(self._context, children), now_ms)
        if device.subsystem == "block":
            disk = device if device.device_type == "disk" else device.find_parent("block", "disk")
            if disk is None or not (bus := _bus(disk)):
                return None
            return self._describe(disk, bus, describe.with_stacked(self._context, [disk, *disk.children]), now_ms)
        if device.subsystem == "thunderbolt" and device.device_type == "thunderbolt_device":
            own = device.sys_name.endswith("-0")  # route 0: the machine's own controller
            return None if own else self._describe(device, "thunderbolt", [], now_ms)
        if device.subsystem == "bluetooth" and device.device_type in ("host", "link"):
            return self._describe(device, "bluetooth", [], now_ms)
        return None

    def _describe(self, device: Any, bus: str, blocks: list[Any], now_ms: int) -> Device:
        since = self._since.get(device.sys_path)
        if since is None:
            since = self._since[device.sys_path] = self._when(device, now_ms)
        return describe.device(device, bus, blocks, *since)

    def _when(self, device: Any, now_ms: int) -> tuple[int | None, bool | None]:
        """(since when it is there, whether it came while the machine ran). Times that the machine slept through are not counted
        by the kernel, so what came before a sleep seems to have come later by that."""
        if not self._cold:
            return now_ms, True
        text = device.properties.get("USEC_INITIALIZED", "")
        if not text.isdigit():
            return None, None
        since_us = int(text)
        return now_ms - max(0, time.monotonic_ns() // 1_000 - since_us) // 1_000, since_us > self._started_us

    def _start(self) -> int:
        """Until when after boot udev was at setting up what was there: /dev/null is set up in the same sweep."""
        try:
            text = pyudev.Devices.from_name(self._context, "mem", "null").properties.get("USEC_INITIALIZED", "")
        except pyudev.DeviceNotFoundError:
            text = ""
        return int(text) + _SWEEP_US if text.isdigit() else _START_US


def _bus(disk: Any) -> str:
    """What a disk hangs on; empty for what is no device of its own: loop, zram, dm and md are told with what they lie on."""
    folder = Path(disk.sys_path)
    if disk.sys_name.startswith("nbd"):
        return "nbd" if (disk.attributes.get("size") or b"0").strip() != b"0" else ""
    if not (folder / "device").exists():
        return ""
    if "/session" in disk.sys_path:
        return "iscsi"
    transports = {_text(each) for each in (folder / "device").glob("transport")}
    transports |= {_text(each) for each in (folder / "device").glob("nvme*/transport")}
    if far := sorted(transports & _FAR):
        return f"nvme-{far[0]}"
    return disk.properties.get("ID_BUS", "") or (folder / "device").resolve().parent.name.split(":")[0]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
