"""Raw properties → `Medium`, and the table of media and mounts that are present now.

Question: what is this thing that was plugged in, by which name is it known for ever, and which medium does a path lie on?
Owns: what counts as a medium and of which kind (USB class codes: usb.org "Defined Class Codes"), its key, and the match
of mounts to media in whichever order the two are told. Must not know udev, mounts or files as such, nor approvals.
From `pipeline` (facts) to `register` (key), `joins` (where a path lies), `ocsf` and the daemon (`watches`).

A key names a medium on every machine and for ever: `usb:0951:1666:60A44C413F8CF320` (bus, vendor id, product id, serial).
Without USB ids vendor and model stand in their place (`mmc:sandisk:su08g:0x1a2b3c4d`). A medium without a serial, or with
one that its maker gives to every piece, ends in `:noserial`: such a key is weak, all pieces of that model share it.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple, get_args

from msgspec import Struct, structs

from agent.contract.codes import MediumKind
from agent.contract.mediakey import key_of, slug
from agent.core.facts import Device, Mounted, Plugged, Unmounted, Unplugged

_KINDS = get_args(MediumKind)
NO_SERIAL = ":noserial"
"""How a key ends that many pieces share"""
_SHARE_ID = "share:"
_MAX_TEXT = 256
_USB_STORAGE, _USB_IMAGE, _USB_HUB = "08", "06", "09"
_KEYBOARD = re.compile(r"03:..:01")
"""A keyboard as a PC's firmware uses it (USB HID 1.11, appendix E.3); of others their keys tell (`Device.types`)"""
_USB_OPTICAL = "08:02:"
"""Storage that speaks the commands of CD drives (USB Mass Storage Class overview, table 2: MMC)"""
_FAR_BUSES = {"nbd", "iscsi", "nvme-tcp", "nvme-rdma", "nvme-fc"}
"""Block devices whose other end is another machine"""
_MOST_PHONES = 64
_USB_NETWORK = {"e0", "02", "0a"}
_USB_HARMLESS = {"01", "0b", "0d", "0e", "09"}
"""Audio, smart card, content security, video, hub: no files go that way."""
_SHARES = {
    *("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "davfs", "ceph", "afs", "coda", "lustre", "ncpfs"),
    *("fuse.gvfsd-fuse", "fuse.s3fs", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs", "fuse.xrdp-chansrv"),
}
"""File system types that lie on another machine"""
_FAR_SOURCE = re.compile(r"//|[^/]*:")
"""What such a one calls its source, where a FUSE type says nothing: //server/share, user@host:path, https://host"""
_OUTSIDE_BUSES = {"usb", "ieee1394", "thunderbolt", "firewire", "simulated"}


class Medium(Struct, kw_only=True, frozen=True):
    """What was plugged in, cleaned and named. `id` is the edge's name of it while it is present."""

    id: str
    key: str
    kind: MediumKind
    bus: str = ""
    vendor: str = ""
    model: str = ""
    serial: str = ""
    vendor_id: str = ""
    product_id: str = ""
    interfaces: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    read_only: bool = False
    simulated: bool = False

    @property
    def name(self) -> str:
        """ "Kingston DataTraveler 3.0", or the best there is."""
        spoken = self.model if self.model.startswith(self.vendor) else f"{self.vendor} {self.model}".strip()
        return spoken or self.key


class Mount(Struct, kw_only=True, eq=False):
    """A file system of a medium, where it appears. `under` is its prefix for paths below (ends in "/")."""

    medium: Medium
    mount: str
    under: str
    fs: str = ""
    fs_uuid: str = ""
    label: str = ""
    read_only: bool = False
    mount_id: int = 0
    namespace: int = 0
    since_ms: int = 0
    cold: bool = False
    view: bool = False
    """A server on this machine shows a directory of the medium here in another form (FUSE)"""
    autorun: tuple[str, ...] = ()
    """Files at its top that ask to be run when it is mounted"""
    way: str = "mount"
    peer: str = ""
    """The server, if what is written here leaves by the `way` "network"; then `medium` stands for it, and is never present."""


class MountWatch(NamedTuple):
    """A mount that must be marked now. `reach` is the path by which this process gets there; `folder`: a plain folder
    plays the medium, so only that tree may be watched, never the file system around it. `held`: whoever opens files there
    may be held for a look; not where a server answers, which may be slow or gone, or itself be held."""

    mount_id: int
    mount: str
    namespace: int
    reach: str
    folder: bool
    held: bool = True


def clean(text: str) -> str:
    """A string that a device or a stranger chose, fit to be shown: no control or formatting characters, 256 at most."""
    if text.isascii() and text.isprintable():
        return text.strip()[:_MAX_TEXT]
    shown = "".join(" " if unicodedata.category(each)[0] == "C" else each for each in text[: 4 * _MAX_TEXT])
    return " ".join(shown.split())[:_MAX_TEXT]


def types(device: Device) -> bool:
    """Whether it can type: it has keys for letters, or an interface that says it is a keyboard."""
    return device.types or any(map(_KEYBOARD.match, device.interfaces))


def empty(device: Device) -> bool:
    """Whether it is there to take a card or a disc, and has none in it; a disk of no size is a card reader's slot."""
    if device.properties.get("ID_CDROM") == "1":
        return device.properties.get("ID_CDROM_MEDIA") != "1"
    disks = [each for each in device.blocks if each.kind == "disk" and not each.on]
    return bool(disks) and all(each.size == 0 for each in disks)


def _kind(device: Device, classes: set[str]) -> MediumKind:
    """The kind, by what the device says of itself; a phone that is also a disk is a phone."""
    if device.simulated and device.declared_kind in _KINDS:
        return device.declared_kind  # type: ignore[return-value]
    said = device.properties
    if device.bus in _FAR_BUSES or (device.networks and not device.nodes):
        return "network"
    if said.get("ID_CDROM") == "1" or any(each.startswith(_USB_OPTICAL) for each in device.interfaces):
        return "optical"
    if said.get("ID_MTP_DEVICE") == "1" or said.get("ID_GPHOTO2") == "1" or _USB_IMAGE in classes:
        return "phone"
    slots = any(each.size == 0 and not each.on for each in device.blocks if each.kind == "disk")
    if said.get("ID_DRIVE_FLASH_SD") == "1" or device.bus == "mmc" or device.subsystem == "mmc" or slots:
        return "reader"
    if _USB_STORAGE in classes or device.subsystem == "block" or device.nodes:
        return "storage"
    if classes & _USB_NETWORK:
        return "network"
    return "keyboard" if types(device) else "other"


def _outside(device: Device, classes: set[str]) -> bool:
    """Whether this is something that a person brings and takes away, and that could carry data."""
    if device.simulated:
        return True
    said = device.properties
    if device.subsystem == "bluetooth":
        return said.get("DEVTYPE") != "host"  # the machine's own adapter is no medium, a connected peer is
    if device.built_in and not device.nodes:
        return False
    if device.hotplugged and device.subsystem == "block":
        return True  # a disk that came while the machine ran, on whatever bus
    if device.bus in _OUTSIDE_BUSES or device.subsystem in _OUTSIDE_BUSES:
        return bool(device.nodes) or not classes or bool(classes - _USB_HARMLESS)
    return device.removable is True or said.get("ID_CDROM") == "1" or said.get("ID_DRIVE_FLASH_SD") == "1"


def medium_of(device: Device) -> Medium | None:
    """The medium that a device is, or None if it is a part of the machine or can't carry data."""
    classes = {each[:2].lower() for each in device.interfaces}
    if not _outside(device, classes):
        return None
    bus, vendor, model = clean(device.bus), clean(device.vendor), clean(device.model)
    serial, vendor_id, product_id = clean(device.serial), clean(device.vendor_id), clean(device.product_id)
    return Medium(
        id=device.id,
        key=key_of(bus, vendor, model, serial, vendor_id, product_id),
        kind=_kind(device, classes),
        bus=bus,
        vendor=vendor,
        model=model,
        serial=serial,
        vendor_id=vendor_id,
        product_id=product_id,
        interfaces=tuple(clean(each) for each in device.interfaces[:32]),
        nodes=tuple(device.nodes),
        read_only=device.read_only,
        simulated=device.simulated,
    )


def share_of(told: Mounted) -> Medium | None:
    """What stands for the server of a file system on another machine; None if it is here. A machine that lives on one (its
    "/" is there) has nowhere else to write to."""
    far = told.fs in _SHARES or (told.fs.startswith("fuse.") and _FAR_SOURCE.match(told.source) is not None)
    if not (far or told.far) or told.mount == "/":
        return None
    named = told.source if far else told.far
    return Medium(id=f"{_SHARE_ID}{told.namespace}:{told.mount_id}", key=f"net:{slug(named)}", kind="other")


class Media:
    """The media present and every mount told, so that either may come first. Answers `at(path)` for file facts."""

    def __init__(self) -> None:
        self.present: dict[str, Medium] = {}
        self.mounts: dict[tuple[int, int], Mount] = {}
        """Mounts of media; they outlive a medium that was pulled, until they are told as gone."""
        self._told: dict[tuple[int, int], Mounted] = {}
        self._deepest_first: list[Mount] = []
        self._phones: dict[str, None] = {}
        self.shares = True
        """Whether file systems on other machines count as a way out"""

    def plugged(self, fact: Plugged) -> tuple[Medium | None, bool, list[Mount]]:
        """(the medium or None, whether it is new, its mounts that were told before and are known as its own only now)."""
        medium = medium_of(fact.device)
        if medium is None:
            return None, False, []
        known = self.present.get(medium.id)
        medium = self._lasting(medium, known)
        self.present[medium.id] = medium
        for mount in self.mounts.values():
            if mount.medium is known:
                mount.medium = medium
        late = [self._join(told, medium) for told in list(self._told.values()) if self._owner(told) is medium]
        return medium, known is None, late

    def recall(self, phones: Iterable[str]) -> None:
        """Keys of phones that were known before."""
        self._phones.update(dict.fromkeys(map(_own, list(phones)[-_MOST_PHONES:])))

    def _lasting(self, medium: Medium, known: Medium | None) -> Medium:
        """A phone is one in each of its modes, a card reader also with cards in all its slots."""
        own = _own(medium.key)
        if medium.kind == "phone" and not medium.key.endswith(NO_SERIAL):
            self._phones.pop(own, None)
            self._phones[own] = None
            if len(self._phones) > _MOST_PHONES:
                del self._phones[next(iter(self._phones))]
        elif own in self._phones:
            return structs.replace(medium, kind="phone")
        elif known is not None and known.kind == "reader" and medium.kind == "storage" and known.key == medium.key:
            return structs.replace(medium, kind="reader")
        return medium

    def unplugged(self, fact: Unplugged) -> Medium | None:
        """The medium that went away, if it was one."""
        return self.present.pop(fact.id, None)

    def mounted(self, fact: Mounted) -> Mount | None:
        """The mount, if it is a medium's; None if it is not (as far as is known yet) or was told before."""
        if not fact.mount.startswith("/"):
            return None
        at = (fact.namespace, fact.mount_id)
        if at in self.mounts and self.mounts[at].mount == clean_path(fact.mount):
            return None
        self.mounts.pop(at, None)
        self._told[at] = fact
        owner = self._owner(fact)
        self._sort()
        return self._join(fact, owner) if owner is not None else None

    def unmounted(self, fact: Unmounted) -> Mount | None:
        """The medium's mount that went away, if it was one."""
        at = (fact.namespace, fact.mount_id)
        self._told.pop(at, None)
        gone = self.mounts.pop(at, None)
        self._sort()
        return gone

    def stacked(self) -> list[Mount]:
        """Mounts told before that turn out to lie on a medium: images in its files, encrypted views of its directories."""
        late: list[Mount] = []
        for told in list(self._told.values()):
            if (told.lies_on or told.holds) and (owner := self._owner(told)) is not None:
                late.append(self._join(told, owner))
        return late

    def at(self, path: str) -> Mount | None:
        """The mount of a medium that `path` lies on: the deepest one, the newest of several at one place."""
        for mount in self._deepest_first:
            if path.startswith(mount.under):
                return mount
        return None

    def of(self, medium: Medium) -> list[Mount]:
        """All mounts of a medium."""
        return [mount for mount in self.mounts.values() if mount.medium.id == medium.id]

    def raw(self, node: str) -> Mount | None:
        """A medium's block device itself, as if it were a mount of it without a place; None if it is that of no medium."""
        medium = next((each for each in self.present.values() if node in each.nodes), None)
        return Mount(medium=medium, mount="", under="") if medium is not None else None

    def watches(self) -> Iterator[MountWatch]:
        """The mounts that the daemon must have marked now."""
        for (namespace, mount_id), mount in self.mounts.items():
            folder, held = mount.fs == "folder", mount.way == "mount" and not mount.view
            yield MountWatch(mount_id, mount.mount, namespace, mount.under[:-1] or "/", folder, held)

    def _owner(self, told: Mounted) -> Medium | None:
        if (told.namespace, told.mount_id) in self.mounts:
            return None
        nodes = {told.dev, *told.holds} - {""}
        own = next((each for each in self.present.values() if nodes.intersection(each.nodes)), None)
        for path in (told.lies_on, *told.holds) if own is None else ():
            if path.startswith("/") and (below := self.at(path)) is not None:
                own = own or self.present.get(below.medium.id)
        return own if own is not None or not self.shares else share_of(told)

    def _join(self, told: Mounted, medium: Medium) -> Mount:
        mount = Mount(
            medium=medium,
            mount=clean_path(told.mount),
            under=clean_path(told.reach or told.mount).rstrip("/") + "/",
            fs=clean(told.fs),
            fs_uuid=clean(told.fs_uuid),
            label=clean(told.label),
            read_only=told.read_only,
            mount_id=told.mount_id,
            namespace=told.namespace,
            since_ms=told.at_ms,
            cold=told.cold,
            view=told.lies_on.endswith("/") or bool(told.holds),
            autorun=tuple(clean(name) for name in told.autorun),
        )
        if medium.id.startswith(_SHARE_ID):
            named = told.fs in _SHARES or _FAR_SOURCE.match(told.source) is not None
            mount.way, mount.peer = "network", clean(told.source if named or not told.far else told.far)
        elif medium.kind == "phone" and told.fs.startswith("fuse"):
            mount.way = "mtp"
        self.mounts[told.namespace, told.mount_id] = mount
        self._sort()
        return mount

    def _sort(self) -> None:
        newest_first = reversed(self.mounts.values())
        self._deepest_first = sorted(newest_first, key=lambda mount: -len(mount.under))


def _own(key: str) -> str:
    """What stays the same of a USB device's key in all its modes: without the product id."""
    parts = key.split(":")
    return ":".join((*parts[:2], *parts[3:]))


def clean_path(path: str) -> str:
    """A path that can be written as UTF-8. Paths come spelt by `contract.event.path_text`, so this changes none of those."""
    if path.isascii():
        return path
    return path.encode("utf-8", "surrogateescape" if _only_escapes(path) else "replace").decode("utf-8", "backslashreplace")


def _only_escapes(path: str) -> bool:
    return not any("\ud800" <= each <= "\udfff" and not "\udc80" <= each <= "\udcff" for each in path)
