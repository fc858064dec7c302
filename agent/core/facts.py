"""All that an edge may say: one Struct a kind of fact, each with the time it was seen (`at_ms`, ms since 1970 UTC).

Owns: the vocabulary between edges and core, and its NDJSON form (`sekisho-agent replay` reads it back).
Must not know: what any fact means. An edge fills in only what it saw; None and empty mean "not known".
Paths are text as `contract.event.path_text` writes them. A file's `key` names the inode across renames and hard links
(file-system id and file handle, or device and inode where handles are refused): equal keys, same file.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field


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


Channel = int | str
"""By what processes hand bytes on: a pipe's inode number, or `fifo:DEV:INODE`, `unix:INODE:INODE`, `tcp:END-END`."""


class Process(Struct, omit_defaults=True, kw_only=True):
    """One process as last seen. `start` is clock ticks since boot (0: not known), and with `pid` names it for good; `began_ms`
    is about when that was; `ended_ms`: it had ended by the time it was looked for.

    `loginuid` is None where the kernel has none. `pipes` are the channels it held (stdin, stdout and others), `ends` of each:
    1 its reading end or the first socket of the pair, 2 the other, 3 both, 0 not told. `blind`: it was ending when it was
    looked at, so that what it held was not seen.
    `unit` is the systemd unit it runs in, `container` the id or name of a container, `image` what that was made from.
    `known`: "exact" read from /proc while alive, "cached" from the proc connector (then exe and argv may be missing).
    """

    pid: int
    start: int = 0
    began_ms: int | None = None
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
    pipes: list[Channel] = []
    ends: list[int] = []
    blind: bool = False
    files: list[OpenFile] = []
    parents: list[Parent] = []
    unit: str = ""
    container: str = ""
    image: str = ""
    known: str = "exact"
    ended_ms: int | None = None


class Block(Struct, omit_defaults=True, kw_only=True):
    """One block device of something plugged in: `name` as in /dev, `node` "major:minor", `kind` "disk", "partition", or that of
    the mapped device ("crypt", "lvm", …); `on` is the name of what it lies on. `size` in bytes, 0: no card or disc in it."""

    name: str
    node: str = ""
    kind: str = ""
    on: str = ""
    size: int | None = None
    fs: str = ""
    fs_uuid: str = ""
    label: str = ""


class Device(Struct, omit_defaults=True, kw_only=True):
    """Something plugged in, in raw properties. `id` names it while it is present (sysfs path, or `sim:NAME`).

    `nodes` are its block devices as "major:minor", partitions and what is stacked on them too (`sim:NAME` if simulated);
    `blocks` are the same with what is known of each, `networks` its network interfaces.
    `interfaces` are USB "class:subclass:protocol", two hex digits each. `subsystem` and `driver` as udev names them.
    `port` is where it is plugged in ("1-2.4"), `hubs` the names of the hubs on the way, nearest first; `built_in`: it can't be
    unplugged, as the firmware says. `types`: it has keys for letters. `since_ms`: when the kernel found it; `hotplugged`: that
    was while the machine ran, not at its start. None: not known.
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
    blocks: list[Block] = []
    networks: list[str] = []
    port: str = ""
    hubs: list[str] = []
    built_in: bool | None = None
    types: bool = False
    since_ms: int | None = None
    hotplugged: bool | None = None


class Fact(Struct, tag_field="fact", tag=True, omit_defaults=True, kw_only=True):
    """Something an edge saw at `at_ms`."""

    at_ms: int


class Tick(Fact):
    """Time passes; nothing else happened. Sent about once a second."""


class ProcSeen(Fact):
    """What is known of a process, before the first file fact that names its pid, and again when it changed."""

    process: Process


class ProcGone(Fact):
    """A process ended, at `ended_ms` if that was told."""

    pid: int
    start: int = 0
    ended_ms: int | None = None


class FileFact(Fact, gc=False):
    """A program `pid` (0: not known) did something to the file `key` at `path`."""

    pid: int
    key: bytes
    path: str


class Opened(FileFact, gc=False):
    """A file was opened, to read as far as is known. `size` in bytes if it was looked up."""

    size: int | None = None
    inode: int | None = None


class MediumRead(FileFact):
    """A file on a medium was opened, to read as far as is known."""


class Executed(FileFact):
    """A file on a medium was executed: a program, or a script that names what runs it."""


class Sized(Fact):
    """A file that had been opened was looked up, as the core wanted: `size` is None if it is gone by now."""

    path: str
    size: int | None = None
    inode: int | None = None


class Created(FileFact, gc=False):
    """A file was made, empty as yet; or linked, with the `size` that it has."""

    size: int | None = None


class Grown(FileFact, gc=False):
    """A file that is being written was looked at: `size` in bytes so far."""

    size: int = 0


class Closed(FileFact, gc=False):
    """A file that had been open for writing was closed. `size` is None if it could not be looked up any more.

    `born_ms`: when it was made, if it lies neither in a protected directory nor on a medium and its file system keeps that.
    `made`: the program had just made it, and no Created tells of that.
    """

    size: int | None = None
    born_ms: int | None = None
    made: bool = False


class Compared(Fact):
    """What a file elsewhere, or one in doubt on a medium, has in common with the protected files it may hold, as was wanted.

    `key` and `path` are the file's, by its present name; `size` its bytes now. `alike`: "same" (bytes of theirs are in it),
    "part" (it is one piece of the only one, byte for byte), "packed" (no bytes that repeat, and as many as theirs have when
    packed or encrypted), "other" (neither), "unknown" (they can't be read any more), "gone" (it can't). `held`: where that was
    asked, those of the files that are in it, by the path as it was opened, with the bytes of each.
    """

    key: bytes
    path: str
    size: int
    alike: str
    held: dict[str, int] = {}


class Traced(Fact):
    """What a look says of a file that may have come from a medium, or of a script there, as was wanted.

    `key` and `path` are the file's, by its present name; `size` its bytes now. `how`: "copied" (the bytes of what was read are
    in it, or it was plainly one file and nothing was compared), "extracted" (out of the archive `source`, by the archive's own
    list), "unpacked" (new, by who read the packed `source`, whose content was not looked at), "script" (of the medium, run by
    who opened it), "perhaps_script" (the same, but it does not say itself what runs it), "other" (none of these), "unknown"
    (what was read can't be looked at any more), "gone" (the file can't). `program`: it can be run.
    """

    key: bytes
    path: str
    how: str
    size: int = 0
    source: str = ""
    program: bool = False


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


class Transferred(Fact):
    """What went over the device `id` since it came, in bytes: `bytes_in` from it to the machine, `bytes_out` to it."""

    id: str
    bytes_in: int
    bytes_out: int


class Mounted(Fact):
    """A file system appeared at `mount`. `dev` is "major:minor" (or `sim:NAME`); `mount_id` names it in its namespace.

    `reach` is the path by which the agent gets there if that is not `mount` (`/proc/PID/root/…` for another namespace).
    `lies_on` is the file (an image under a loop device) or directory (with "/", shown by FUSE) in which its content really is.
    `far`: the machine that its server was seen to talk to (FUSE), address and port; told again when that is seen.
    `holds` are block devices ("major:minor") and files that the server of a FUSE file system holds, which names no such source.
    `autorun` are names of files at its top that ask desktops to run something when it is mounted.
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
    lies_on: str = ""
    holds: list[str] = []
    far: str = ""
    cold: bool = False
    autorun: list[str] = []


class Unmounted(Fact):
    """The mount `mount_id` is gone."""

    mount_id: int
    namespace: int = 0


class NodeWritten(Fact):
    """Process `pid` wrote to a block device itself, not to a file system on it, and it was closed since. `node` is
    "major:minor", `path` that in /dev; `since_ms`: not open for that before this moment."""

    pid: int
    node: str
    path: str
    since_ms: int


class WayHeld(Fact):
    """Process `pid` has a way out open that is no mount: a phone's node, a socket to elsewhere, a printer, a Bluetooth peer.

    Told when it is first seen, and again whenever its count has grown. `id` names the way while it is open, the same for all
    who hold it (`tcp:COOKIE` of a socket, `usb:BUS/DEVICE` of a phone's node). `way` is one of `codes.Way` but "mount".
    `peer` is an address or a service, for people; `device` the `Device.id` of what was plugged in, if it is such a thing.
    `sent` are the bytes that left by it so far, whoever sent them; None where nobody can count them.
    `since_ms`: not open before this moment, so that all of `sent` but the first `idle_sent` left since; None if it may have
    been open for long.
    `uses`: how often it was spoken to so far, in either direction, where that can be counted and bytes can't; `idle_uses`: the
    same before anybody who holds it now did.
    `began_ms`: when the process that opened it began, if that is known. `feeders` are other processes that were seen to be
    connected to a holder by a socket of this machine (a forwarder, a print service).
    """

    pid: int
    way: str
    id: str
    peer: str = ""
    device: str = ""
    sent: int | None = None
    uses: int | None = None
    idle_uses: int | None = None
    idle_sent: int = 0
    since_ms: int | None = None
    began_ms: int | None = None
    feeders: list[int] = []


class WayClosed(Fact):
    """The way `id` is closed, or `pid` (if not 0) let go of it. `sent`: the bytes that left by it in all, None: not known."""

    id: str
    pid: int = 0
    sent: int | None = None


class WayUsed(Fact):
    """A way was used and closed by somebody nobody saw: `sent` bytes left for `peer`, by a user `uid` if that is known."""

    way: str
    id: str
    sent: int
    peer: str = ""
    uid: int | None = None


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


class Grant(Struct, array_like=True):
    """By which entry of the rights somebody may `read` or `write` (or `all`, as root): `who` is `user:NAME`, `group:NAME`,
    `everyone` or `sudo:NAME`; `names` are the first of the `people` people it lets in, `files` how many files to."""

    who: str
    may: str
    names: list[str] = []
    people: int = 0
    files: int = 0


class Rights(Fact):
    """Who may get at what is below the protected directory `root`, looked up. `unread` could not be looked at, `setuid` files
    run with another's rights; `unknown` says what nobody could be asked."""

    root: str
    grants: list[Grant] = []
    files: int = 0
    unread: int = 0
    setuid: int = 0
    unknown: list[str] = []


class Clock(Fact):
    """The wall clock jumped by `jump_ms`, or the machine was suspended for `suspended_ms`, or the distance to the collector's
    clock is known anew (`offset_ms`)."""

    jump_ms: int = 0
    suspended_ms: int = 0
    offset_ms: int | None = None


class Tampered(Fact):
    """Something of the agent's own was altered: `what` is a stable code, `detail` says where."""

    what: str
    detail: dict[str, Any] = {}


class Approval(Struct, omit_defaults=True, kw_only=True, gc=False):
    """One entry of the register, as far as it decides (`wire.ApprovalEntry` has the rest). Times in ms; `machines` ("@" before
    the name of a group) and `dirs` empty: all. `once`: good for one plugging in; `used_by` is the agent that told it."""

    id: str
    key: str
    since_ms: int = field(default=0, name="since")
    until_ms: int | None = field(default=None, name="until")
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    revoked: bool = False
    lost: bool = False
    once: bool = False
    used_by: str = ""


class Register(Fact):
    """The collector's register of media, its signature checked. `version` grows with each change. `confirmed_ms`: when the
    collector last said that it is in force, by this machine's clock; 0 if that is not known."""

    version: int
    approvals: list[Approval] = []
    groups: dict[str, list[str]] = {}
    confirmed_ms: int = 0


class RegisterConfirmed(Fact):
    """The collector said at `at_ms` that the register held is the newest."""


class Acted(Fact):
    """The hand that stops did something to the medium `id` (a `Device.id`), or failed to.

    `did` are stable codes of what holds now and did not before ("read_only", "no_opens", "no_writes", "directories",
    "deauthorized"), `undid` of what was taken back; `targets` are mount points, nodes and sysfs paths, for people; `failed`
    one sentence for each thing that could not be done.
    """

    id: str
    did: list[str] = []
    undid: list[str] = []
    targets: list[str] = []
    failed: list[str] = []


class Refused(FileFact):
    """An open was refused with EPERM while it was held: `path` on a stopped medium, or a protected file's (`source`) that was
    to be read by somebody who writes to one."""

    source: bool = False


class Unlocked(Fact):
    """A break-glass code was entered and found good: medium `key` may be used until `until_ms`. `id` names the code."""

    id: str
    key: str
    until_ms: int
    read_only: bool = False


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
    | MediumRead
    | Executed
    | Sized
    | Created
    | Grown
    | Closed
    | Compared
    | Traced
    | Deleted
    | Moved
    | Attributes
    | Found
    | Plugged
    | Unplugged
    | Transferred
    | Mounted
    | Unmounted
    | NodeWritten
    | WayHeld
    | WayClosed
    | WayUsed
    | Session
    | Coverage
    | Lost
    | Rights
    | Clock
    | Tampered
    | Register
    | RegisterConfirmed
    | Acted
    | Refused
    | Unlocked
    | Started
    | Stopping
    | Summary
    | Config
)

_Any = TypeVar("_Any", bound=Fact)
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyFact)


class BadFact(ValueError):
    """A line of recorded facts can't be read."""


def write(fact: Fact) -> bytes:
    """One fact as one line of NDJSON, without the newline. What no UTF-8 can carry (half a surrogate pair, as a device's raw
    bytes may come) is written as "?"."""
    try:
        return _encoder.encode(fact)
    except UnicodeEncodeError:
        return _encoder.encode(_writable(msgspec.to_builtins(fact, builtin_types=(bytes,))))


def writable(fact: _Any) -> _Any:
    """The same fact, without what no UTF-8 can carry: it comes from devices, and must neither be kept nor told."""
    try:
        _encoder.encode(fact)
    except UnicodeEncodeError:
        return msgspec.json.decode(write(fact), type=type(fact))
    return fact


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(each) for key, each in value.items()}
    return [_writable(each) for each in value] if isinstance(value, list) else value


def read(lines: Iterable[bytes]) -> Iterator[AnyFact]:
    """Facts from NDJSON lines; blank lines and lines that begin with `#` are passed over. Raises BadFact, line named."""
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            yield _decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise BadFact(f"line {number}: {error}") from None
