"""An export of udev's database (`udevadm info --export-db`) as approvals: the media that a machine had when it was made.

Owns: the export's lines (P path, E property; a record ends with an empty line) and which devices of it are media that a
register can name: USB devices with storage or still-image interfaces. Pure. Must not know: files, the collector. Fixed parts of
the machine (hubs, keyboards, disks on SATA or NVMe) are left out; of a card the export lacks what its key is made of.
"""

import re
from collections.abc import Iterator

from msgspec import Struct

from agent.contract.mediakey import key_of

_STORES = re.compile(r":(08|06)[0-9a-f]{4}(?=:)")


class Device(Struct, frozen=True):
    """A medium of an export: on which line it begins, its key ("": of a card, which the export does not tell), its name."""

    line: int
    key: str
    name: str


def records(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The properties of each device, with the line it begins on; its path is "P"."""
    said: dict[str, str] = {}
    began = 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not line.strip():
            if said:
                yield began, said
            said, began = {}, 0
            continue
        kind, _, rest = line.partition(": ")
        began = began or number
        if kind == "P":
            said["P"] = rest
        elif kind == "E" and "=" in rest:
            name, _, value = rest.partition("=")
            said[name] = value


def read(text: str) -> Iterator[Device]:
    """The media of an export, each once."""
    seen: set[str] = set()
    for line, said in records(text):
        if not _is_medium(said):
            continue
        key = _key(said)
        if not key or key not in seen:
            seen.add(key)
            spoken = f"{said.get('ID_VENDOR', '')} {said.get('ID_MODEL') or said.get('ID_NAME', '')}".replace("_", " ")
            yield Device(line, key, " ".join(spoken.split()) or said.get("P", "").rpartition("/")[2])


def _is_medium(said: dict[str, str]) -> bool:
    """Whether it is something to plug in that carries data."""
    if said.get("SUBSYSTEM") == "usb" and said.get("DEVTYPE") == "usb_device":
        return _STORES.search(f"{said.get('ID_USB_INTERFACES', '')}:") is not None
    return said.get("SUBSYSTEM") == "block" and said.get("DEVTYPE") == "disk" and said.get("ID_DRIVE_FLASH_SD") == "1"


def _key(said: dict[str, str]) -> str:
    """The key of a medium, "" if the export does not tell what it is made of. The kernel writes PRODUCT without zeros."""
    product = re.match(r"([0-9a-f]{1,4})/([0-9a-f]{1,4})/", said.get("PRODUCT", ""))
    vendor, model = (each.zfill(4) for each in product.groups()) if product else ("", "")
    vendor, model = said.get("ID_VENDOR_ID", vendor), said.get("ID_MODEL_ID", model)
    if said.get("SUBSYSTEM") != "usb" or not vendor or not model:
        return ""
    return key_of("usb", "", "", said.get("ID_SERIAL_SHORT", ""), vendor, model)
