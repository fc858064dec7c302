"""What this machine knows of devices and people from before: is this the very piece it seems to be, and is it the first one?

Question: by what is a device told from others of its kind, and does that agree with what was seen under its key? Owns: a
bounded memory over restarts, one record a key (when, which interfaces, how large, which file systems, whether several pieces
share the key), and who has used a medium. Must not know what a difference means (`disguise`), nor events.
From `presence` (what is there) to `disguise` and the story of a device.

A serial number is worth something only if no two pieces have it. So an identity is `serial`, `shared_serial` once two pieces
were seen under one key, or `no_serial`; and it says what it was recognised by.
"""

from typing import Literal

import msgspec
from msgspec import Struct

from agent.core.facts import Device
from agent.core.media import NO_SERIAL, Medium, clean, types

Identity = Literal["serial", "shared_serial", "no_serial"]

MOST_BYTES = (1 << 63) - 1
"""What a device claims to hold may be any number; more than this is kept as this"""
_MOST_KNOWN = 500
_MOST_PEOPLE = 2_000
_MOST_FILE_SYSTEMS = 8
_LONG_SERIAL = 10
"""Shorter ones are given by many makers; the same one under other ids is no wonder"""


class Known(Struct, array_like=True):
    """What was seen under one key. `classes` are those of its USB interfaces, `capacity` that of its disks in bytes (0: never
    seen, or it takes cards)."""

    first_ms: int
    last_ms: int
    kind: str
    classes: list[str]
    capacity: int = 0
    file_systems: list[str] = []
    shared: bool = False
    takes_cards: bool = False
    types: bool = False


class _Kept(Struct, array_like=True):
    devices: dict[str, Known]
    people: dict[str, int]


class Memory:
    """The records by key, oldest use first. `changed` tells that there is something new to keep."""

    def __init__(self) -> None:
        self.devices: dict[str, Known] = {}
        self._people: dict[str, int] = {}
        self._serials: dict[str, str] = {}
        self.changed = False

    def __len__(self) -> int:
        """How many keys are known."""
        return len(self.devices)

    def of(self, medium: Medium) -> Known | None:
        """What is known of its key from before."""
        return self.devices.get(medium.key)

    def identity(self, medium: Medium) -> Identity:
        """How sure it is that a key names one piece."""
        if medium.key.endswith(NO_SERIAL):
            return "no_serial"
        known = self.devices.get(medium.key)
        return "shared_serial" if known is not None and known.shared else "serial"

    def same_serial(self, medium: Medium) -> str:
        """The key under which the same long serial number was seen with other ids; empty if there is none."""
        serial = medium.serial.lower()
        other = self._serials.get(serial, "") if len(serial) >= _LONG_SERIAL and len(set(serial)) > 3 else ""
        return other if other != medium.key and not medium.key.endswith(NO_SERIAL) else ""

    def learn(self, medium: Medium, device: Device, at_ms: int) -> None:
        """It is as it is: from now on that is what is known of it."""
        known = self.devices.pop(medium.key, None) or Known(at_ms, at_ms, medium.kind, [])
        self.devices[medium.key] = known
        known.last_ms, known.kind = at_ms, medium.kind
        known.classes = sorted(set(classes(device)) or set(known.classes))
        known.types = known.types or types(device)
        known.takes_cards = known.takes_cards or medium.kind in ("reader", "optical")
        known.capacity = capacity(device) or known.capacity
        known.file_systems = list(dict.fromkeys([*file_systems(device), *known.file_systems]))[:_MOST_FILE_SYSTEMS]
        if not medium.key.endswith(NO_SERIAL):
            self._serials[medium.serial.lower()] = medium.key
        self._trim()
        self.changed = True

    def share(self, medium: Medium) -> None:
        """Two pieces have this key."""
        known = self.devices.get(medium.key)
        if known is not None and not known.shared:
            known.shared = self.changed = True

    def first_use(self, uid: int, at_ms: int) -> bool:
        """Whether this person uses a medium on this machine for the first time; from now on not any more."""
        if str(uid) in self._people:
            return False
        self._people[str(uid)] = at_ms
        if len(self._people) > _MOST_PEOPLE:
            del self._people[next(iter(self._people))]
        self.changed = True
        return True

    def to_bytes(self) -> bytes:
        """What is kept over a restart."""
        return msgspec.msgpack.encode(_Kept(self.devices, self._people))

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if data:
            kept = msgspec.msgpack.decode(data, type=_Kept)
            self.devices, self._people = kept.devices, kept.people
            self._serials = {key.rpartition(":")[2].lower(): key for key in self.devices if not key.endswith(NO_SERIAL)}

    def _trim(self) -> None:
        while len(self.devices) > _MOST_KNOWN:
            oldest = next(iter(self.devices))
            del self.devices[oldest]
            self._serials = {serial: key for serial, key in self._serials.items() if key != oldest}


def recognised_by(medium: Medium, device: Device) -> list[str]:
    """By what this piece can be told from others, as far as it shows."""
    by = {
        "ids": bool(medium.vendor_id or medium.vendor),
        "serial": not medium.key.endswith(NO_SERIAL),
        "interfaces": bool(device.interfaces),
        "capacity": bool(capacity(device)),
        "file_system": bool(file_systems(device)),
    }
    return [name for name, there in by.items() if there]


def classes(device: Device) -> list[str]:
    """The classes of its USB interfaces, each once."""
    return sorted({clean(each[:2].lower()) for each in device.interfaces})


def capacity(device: Device) -> int:
    """Bytes that fit on its disks; 0 if it has none, or none with anything in it."""
    return min(sum(each.size or 0 for each in device.blocks if each.kind == "disk" and not each.on), MOST_BYTES)


def file_systems(device: Device) -> list[str]:
    """UUIDs of the file systems on it."""
    return [clean(each.fs_uuid) for each in device.blocks if each.fs_uuid][:_MOST_FILE_SYSTEMS]
