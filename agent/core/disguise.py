"""Is a device what it claims to be?

Question: what about it does not fit: with itself, with what is plugged in beside it, or with what was seen under its name
before? Owns: the reasons of `device.disguised` and how grave each is. Must not know OCSF, nor who is told.
From `devices` (what came, what is known) back to it.

Ordinary things are none: a headset or a receiver with keys carries no storage; a security key types and has no disk; a webcam,
modem or network adapter with a disk for its drivers does not type; a phone that changes its mode stays a phone. What is built
in, as the firmware says, is never one.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from agent.contract.codes import HIGH, LOW, MEDIUM, Decision
from agent.core import known as knowledge
from agent.core.facts import Device
from agent.core.known import Known, Memory
from agent.core.media import NO_SERIAL, Medium, clean
from agent.core.media import types as can_type

REASONS = {
    "types": "it stores data and types on a keyboard",
    "keyboard_after_medium": "a new keyboard appeared within seconds of a medium at the same port or hub",
    "interfaces_changed": "under this serial number it had other interfaces before",
    "cloned_serial": "two devices with this serial number are plugged in at once",
    "capacity_changed": "under this serial number it had another capacity before",
    "ids_changed": "this serial number was seen with another vendor or product id",
    "says_storage": "it types only, but its name or maker is one of storage",
}
"""Stable codes (`detail.reasons`), each with what it means."""

_TOGETHER_MS = 10_000
_MOST_RECENT = 32
_CARRIES = {"storage", "reader", "optical", "phone"}
_STORAGE, _INPUT, _NETWORK = "08", "03", frozenset({"02", "0a", "e0"})
_SAYS_STORAGE = re.compile(
    r"\b(flash ?(disk|drive)|usb ?(disk|stick|drive)|mass ?storage|memory ?stick|datatraveler|cruzer|jumpdrive)\b",
    re.IGNORECASE,
)
_MAKES_STORAGE_ONLY = {"0781": "SanDisk", "13fe": "Phison", "090c": "Silicon Motion", "8564": "Transcend", "05dc": "Lexar"}
"""Vendor ids (usb.org) of makers of whom no keyboard is known"""
_PORT = re.compile(r"(.*)/usb\d+(?:/.*)?/\d+-([\d.]+)$")


class Doubt(NamedTuple):
    """One thing that does not fit. `other` is the key of another device that has to do with it."""

    reason: str
    severity: int
    other: str = ""
    before: str = ""
    now: str = ""


class _Came(NamedTuple):
    at_ms: int
    id: str
    key: str
    carries: bool
    types: bool


class Disguises:
    """`look` at each device that came or changed; `memory` is what was known before."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._recent: deque[_Came] = deque(maxlen=_MOST_RECENT)

    def look(
        self,
        medium: Medium,
        device: Device,
        before: Known | None,
        others: list[Medium],
        at_ms: int,
        cold: bool,
        switched: bool,
        decision: Decision,
    ) -> Iterator[Doubt]:
        """What does not fit. `before` is what was known when it came, `others` are the other media present; `switched`: it is
        the same piece as one just gone from this port, in another mode."""
        if device.built_in:
            return
        carries, types = medium.kind in _CARRIES, can_type(device)
        if carries and types:
            yield Doubt("types", LOW if decision == "approved" else HIGH, now=" ".join(device.interfaces))
        if types and not carries and self._says_storage(medium):
            yield Doubt("says_storage", HIGH, now=medium.name)
        if before is not None and not switched:
            yield from self._changed(medium, device, before)
        if not medium.key.endswith(NO_SERIAL):
            twin = next((each for each in others if each.key == medium.key and each.id != medium.id), None)
            if twin is not None:
                yield Doubt("cloned_serial", MEDIUM, other=twin.key)
            other = self._memory.same_serial(medium) if before is None and not switched else ""
            if other and not (medium.kind == "phone" and other.split(":")[1:2] == [medium.vendor_id]):
                yield Doubt("ids_changed", MEDIUM, other=other)
        if not cold:
            came = _Came(at_ms, medium.id, medium.key, carries or _STORAGE in knowledge.classes(device), types)
            yield from self._beside(came, before)

    def _changed(self, medium: Medium, device: Device, before: Known) -> Iterator[Doubt]:
        now, was = set(knowledge.classes(device)), set(before.classes)
        gained = now - was
        grave = (_INPUT in gained and can_type(device)) or (gained & _NETWORK and medium.kind != "phone")
        if was and gained and (medium.kind != "phone" or grave) and not (before.types and _STORAGE not in gained):
            severity = HIGH if grave else MEDIUM
            yield Doubt("interfaces_changed", severity, before=" ".join(sorted(was)), now=" ".join(sorted(now)))
        size = knowledge.capacity(device)
        fixed = medium.kind == "storage" and not before.takes_cards and not medium.key.endswith(NO_SERIAL)
        if fixed and size and before.capacity and size != before.capacity:
            yield Doubt("capacity_changed", MEDIUM, before=str(before.capacity), now=str(size))

    def _beside(self, came: _Came, before: Known | None) -> Iterator[Doubt]:
        """What else came in these seconds: a keyboard and a medium at one port, or at one hub if that keyboard is new here."""
        mine = next((each for each in self._recent if each.id == came.id and each.key == came.key), None)
        if mine is not None:
            self._recent.remove(mine)
            came = came._replace(at_ms=mine.at_ms)
        for other in self._recent:
            if not 0 <= came.at_ms - other.at_ms <= _TOGETHER_MS or other.types == came.types or other.key == came.key:
                continue
            medium, keyboard = (other, came) if came.types else (came, other)
            if not medium.carries:
                continue
            new = before is None if keyboard is came else self._new(keyboard)
            if other.id == came.id:
                yield Doubt("keyboard_after_medium", HIGH, other=other.key)
            elif new and _hub(other.id) and _hub(other.id) == _hub(came.id):
                yield Doubt("keyboard_after_medium", MEDIUM, other=other.key)
        self._recent.append(came)

    def _new(self, keyboard: _Came) -> bool:
        known = self._memory.devices.get(keyboard.key)
        return known is None or known.first_ms >= keyboard.at_ms

    @staticmethod
    def _says_storage(medium: Medium) -> bool:
        return medium.vendor_id.lower() in _MAKES_STORAGE_ONLY or bool(_SAYS_STORAGE.search(clean(medium.name)))


def _hub(id: str) -> str:
    """Controller and hub that a USB device hangs on; the same for the two buses of one controller (USB 2 and 3)."""
    found = _PORT.match(id)
    return f"{found[1]}|{found[2].rpartition('.')[0]}" if found else ""
