"""An event's shape, and the moment it becomes bytes.

Owns: the OCSF envelope and `unmapped.sekisho` as Structs, the sealing of an event into its exact bytes (from then on
only bytes travel), and the escaped spelling of paths. Must not know: what an event means or who made it; I/O, clock.
`core/ocsf.py` fills these Structs, `contract/chain.py` links the bytes, the collector reads them with `read`.
UNSET means "not known": the key is then absent (OCSF: no nulls, no empty strings).
"""

import re
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

_ASCII = re.compile(rb"[^\\\x80-\xff]*", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:\\|x([0-9a-f]{2}))")


def path_text(raw: bytes) -> str:
    """A path as text: UTF-8, a byte that is not as `\\xNN`, a backslash as two. The inverse of `path_bytes`."""
    if _ASCII.fullmatch(raw):
        return raw.decode("ascii")
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def path_bytes(text: str) -> bytes:
    """The raw bytes of a path written by `path_text`."""
    out, end = bytearray(), 0
    for found in _ESCAPE.finditer(text):
        out += text[end : found.start()].encode("utf-8", "surrogatepass")
        out += bytes.fromhex(found[1]) if found[1] else b"\\"
        end = found.end()
    return bytes(out + text[end:].encode("utf-8", "surrogatepass"))


class BlockInfo(Struct, kw_only=True):
    """One of `medium.blocks[]`: a disk, a partition, or what is mapped onto one (`kind` "crypt", "lvm", …); `on` names what it
    lies on, `size` is in bytes."""

    name: str
    kind: str | UnsetType = UNSET
    on: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    fs: str | UnsetType = UNSET
    fs_uuid: str | UnsetType = UNSET
    label: str | UnsetType = UNSET


class MediumInfo(Struct, kw_only=True):
    """`unmapped.sekisho.medium`: what was plugged in, where it appears, and what the register says of it. From `identity` on,
    the story of the device, in events `medium.*` alone: see "The story of a device"."""

    key: str
    kind: str | UnsetType = UNSET
    bus: str | UnsetType = UNSET
    vendor: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    serial: str | UnsetType = UNSET
    vendor_id: str | UnsetType = UNSET
    product_id: str | UnsetType = UNSET
    fs: str | UnsetType = UNSET
    fs_uuid: str | UnsetType = UNSET
    label: str | UnsetType = UNSET
    mount: str | UnsetType = UNSET
    read_only: bool | UnsetType = UNSET
    interfaces: list[str] | UnsetType = UNSET
    decision: str | UnsetType = UNSET
    decision_reason: str | UnsetType = UNSET
    approval: str | UnsetType = UNSET
    register_age_s: int | UnsetType = UNSET
    identity: str | UnsetType = UNSET
    identity_by: list[str] | UnsetType = UNSET
    story: str | UnsetType = UNSET
    since: str | UnsetType = UNSET
    since_ms: int | UnsetType = UNSET
    part: str | UnsetType = UNSET
    empty: bool | UnsetType = UNSET
    port: str | UnsetType = UNSET
    hubs: list[str] | UnsetType = UNSET
    modes: list[str] | UnsetType = UNSET
    switched_from: list[str] | UnsetType = UNSET
    blocks: list[BlockInfo] | UnsetType = UNSET
    networks: list[str] | UnsetType = UNSET
    mounts: list[str] | UnsetType = UNSET
    present_ms: int | UnsetType = UNSET
    bytes_in: int | UnsetType = UNSET
    bytes_out: int | UnsetType = UNSET
    usb_requests: int | UnsetType = UNSET


class ProtectedInfo(Struct, kw_only=True):
    """`unmapped.sekisho.protected`: which protected directory, and the file's path below it."""

    path: str
    label: str
    rel: str | UnsetType = UNSET


class SourceInfo(Struct, kw_only=True):
    """`unmapped.sekisho.source`: the protected file; `via` lists other names or staged copies that were read instead."""

    path: str
    size: int | UnsetType = UNSET
    inode: int | UnsetType = UNSET
    via: list[str] | UnsetType = UNSET


class DestInfo(Struct, kw_only=True):
    """`unmapped.sekisho.dest`: the file on the medium, its size in bytes as last seen; or the `peer` at the other end of a
    way that is no mount, an address or a service."""

    path: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    peer: str | UnsetType = UNSET


class ParentInfo(Struct, kw_only=True):
    """One of `process.parents[]`, nearest first."""

    pid: int
    exe: str | UnsetType = UNSET


class ProcessInfo(Struct, kw_only=True):
    """`unmapped.sekisho.process`; `start` is clock ticks since boot (proc(5) stat field 22); `unit` the systemd unit that it
    runs in, `container` the id or name of a container, `image` what that was made from."""

    pid: int
    exe: str | UnsetType = UNSET
    argv: list[str] | UnsetType = UNSET
    start: int | UnsetType = UNSET
    unit: str | UnsetType = UNSET
    container: str | UnsetType = UNSET
    image: str | UnsetType = UNSET
    parents: list[ParentInfo] | UnsetType = UNSET


class LoginInfo(Struct, kw_only=True):
    """`unmapped.sekisho.login`: the person by the kernel's login uid, which su and sudo do not change."""

    uid: int
    user: str | UnsetType = UNSET
    session: str | UnsetType = UNSET
    tty: str | UnsetType = UNSET
    remote: str | UnsetType = UNSET


class LimitInfo(Struct, kw_only=True):
    """`unmapped.sekisho.limit`: the limit that was passed; `window` in seconds, `bytes` and `files` as counted in it."""

    name: str
    window: int
    bytes: int
    files: int
    of_bytes: int | UnsetType = UNSET
    of_files: int | UnsetType = UNSET


class LostInfo(Struct, kw_only=True):
    """`unmapped.sekisho.lost` of an `agent.gap`: what was lost and why; times in ms, `count` absent if it can't be known."""

    reason: str
    since: int
    until: int
    count: int | UnsetType = UNSET
    first_seq: int | UnsetType = UNSET
    last_seq: int | UnsetType = UNSET


class Sekisho(Struct, kw_only=True):
    """`unmapped.sekisho`: all that OCSF has no place for. `extra` events may carry free keys in `detail`."""

    medium: MediumInfo | Raw | UnsetType = UNSET
    simulated: bool | UnsetType = UNSET
    protected: ProtectedInfo | UnsetType = UNSET
    source: SourceInfo | UnsetType = UNSET
    dest: DestInfo | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    way: str | UnsetType = UNSET
    link: str | UnsetType = UNSET
    confidence: float | UnsetType = UNSET
    attribution: str | UnsetType = UNSET
    login: LoginInfo | Raw | UnsetType = UNSET
    process: ProcessInfo | Raw | UnsetType = UNSET
    limit: LimitInfo | UnsetType = UNSET
    lost: LostInfo | UnsetType = UNSET
    detail: dict[str, Any] | UnsetType = UNSET
    time_offset_ms: int | UnsetType = UNSET
    seq: int = 0
    epoch: int = 0
    prev: str = ""


class Unmapped(Struct):
    """OCSF `unmapped`: ours is all under one key."""

    sekisho: Sekisho


class Metadata(Struct, kw_only=True):
    """OCSF `metadata`: `uid` can't be guessed, `sequence` is the event's seq in its chain, `product` is pre-encoded."""

    version: str
    product: Raw
    uid: str
    event_code: str
    sequence: int = 0
    profiles: list[str] | UnsetType = UNSET


class Event(Struct, kw_only=True):
    """One OCSF event, not sealed yet. Parts that many events share come encoded already, as `Raw`.

    `time`, `start_time`, `end_time` are milliseconds since 1970 UTC.
    """

    class_uid: int
    category_uid: int
    activity_id: int
    activity_name: str
    type_uid: int
    severity_id: int
    time: int
    metadata: Metadata
    unmapped: Unmapped
    device: Raw | UnsetType = UNSET
    actor: Raw | UnsetType = UNSET
    message: str | UnsetType = UNSET
    count: int | UnsetType = UNSET
    start_time: int | UnsetType = UNSET
    end_time: int | UnsetType = UNSET
    status_id: int | UnsetType = UNSET
    is_alert: bool | UnsetType = UNSET
    action_id: int | UnsetType = UNSET
    disposition_id: int | UnsetType = UNSET
    app: Raw | UnsetType = UNSET
    file: dict[str, Any] | UnsetType = UNSET
    peripheral_device: dict[str, Any] | UnsetType = UNSET
    finding_info: dict[str, Any] | UnsetType = UNSET
    data_security: dict[str, Any] | UnsetType = UNSET
    api: dict[str, Any] | UnsetType = UNSET
    src_endpoint: dict[str, Any] | UnsetType = UNSET
    resources: list[dict[str, Any]] | UnsetType = UNSET

    @property
    def uid(self) -> str:
        """Its id."""
        return self.metadata.uid

    @property
    def code(self) -> str:
        """Its event code."""
        return self.metadata.event_code

    def seal(self, seq: int, epoch: int, prev: bytes) -> bytes:
        """The exact bytes as link `seq` of the chain of `epoch`; `prev` is hash_{seq-1} (32 bytes)."""
        self.metadata.sequence = seq
        sekisho = self.unmapped.sekisho
        sekisho.seq, sekisho.epoch, sekisho.prev = seq, epoch, prev.hex()
        return _encode(self)


_encode = msgspec.json.Encoder().encode


class Sealable(Protocol):
    """An `Event`, or one made by a form (`form.Filled`)."""

    def seal(self, seq: int, epoch: int, prev: bytes) -> bytes:
        """The exact bytes as link `seq` of the chain of `epoch`; `prev` is hash_{seq-1} (32 bytes)."""


def seal(event: Sealable, seq: int, epoch: int, prev: bytes) -> bytes:
    """The exact bytes of `event` as link `seq` of the chain of `epoch`; `prev` is hash_{seq-1} (32 bytes)."""
    return event.seal(seq, epoch, prev)


class SeenMetadata(Struct):
    """The part of `metadata` that the collector indexes."""

    uid: str
    event_code: str
    sequence: int = 0


class SeenSekisho(Struct):
    """The part of `unmapped.sekisho` that the collector indexes; unknown keys are left alone."""

    medium: MediumInfo | UnsetType = UNSET
    protected: ProtectedInfo | UnsetType = UNSET
    source: SourceInfo | UnsetType = UNSET
    dest: DestInfo | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    way: str | UnsetType = UNSET
    link: str | UnsetType = UNSET
    attribution: str | UnsetType = UNSET
    login: LoginInfo | UnsetType = UNSET
    process: ProcessInfo | UnsetType = UNSET
    limit: LimitInfo | UnsetType = UNSET
    lost: LostInfo | UnsetType = UNSET
    simulated: bool = False
    detail: dict[str, Any] = field(default_factory=dict)
    seq: int = 0
    epoch: int = 0
    prev: str = ""


class SeenUnmapped(Struct):
    """OCSF `unmapped`, ours only."""

    sekisho: SeenSekisho = field(default_factory=SeenSekisho)


class Seen(Struct):
    """An event as its readers see it: strict about what it needs, blind to what it does not know."""

    class_uid: int
    type_uid: int
    severity_id: int
    time: int
    metadata: SeenMetadata
    unmapped: SeenUnmapped = field(default_factory=SeenUnmapped)
    device: dict[str, Any] = field(default_factory=dict)
    actor: dict[str, Any] = field(default_factory=dict)
    file: dict[str, Any] = field(default_factory=dict)
    peripheral_device: dict[str, Any] = field(default_factory=dict)
    finding_info: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    action_id: int = 0
    count: int = 0


_decoder = msgspec.json.Decoder(Seen)


def read(data: bytes) -> Seen:
    """Decode an event's bytes. Raises msgspec.MsgspecError (bad JSON, wrong types, too deep nesting) and nothing else."""
    try:
        return _decoder.decode(data)
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"not UTF-8: {error.reason}") from None
