"""All that an edge may say: one Struct a kind of fact, each with the time it was seen (`at_ms`, ms since 1970 UTC).

Owns: the vocabulary between edges and core, and its NDJSON form (`sekisho-agent replay` reads it back).
Must not know: what any fact means. An edge fills in only what it saw; None and empty mean "not known".
Paths are text as `contract.event.path_text` writes them. A file's `key` names the inode across renames and hard links
(file-system id and file handle, or device and inode where handles are refused): equal keys, same file.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec import Struct


class Parent(Struct, array_like=True):
    """An ancestor of a process, nearest first in a list."""

    pid: int
    start: int = 0
    exe: str = ""


class OpenFile(Struct, array_like=True):
    """A regular file that a process held open when it was looked at: `key` as in file facts, where it could be had."""

    path: str
    size: int
    key: bytes = b""


class Process(Struct, omit_defaults=True, kw_only=True):
    """One process as last seen. `start` is clock ticks since boot (0: not known), and with `pid` names it for good.

    `loginuid` is None where the kernel has none. `pipes` are inode numbers of pipes it held (stdin, stdout and others).
    `known`: "exact" read from /proc while alive, "cached" from the proc connector (then exe and argv may be missing).
    """

    pid: int
    start: int = 0
    ppid: int = 0
    uid: int | None = None
    user: str = ""
    loginuid: int | None = None
    login_user: str = ""
    session: str = ""
    tty: str = ""
    remote: str = ""
    exe: str = ""
    argv: list[str] = []
    pipes: list[int] = []
    files: list[OpenFile] = []
    parents: list[Parent] = []
    known: str = "exact"


class Device(Struct, omit_defaults=True, kw_only=True):
    """Something plugged in, in raw properties. `id` names it while it is present (sysfs path, or `sim:NAME`).

    `nodes` are its block devices as "major:minor", partitions and what is stacked on them too (`sim:NAME` if simulated).
    `interfaces` are USB "class:subclass:protocol", two hex digits each. `subsystem` and `driver` as udev names them.
    """

    id: str
    bus: str = ""
    subsystem: str = ""
    driver: str = ""
    vendor: str = ""
    model: str = ""
    serial: str = ""
    vendor_id: str = ""
    product_id: str = ""
    interfaces: list[str] = []
    nodes: list[str] = []
    removable: bool | None = None
    read_only: bool = False
    declared_kind: str = ""
    properties: dict[str, str] = {}
    simulated: bool = False


class Fact(Struct, tag_field="fact", tag=True, omit_defaults=True, kw_only=True):
    """Something an edge saw at `at_ms`."""

    at_ms: int


class Tick(Fact):
    """Time passes; nothing else happened. Sent about once a second."""


class ProcSeen(Fact):
    """What is known of a process, before the first file fact that names its pid, and again when it changed."""

    process: Process


class ProcGone(Fact):
    """A process ended."""

    pid: int
    start: int = 0


class FileFact(Fact):
    """A program `pid` (0: not known) did something to the file `key` at `path`."""

    pid: int
    key: bytes
    path: str


class Opened(FileFact):
    """A file was opened, to read as far as is known. `size` in bytes if it was looked up."""

    size: int | None = None
    inode: int | None = None


class Sized(Fact):
    """A file that had been opened was looked up, as the core wanted: `size` is None if it is gone by now."""

    path: str
    size: int | None = None
    inode: int | None = None


class Created(FileFact):
    """A file was made (empty as yet)."""


class Grown(FileFact):
    """A file that is being written was looked at: `size` in bytes so far."""

    size: int = 0


class Closed(FileFact):
    """A file that had been open for writing was closed. `size` is None if it could not be looked up any more."""

    size: int | None = None


class Deleted(FileFact):
    """A name of a file was removed."""


class Moved(FileFact):
    """A file got another name: `path` is the new one, `old_path` the former; either is empty if outside what is watched."""

    old_path: str = ""
    is_dir: bool = False
    size: int | None = None


class Attributes(FileFact):
    """Owner, mode, ACL or link count of something protected changed."""

    inode: int | None = None
    links: int | None = None


class Found(FileFact):
    """A file seen by looking, not by being told (a rescan): who wrote it is not known. `modified_ms` is its mtime."""

    size: int = 0
    modified_ms: int = 0


class Plugged(Fact):
    """A device is there. Told again when it changed (partitions appear); `cold`: it was there before the agent looked."""

    device: Device
    cold: bool = False


class Unplugged(Fact):
    """The device `id` is gone."""

    id: str


class Mounted(Fact):
    """A file system appeared at `mount`. `dev` is "major:minor" (or `sim:NAME`); `mount_id` names it in its namespace.

    `reach` is the path by which the agent gets there if that is not `mount` (`/proc/PID/root/…` for another namespace).
    """

    mount_id: int
    dev: str
    mount: str
    fs: str = ""
    source: str = ""
    root: str = "/"
    fs_uuid: str = ""
    label: str = ""
    read_only: bool = False
    namespace: int = 0
    reach: str = ""
    cold: bool = False


class Unmounted(Fact):
    """The mount `mount_id` is gone."""

    mount_id: int
    namespace: int = 0


class Session(Fact):
    """Who sits at the active local session now; `uid` None: nobody."""

    uid: int | None = None
    user: str = ""
    session: str = ""


class Coverage(Fact):
    """What a sensor sees and does not: `blind` are stable codes (docs/reference.md), `why` one sentence for people."""

    sensor: str
    ok: bool
    sees: list[str] = []
    blind: list[str] = []
    why: str = ""


class Lost(Fact):
    """A sensor or the spool lost something between `since_ms` and `until_ms`; `count` None: nobody can know how many."""

    reason: str
    since_ms: int
    until_ms: int
    count: int | None = None
    first_seq: int | None = None
    last_seq: int | None = None


class Clock(Fact):
    """The wall clock jumped by `jump_ms`, or its distance to the collector's clock is known anew (`offset_ms`)."""

    jump_ms: int = 0
    offset_ms: int | None = None


class Tampered(Fact):
    """Something of the agent's own was altered: `what` is a stable code, `detail` says where."""

    what: str
    detail: dict[str, Any] = {}


class Approval(Struct, omit_defaults=True, kw_only=True):
    """One entry of the register. Times in ms; `machines` and `dirs` empty: all."""

    id: str
    key: str
    owner: str = ""
    approver: str = ""
    purpose: str = ""
    since_ms: int = 0
    until_ms: int | None = None
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    revoked: bool = False
    reason: str = ""


class Register(Fact):
    """The collector's register of media, its signature checked. `version` grows with each change."""

    version: int
    approvals: list[Approval] = []


class Started(Fact):
    """The agent begins. `config_digest` is SHA-256 (hex) of the configuration file; `previous` the former epoch's head."""

    boot_id: str = ""
    config_digest: str = ""
    mode: str = "observe"
    previous: dict[str, Any] = {}


class Stopping(Fact):
    """The agent was asked to stop."""

    reason: str = ""


class Summary(Fact):
    """An hourly account of the agent itself, for `agent.heartbeat`."""

    detail: dict[str, Any] = {}


class Config(Fact):
    """The configuration in force changed (SIGHUP)."""

    config_digest: str
    mode: str = "observe"


AnyFact = (
    Tick
    | ProcSeen
    | ProcGone
    | Opened
    | Sized
    | Created
    | Grown
    | Closed
    | Deleted
    | Moved
    | Attributes
    | Found
    | Plugged
    | Unplugged
    | Mounted
    | Unmounted
    | Session
    | Coverage
    | Lost
    | Clock
    | Tampered
    | Register
    | Started
    | Stopping
    | Summary
    | Config
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyFact)


class BadFact(ValueError):
    """A line of recorded facts can't be read."""


def write(fact: Fact) -> bytes:
    """One fact as one line of NDJSON, without the newline."""
    return _encoder.encode(fact)


def read(lines: Iterable[bytes]) -> Iterator[AnyFact]:
    """Facts from NDJSON lines; blank lines and lines that begin with `#` are passed over. Raises BadFact, line named."""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            yield _decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise BadFact(f"line {number}: {error}") from None
