"""One physical device in raw properties: from udev's database and sysfs(5) to `facts.Device`.

Owns: what of a device is read where: its names and serial, interfaces, block devices with what is stacked on them, network
interfaces, keys, the hubs between, whether it can be unplugged, since when it is there. Must not judge: what it is, and
whether that is any concern of ours, is the core's. A part of `udev.py`, which finds the device. Nothing is opened but sysfs.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyudev

from agent.core.facts import Block, Device

_KEPT = (
    "ID_MTP_DEVICE",
    "ID_GPHOTO2",
    "ID_CDROM",
    "ID_CDROM_MEDIA",
    "ID_DRIVE_FLASH_SD",
    "ID_DRIVE_THUMB",
    "ID_TYPE",
    "ID_INPUT_KEYBOARD",
    "DEVTYPE",
)
_SECTOR = 512
"""The unit of `size` and of the counters in `stat`, whatever the device's own sectors are"""
_LETTERS = 0xFFFFFFFE
"""Key codes 1 to 31 (input-event-codes.h): who has all of these has letters; udev's own rule for ID_INPUT_KEYBOARD"""
_MOST_BLOCKS = 64
_ATTRIBUTES = {
    "vendor": ("manufacturer", "vendor_name"),
    "model": ("product", "device_name"),
    "serial": ("serial", "unique_id"),
    "vendor_id": ("idVendor",),
    "product_id": ("idProduct",),
}
"""What USB and Thunderbolt call them in sysfs"""


def device(found: Any, bus: str, blocks: list[Any], since_ms: int | None, hotplugged: bool | None) -> Device:
    """What is known of `found`, a pyudev device, and of its block devices."""
    properties, attributes = found.properties, found.attributes
    disks = [block for block in blocks if block.device_type == "disk" and not _slaves(block)]
    sources = [*(block.properties for block in blocks), properties]
    kept = {key: str(source[key]) for source in sources for key in _KEPT if key in source}

    def attribute(field: str) -> str:
        texts = (attributes.get(name) or b"" for name in _ATTRIBUTES[field])
        return next((text for raw in texts if (text := raw.decode(errors="replace").strip())), "")

    removable = {disk.attributes.get("removable") for disk in disks} - {None}
    usb = found.subsystem == "usb"
    said = interfaces(found) if usb else []
    told = [_block(block) for block in blocks[:_MOST_BLOCKS]]
    return Device(
        id=found.sys_path,
        bus=bus,
        subsystem=found.subsystem or "",
        driver=properties.get("ID_USB_DRIVER", "") or found.driver or "",
        vendor=attribute("vendor") or properties.get("ID_VENDOR", ""),
        model=attribute("model") or properties.get("ID_MODEL", ""),
        serial=attribute("serial") or properties.get("ID_SERIAL_SHORT", ""),
        vendor_id=attribute("vendor_id") or properties.get("ID_VENDOR_ID", ""),
        product_id=attribute("product_id") or properties.get("ID_MODEL_ID", ""),
        interfaces=said,
        nodes=[each.node for each in told if each.node],
        removable=any(each.strip() == b"1" for each in removable) if removable else None,
        read_only=bool(disks) and all((disk.attributes.get("ro") or b"0").strip() == b"1" for disk in disks),
        properties=kept,
        blocks=told,
        networks=sorted({child.sys_name for child in found.children if child.subsystem == "net"}) if usb else [],
        port=found.sys_name if usb else "",
        hubs=list(_hubs(found)) if usb else [],
        built_in=_built_in(found),
        types=any(each.startswith("03") for each in said) and _has_letters(found),
        since_ms=since_ms,
        hotplugged=hotplugged,
    )


def interfaces(usb: Any) -> list[str]:
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


def with_stacked(context: pyudev.Context, blocks: list[Any]) -> list[Any]:
    """The block devices and what lies on them (LUKS, LVM: sysfs `holders`), nearest first."""
    found = [block for block in blocks if block.subsystem == "block"]
    for block in found:  # grows while it is walked, so stacks of any depth are followed
        holders = Path(block.sys_path) / "holders"
        for holder in sorted(holders.iterdir()) if holders.is_dir() else []:
            stacked = pyudev.Devices.from_name(context, "block", holder.name)
            if stacked not in found:
                found.append(stacked)
    return found


def lowest(context: pyudev.Context, block: Any) -> Any:
    """The disk that a mapped device (LUKS, LVM, md) lies on in the end, itself for one that lies on none."""
    for _ in range(16):
        below = _slaves(block)
        if not below:
            return block
        block = pyudev.Devices.from_name(context, "block", below[0])
        if block.device_type == "partition":
            block = block.find_parent("block", "disk") or block
    return block


def node(block: Any) -> str:
    """Its "major:minor"; empty for what is no block device."""
    number = block.device_number if block.subsystem == "block" else 0
    return f"{os.major(number)}:{os.minor(number)}" if number else ""


def transferred(told: Device) -> tuple[int, int] | None:
    """(bytes read from it, bytes written to it) since it was plugged in, by its disks and network interfaces (stat of
    /sys/block, Documentation/block/stat.rst); None if it has neither, or is gone."""
    read = written = 0
    disks = [block for block in told.blocks if block.kind == "disk" and not block.on]
    for block in disks:
        try:
            fields = Path("/sys/block", block.name.replace("/", "!"), "stat").read_bytes().split()
            read, written = read + int(fields[2]) * _SECTOR, written + int(fields[6]) * _SECTOR
        except (OSError, IndexError, ValueError):
            return None
    for name in told.networks:
        try:
            folder = Path("/sys/class/net", name, "statistics")
            read, written = read + int((folder / "rx_bytes").read_text()), written + int((folder / "tx_bytes").read_text())
        except (OSError, ValueError):
            return None
    return (read, written) if disks or told.networks else None


def _block(block: Any) -> Block:
    below, properties = _slaves(block), block.properties
    partition = block.device_type == "partition"
    on = Path(block.sys_path).parent.name if partition else below[0] if below else ""
    uuid = (block.attributes.get("dm/uuid") or b"").decode(errors="replace")
    kind = uuid.partition("-")[0].lower() if uuid else "partition" if partition else "disk" if not below else "stacked"
    size = (block.attributes.get("size") or b"").strip()
    return Block(
        name=(block.attributes.get("dm/name") or b"").decode(errors="replace").strip() or block.sys_name,
        node=node(block),
        kind=kind,
        on=on,
        size=int(size) * _SECTOR if size.isdigit() else None,
        fs=properties.get("ID_FS_TYPE", ""),
        fs_uuid=properties.get("ID_FS_UUID", ""),
        label=properties.get("ID_FS_LABEL", ""),
    )


def _slaves(block: Any) -> list[str]:
    try:
        return sorted(os.listdir(f"{block.sys_path}/slaves"))  # noqa: PTH208 (text is all that is wanted)
    except OSError:
        return []


def _hubs(usb: Any) -> Iterator[str]:
    """Names of the hubs between the device and the machine's own."""
    above = usb.find_parent("usb", "usb_device")
    while above is not None and not above.sys_name.startswith("usb"):
        texts = ((above.attributes.get(name) or b"").decode(errors="replace").strip() for name in ("manufacturer", "product"))
        yield " ".join(text for text in texts if text) or above.sys_name
        above = above.find_parent("usb", "usb_device")


def _built_in(found: Any) -> bool | None:
    """Whether the firmware says that it is fixed (sysfs `removable`): of a USB device itself, of others by the PCI devices
    above, of which one that can be taken out is enough."""
    said, usb = set[bytes](), found.subsystem == "usb"
    while found is not None:
        if found.subsystem in ("usb", "pci"):
            said.add((found.attributes.get("removable") or b"").strip())
        found = None if usb else found.parent
    return False if b"removable" in said else True if b"fixed" in said else None


def _has_letters(usb: Any) -> bool:
    folder = Path(usb.sys_path)
    for depth in ("*:*/input/input*", "*:*/*/input/input*"):
        for keys in folder.glob(f"{depth}/capabilities/key"):
            try:
                words = keys.read_text().split()
                if words and int(words[-1], 16) & _LETTERS == _LETTERS:
                    return True
            except (OSError, ValueError):
                continue  # it goes, or says nothing of its keys
    return False
