"""The story of each thing that is plugged in: since when, in which modes, with which block devices, where mounted, how much.

Question: what happened to this device from its attachment to its end, also while the agent did not look? Owns: one record a
device that is present, kept over restarts; which of several attachments belong to one story (a phone that changes its mode);
what of it is said when it comes and when it goes. Must not know approvals, OCSF or findings.

`since` tells how a device came that was there when the agent began: `boot` (with the machine), `agent_down` (while no agent
ran), `earlier_run` (an agent before this one told it), `unknown`. Absent: it came before the agent's eyes. A device that went
while no agent ran is told as detached, with its time unknown.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct, structs

from agent.contract.event import BlockInfo
from agent.core.facts import Block, Device
from agent.core.known import MOST_BYTES
from agent.core.media import Medium, clean, clean_path, empty, types

_SWITCH_MS = 30_000
_MOST_ENDED = 16
_MOST_KEPT = 200
_MOST_LISTED = 32

_BLOCK_TEXTS = ("name", "node", "kind", "on", "fs", "fs_uuid", "label")
_DEVICE_TEXTS = (
    "id",
    "bus",
    "subsystem",
    "driver",
    "vendor",
    "model",
    "serial",
    "vendor_id",
    "product_id",
    "declared_kind",
    "port",
)
_MODES: dict[str, Callable[[Device], bool]] = {
    "mtp": lambda device: device.properties.get("ID_MTP_DEVICE") == "1",
    "ptp": lambda device: _has(device, "06:01:01") and device.properties.get("ID_MTP_DEVICE") != "1",
    "mass_storage": lambda device: _has(device, "08:"),
    "rndis": lambda device: _has(device, "e0:01:03", "02:02:ff", "ef:04:01"),
    "ncm": lambda device: _has(device, "02:0d:"),
    "ecm": lambda device: _has(device, "02:06:"),
    "modem": lambda device: _has(device, "02:02:01", "02:0e:"),
    "bluetooth": lambda device: _has(device, "e0:01:01"),
    "adb": lambda device: _has(device, "ff:42:01"),
    "keyboard": types,
    "smart_card": lambda device: _has(device, "0b:"),
}
"""What a USB device offers, by its interfaces (usb.org class codes; Android's ADB is vendor-specific 42:01)."""


class Presence(Struct, kw_only=True):
    """One device that is there. `story` is the uid of the event that told its first attachment."""

    medium: Medium
    device: Device
    blocks: list[Block] = []
    """All that it had since it, or the card in it, came: the kernel takes them away one by one before the device itself"""
    at_ms: int
    story: str = ""
    since: str = ""
    since_ms: int = 0
    boot: str = ""
    told: bool = True
    loaded: bool | None = None
    loaded_ms: int = 0
    """When the card or disc in it came"""
    bytes_in: int | None = None
    bytes_out: int | None = None
    base: tuple[int, int] = (0, 0)
    """What had gone over it when the card or disc came"""
    requests: int | None = None
    mounts: list[str] = []
    doubts: list[str] = []
    """Reasons for which it was told as disguised, in the finding `finding`"""
    finding: str = ""


class Presences:
    """All that is present. `changed` tells that there is something new to keep."""

    def __init__(self) -> None:
        self.here: dict[str, Presence] = {}
        self._ended: list[tuple[int, Presence]] = []
        self._boot = ""
        self.changed = False

    def started(self, boot: str) -> None:
        """An agent begins: nothing of what is remembered is known to be there yet."""
        self._boot = boot
        for presence in self.here.values():
            presence.told = False

    def attached(self, medium: Medium, device: Device, at_ms: int, cold: bool) -> tuple[Presence, Presence | None]:
        """(its record from now on, that of the mode it was in before if it only changed that)."""
        before = self.here.pop(medium.id, None)
        presence = Presence(medium=medium, device=_cleaned(device), at_ms=at_ms, boot=self._boot)
        presence.since_ms = at_ms if device.since_ms is None else device.since_ms
        if cold:
            presence.since = {None: "unknown", False: "boot", True: "agent_down"}[device.hotplugged]
        if cold and before is not None and before.medium.key == medium.key and before.boot == self._boot:
            presence.since, presence.story, presence.at_ms = "earlier_run", before.story, before.at_ms
            presence.since_ms, presence.base, presence.mounts = before.since_ms, before.base, before.mounts
            presence.loaded_ms, presence.doubts, presence.finding = before.loaded_ms, before.doubts, before.finding
        switched = self._switched(presence, at_ms)
        if switched is not None:
            presence.story, presence.at_ms, presence.since_ms = switched.story, switched.at_ms, switched.since_ms
        self.here[medium.id] = presence
        self.update(presence, medium, device, at_ms)
        while len(self.here) > _MOST_KEPT:
            del self.here[next(iter(self.here))]
        return presence, switched

    def update(self, presence: Presence, medium: Medium, device: Device, at_ms: int) -> str:
        """It changed: "in" if a card or disc came into it, "out" if it went, else empty."""
        was, takes = presence.loaded, medium.kind in ("reader", "optical")
        device = _cleaned(device)
        presence.medium, presence.device = medium, device
        now = {each.name: each for each in device.blocks}
        shows = device.properties.get("ID_CDROM") == "1" if medium.kind == "optical" else bool(device.blocks)
        presence.loaded = not empty(device) if takes and shows else None
        self.changed = True
        if was is None or presence.loaded is None or was == presence.loaded:
            gone = [each for each in presence.blocks if each.name not in now]
            presence.blocks = [*device.blocks, *gone][:_MOST_LISTED]
            return ""
        if presence.loaded:
            presence.blocks = device.blocks[:_MOST_LISTED]
            presence.loaded_ms, presence.base = at_ms, (presence.bytes_in or 0, presence.bytes_out or 0)
        return "in" if presence.loaded else "out"

    def detached(self, id: str, at_ms: int) -> Presence | None:
        """It is gone."""
        presence = self.here.pop(id, None)
        if presence is not None:
            self._ended = [*self._ended[-_MOST_ENDED + 1 :], (at_ms, presence)]
            self.changed = True
        return presence

    def untold(self) -> Iterator[Presence]:
        """Those that an earlier run told and that are not there any more; they are forgotten."""
        for presence in [each for each in self.here.values() if not each.told]:
            del self.here[presence.medium.id]
            self.changed = True
            yield presence

    def mounted(self, id: str, mount: str) -> None:
        """A file system of it appeared at `mount`."""
        presence = self.here.get(id)
        if presence is not None and mount not in presence.mounts:
            presence.mounts = [*presence.mounts[-_MOST_LISTED + 1 :], mount]
            self.changed = True

    def transferred(self, id: str, bytes_in: int, bytes_out: int) -> None:
        """So many bytes went over it since it was plugged in."""
        presence = self.here.get(id)
        if presence is not None:
            presence.bytes_in, presence.bytes_out = bytes_in, bytes_out

    def used(self, id: str, requests: int | None) -> None:
        """So many requests it was sent (a phone held by a program: nobody counts its bytes)."""
        presence = self.here.get(id)
        if presence is not None and requests is not None:
            presence.requests = requests

    def _switched(self, presence: Presence, at_ms: int) -> Presence | None:
        """The same piece left this very port a moment ago, and is back in another mode."""
        new = presence.medium
        for ended_ms, ended in reversed(self._ended):
            old = ended.medium
            same = old.id == new.id and old.vendor_id == new.vendor_id and old.serial == new.serial and old.serial != ""
            if same and 0 <= at_ms - ended_ms <= _SWITCH_MS and modes(ended.device) != modes(presence.device):
                return ended
        return None

    def to_bytes(self) -> bytes:
        """What is kept over a restart, but for what has a name that is no text."""
        kept = [each for each in self.here.values() if all(map(_is_text, (each.medium.id, *each.medium.nodes, *each.mounts)))]
        return msgspec.msgpack.encode(kept)

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if data:
            self.here = {each.medium.id: each for each in msgspec.msgpack.decode(data, type=list[Presence])}


def coming(presence: Presence) -> dict[str, Any]:
    """What the event of an attachment says beside the medium: fields of `event.MediumInfo`."""
    device = presence.device
    said: dict[str, Any] = {"story": presence.story, "since": presence.since, "port": clean(device.port)}
    said |= {"since_ms": presence.since_ms if presence.since else 0, "modes": modes(device)}
    said |= {"hubs": [clean(each) for each in device.hubs[:_MOST_LISTED]], "blocks": [_block(each) for each in device.blocks]}
    said |= {"networks": [clean(each) for each in device.networks[:_MOST_LISTED]]}
    return {name: value for name, value in said.items() if value} | ({"empty": True} if presence.loaded is False else {})


def going(presence: Presence, at_ms: int | None) -> dict[str, Any]:
    """What the event of its end says; `at_ms` None: nobody knows when that was."""
    said = coming(whole(presence)) | ({"mounts": presence.mounts} if presence.mounts else {})
    if at_ms is not None:
        said["present_ms"] = max(0, at_ms - presence.since_ms)
    return said | amounts(presence)


def whole(presence: Presence) -> Presence:
    """The same with all block devices that it had."""
    return structs.replace(presence, device=structs.replace(presence.device, blocks=presence.blocks))


def amounts(presence: Presence) -> dict[str, Any]:
    """How much went over it, as far as anybody counts."""
    said: dict[str, Any] = {} if presence.requests is None else {"usb_requests": presence.requests}
    if presence.bytes_in is not None and presence.bytes_out is not None:
        said |= {"bytes_in": presence.bytes_in, "bytes_out": presence.bytes_out}
    return said


def modes(device: Device) -> list[str]:
    """What a USB device offers, each by its name in `_MODES`."""
    return [mode for mode, offers in _MODES.items() if offers(device)]


def _cleaned(device: Device) -> Device:
    """The same, bounded, without what a stranger may have put into its strings."""
    blocks = [Block(size=_bounded(each.size), **_texts(each, *_BLOCK_TEXTS)) for each in device.blocks[:_MOST_LISTED]]
    cleaned = structs.replace(device, blocks=blocks, nodes=[], **_texts(device, *_DEVICE_TEXTS))
    for name in ("interfaces", "networks", "hubs"):
        setattr(cleaned, name, [clean(each) for each in getattr(device, name)[:_MOST_LISTED]])
    cleaned.properties = {clean(name): clean(value) for name, value in list(device.properties.items())[:_MOST_LISTED]}
    return cleaned


def _texts(source: Struct, *names: str) -> dict[str, Any]:
    return {name: clean(getattr(source, name)) for name in names}


def _bounded(size: int | None) -> int | None:
    return None if size is None else min(size, MOST_BYTES)


def _is_text(name: str) -> bool:
    return clean_path(name) == name


def _block(block: Block) -> BlockInfo:
    told = BlockInfo(name=clean(block.name))
    for name in ("kind", "on", "fs", "fs_uuid", "label"):
        if text := clean(getattr(block, name)):
            setattr(told, name, text)
    if block.size is not None:
        told.size = block.size
    return told


def _has(device: Device, *beginnings: str) -> bool:
    return any(each.lower().startswith(beginnings) for each in device.interfaces)
