"""What is plugged in, by udev (pyudev): raw properties of each device that could carry data.

Owns: finding, for a block device or a USB device that appears, the one physical device it belongs to, and telling that
device with all its block nodes. Told again when its partitions appear. Must not judge: whether it is a medium at all,
and of which kind, is `core/media.py`'s. Device ids are sysfs paths (sysfs(5)).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyudev

from agent.core.facts import Coverage, Device, Fact, Plugged, Unplugged

_SUBSYSTEMS = ("usb", "block", "thunderbolt", "bluetooth", "mmc")
_KEPT = (
    "ID_MTP_DEVICE",
    "ID_GPHOTO2",
    "ID_CDROM",
    "ID_DRIVE_FLASH_SD",
    "ID_DRIVE_THUMB",
    "ID_TYPE",
    "ID_INPUT_KEYBOARD",
    "DEVTYPE",
)
_USB_HUB = "09"


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
            elif device.action in ("add", "change", "bind", "online"):
                yield from self._appeared(device, now_ms)

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
            said = self._physical(device)
        except (pyudev.DeviceNotFoundError, OSError, KeyError):
            return  # it went away while it was being looked at; its removal follows
        if said is not None and self._told.get(said.id) != said:
            self._told[said.id] = said
            yield Plugged(at_ms=now_ms, device=said, cold=self._cold)

    def _gone(self, device: Any, now_ms: int) -> Iterator[Fact]:
        if device.sys_path in self._told:
            del self._told[device.sys_path]
            yield Unplugged(at_ms=now_ms, id=device.sys_path)
            return
        node = _node(device)
        for told in self._told.values():
            if node and node in told.nodes:
                told.nodes = [other for other in told.nodes if other != node]
                yield Plugged(at_ms=now_ms, device=told)

    def _physical(self, device: Any) -> Device | None:
        """The device that a person would hold in the hand, or None if it can't carry data or is a part of the machine."""
        usb = device if device.device_type == "usb_device" else device.find_parent("usb", "usb_device")
        if usb is not None:
            interfaces = _interfaces(usb)
            if interfaces and all(each.startswith(_USB_HUB) for each in interfaces):
                return None
            return _describe(usb, "usb", _blocks_below(self._context, usb), interfaces)
        if device.subsystem == "block":
            disk = device if device.device_type == "disk" else device.find_parent("block", "disk")
            if disk is None or not (Path(disk.sys_path) / "device").exists():
                return None  # loop, dm, zram, md: not a device of its own; what is stacked is told with what it lies on
            bus = disk.properties.get("ID_BUS", "") or Path(disk.sys_path, "device").resolve().parent.name.split(":")[0]
            return _describe(disk, bus, _with_stacked(self._context, [disk, *disk.children]), [])
        if device.subsystem in ("thunderbolt", "bluetooth") and device.device_type in ("thunderbolt_device", "host", "link"):
            return _describe(device, device.subsystem, [], [])
        return None


def _describe(device: Any, bus: str, blocks: list[Any], interfaces: list[str]) -> Device:
    properties = device.properties
    attributes = device.attributes
    disk = next((block for block in blocks if block.device_type == "disk"), None)
    kept = {key: str(source[key]) for source in [*(b.properties for b in blocks), properties] for key in _KEPT if key in source}

    def attribute(name: str) -> str:
        return str(attributes.get(name, b"").decode(errors="replace")).strip() if attributes.get(name) else ""

    removable = disk.attributes.get("removable") if disk is not None else None
    return Device(
        id=device.sys_path,
        bus=bus,
        subsystem=device.subsystem or "",
        driver=properties.get("ID_USB_DRIVER", "") or device.driver or "",
        vendor=attribute("manufacturer") or properties.get("ID_VENDOR", ""),
        model=attribute("product") or properties.get("ID_MODEL", ""),
        serial=attribute("serial") or properties.get("ID_SERIAL_SHORT", ""),
        vendor_id=attribute("idVendor") or properties.get("ID_VENDOR_ID", ""),
        product_id=attribute("idProduct") or properties.get("ID_MODEL_ID", ""),
        interfaces=interfaces,
        nodes=[node for node in map(_node, blocks) if node],
        removable=None if removable is None else removable.strip() == b"1",
        read_only=disk is not None and (disk.attributes.get("ro") or b"0").strip() == b"1",
        properties=kept,
    )


def _interfaces(usb: Any) -> list[str]:
    """ ":080650:030101:" (udev) or the interface folders (kernel) → ["08:06:50", "03:01:01"]."""
    packed = usb.properties.get("ID_USB_INTERFACES", "")
    if packed:
        return [f"{each[:2]}:{each[2:4]}:{each[4:6]}" for each in packed.strip(":").split(":") if len(each) == 6]
    found = []
    for folder in sorted(Path(usb.sys_path).glob("*:*")):
        try:
            parts = [(folder / f"bInterface{part}").read_text().strip() for part in ("Class", "SubClass", "Protocol")]
        except OSError:
            continue
        found.append(":".join(parts))
    return found


def _blocks_below(context: pyudev.Context, usb: Any) -> list[Any]:
    return _with_stacked(context, [child for child in usb.children if child.subsystem == "block"])


def _with_stacked(context: pyudev.Context, blocks: list[Any]) -> list[Any]:
    """The block devices and what lies on them (LUKS, LVM: sysfs `holders`), nearest first."""
    found = [block for block in blocks if block.subsystem == "block"]
    for block in found:  # grows while it is walked, so stacks of any depth are followed
        holders = Path(block.sys_path) / "holders"
        for holder in sorted(holders.iterdir()) if holders.is_dir() else []:
            stacked = pyudev.Devices.from_name(context, "block", holder.name)
            if stacked not in found:
                found.append(stacked)
    return found


def _node(block: Any) -> str:
    number = block.device_number if block.subsystem == "block" else 0
    return f"{os.major(number)}:{os.minor(number)}" if number else ""
