"""A batch, examined and judged: is it from who it says, is its chain whole, and does it continue what is held?

Two pure steps. `examine` is the costly one and needs only the batch and the agent's key, so it can run beside others:
unpacking within limits, the signature over the head, every event readable and in its place, the chain recomputed. It
raises `Bad`. `judge` is the cheap one: it compares what was examined with the head that is held, and so is done by the
single writer at the moment of commit. Must not know: stores, HTTP, clocks.

The head's signature is checked before the rest is even unpacked: a stranger's gzip bomb costs one line of it.
"""

import hashlib
import re
import zlib
from typing import Literal, NamedTuple

import msgspec
from msgspec import UNSET

from agent.contract import chain, codes, wire
from agent.contract.event import Seen, read

MAX_HEAD_BYTES = 4096
LATEST_MS = 1 << 53
"""Times beyond are no times: JSON readers of others could not hold them."""


OURS = frozenset(code for code, row in codes.CODES.items() if row.tells.startswith("made by the collector"))
"""Codes of what the collector notices and people do to it: no agent may say so in its place."""

Blob = bytes
"""`Row` has a field named `bytes`, as the contract does."""


class Bad(Exception):
    """A batch that is refused: `status` 401 (not who it says), 413 (too large) or 422 (not as it must be)."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Row(NamedTuple):
    """One event as the store keeps it: its exact bytes, two hashes, and columns as an index. Folded: `code` is None.

    `machine`: the agent id it is about, if that is not the chain's own (the collector speaks of others).
    """

    agent: str
    epoch: int
    seq: int
    uid: str | None
    time: int
    code: str | None
    severity: int
    machine: str | None
    host: str | None
    user: str | None
    medium: str | None
    serial: str | None
    label: str | None
    way: str | None
    program: str | None
    bytes: int | None
    leaf: Blob
    hash: Blob
    raw: Blob


class Examined(NamedTuple):
    """A batch found good in itself. `rows[i].hash` is the chain's hash after that event."""

    head: wire.Head
    prev: bytes
    hash: bytes
    rows: list[Row]


class Known(NamedTuple):
    """What is held of a chain: its last seq, the hash there, and the tree size that includes it."""

    last: int
    hash: bytes
    tree_size: int


class Verdict(NamedTuple):
    """`accept`: `rows` are to be added. `repeat`: all is held. `hole`, `fork`: the batch does not continue what is held."""

    kind: Literal["accept", "repeat", "hole", "fork"]
    rows: list[Row]


def unpack(body: bytes, packed: bool, limit: int) -> bytes:
    """The first `limit` + 1 bytes, at most, of what was sent; raises Bad if it is not whole gzip data."""
    if not packed:
        return body[: limit + 1]
    unpacker = zlib.decompressobj(wbits=31)
    try:
        out = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise Bad(422, f"the body is not gzip: {error}") from None
    if len(out) <= limit and not unpacker.eof:
        raise Bad(422, "the gzip body ends too early")
    if len(out) <= limit and unpacker.unused_data:
        raise Bad(422, "something follows the gzip body")
    return out


def _head_line(body: bytes, packed: bool) -> bytes:
    start = body[:MAX_HEAD_BYTES]
    if packed:
        try:
            start = zlib.decompressobj(wbits=31).decompress(body, MAX_HEAD_BYTES)
        except zlib.error as error:
            raise Bad(422, f"the body is not gzip: {error}") from None
    line, newline, _ = start.partition(b"\n")
    if not newline:
        raise Bad(422, f"the batch must begin with its head, a line of at most {MAX_HEAD_BYTES} bytes")
    return line


def _hash(text: str, what: str) -> bytes:
    try:
        got = bytes.fromhex(text)
    except ValueError:
        got = b""
    if len(got) != 32:
        raise Bad(422, f"the head's {what} is not a SHA-256 in hex")
    return got


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _row(seen: Seen, agent: str, raw: bytes, leaf: bytes, link: bytes) -> Row:
    sekisho = seen.unmapped.sekisho
    medium, login, process, protected = sekisho.medium, sekisho.login, sekisho.process, sekisho.protected
    user = login.user if login is not UNSET and login.user is not UNSET else None
    if user is None:
        named = seen.actor.get("user")
        user = _text(named.get("name")) if isinstance(named, dict) else None
    machine = _text(seen.device.get("uid"))
    exe = process.exe if process is not UNSET and process.exe is not UNSET else None
    return Row(
        agent,
        sekisho.epoch,
        sekisho.seq,
        seen.metadata.uid,
        seen.time,
        seen.metadata.event_code,
        seen.severity_id,
        machine if machine != agent else None,
        _text(seen.device.get("hostname")),
        user,
        medium.key if medium is not UNSET else None,
        medium.serial if medium is not UNSET and medium.serial is not UNSET else None,
        protected.label if protected is not UNSET else None,
        sekisho.way if sekisho.way is not UNSET else None,
        exe.rpartition("/")[2] if exe is not None else None,
        sekisho.bytes if sekisho.bytes is not UNSET else None,
        leaf,
        link,
        raw,
    )


def row_of(raw: bytes, agent: str, link: bytes) -> Row:
    """The row of an event known to be good (the collector's own). `link` is the chain's hash after it."""
    return _row(read(raw), agent, raw, hashlib.sha256(b"\0" + raw).digest(), link)


def _misplaced(seen: Seen, head: wire.Head, seq: int, prev: bytes) -> str | None:
    sekisho = seen.unmapped.sekisho
    if sekisho.seq != seq or seen.metadata.sequence != seq:
        return "says another seq"
    if sekisho.epoch != head.epoch:
        return "says another epoch"
    if sekisho.prev != prev.hex():
        return "says another prev"
    if seen.device.get("uid") != head.agent:
        return "says it is of another machine or of none (device.uid)"
    if not 1 <= len(seen.metadata.uid) <= 128 or not 1 <= len(seen.metadata.event_code) <= 64:
        return "has no usable uid or event_code"
    if seen.metadata.event_code in OURS:
        return f"is a {seen.metadata.event_code}, which only the collector makes"
    if seen.metadata.event_code not in codes.CODES and not re.match(r"copy\..", seen.metadata.event_code):
        return "has an event_code that is not known here"
    if not 0 <= seen.severity_id <= 99 or not 0 <= seen.time <= LATEST_MS:
        return "has an impossible time or severity"
    taken = sekisho.bytes
    if taken is not UNSET and not 0 <= taken <= LATEST_MS:
        return "has an impossible number of bytes"
    return None


def head_of(body: bytes, packed: bool, agent: str, public_key: bytes) -> wire.Head:
    """The batch's head, after its signature was found good. Raises Bad."""
    try:
        head = msgspec.json.decode(_head_line(body, packed), type=wire.Head)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Bad(422, f"the batch head can't be read: {error}") from None
    if head.agent != agent:
        raise Bad(401, "the head names another agent than the header Sekisho-Agent")
    try:
        chain.check(chain.head_bytes(head), head.sig, public_key)
    except chain.NotWhole:
        raise Bad(401, "the batch is not signed by the key this agent enrolled with") from None
    return head


def examine(body: bytes, packed: bool, agent: str, public_key: bytes, name: str = "") -> Examined:
    """Unpack and check a batch as sent by `agent`, whose Ed25519 key is `public_key`. Raises Bad.

    Its events are found under the `name` it enrolled with, whatever they call their host.
    """
    head_of(body, packed, agent, public_key)
    text = unpack(body, packed, wire.MAX_BATCH_BYTES)
    if len(text) > wire.MAX_BATCH_BYTES:
        raise Bad(413, f"the batch is larger than {wire.MAX_BATCH_BYTES} bytes when unpacked; send fewer events at once")
    try:
        head, lines = wire.read_batch(text)
    except wire.BadBatch as error:
        raise Bad(422, str(error)) from None
    if len(lines) > wire.MAX_EVENTS:
        raise Bad(413, f"the batch holds more than {wire.MAX_EVENTS} events; send fewer at once")
    if head.last > 1 << 53 or head.epoch > 1 << 53:
        raise Bad(422, "the head's seq or epoch is impossibly large")
    prev = link = _hash(head.prev, "prev")
    if head.first == 1 and prev != chain.genesis(agent, head.epoch):
        raise Bad(422, "the first event of an epoch must follow SHA-256 of agent id and epoch")
    sha256, rows = hashlib.sha256, []
    for seq, line in enumerate(lines, head.first):
        if len(line) > wire.MAX_EVENT_BYTES:
            raise Bad(413, f"event {seq} is larger than {wire.MAX_EVENT_BYTES} bytes")
        leaf = sha256(b"\0" + line).digest()
        folded = wire.folded(line)
        if folded is not None:
            if folded.seq != seq:
                raise Bad(422, f"the digest in place of event {seq} says another seq")
            link = sha256(link + bytes.fromhex(folded.digest)).digest()
            nothing = (None,) * 8
            rows.append(Row(agent, head.epoch, seq, None, 0, None, 0, *nothing, None, leaf, link, line))
            continue
        try:
            seen = read(line)
        except msgspec.MsgspecError as error:
            raise Bad(422, f"event {seq} can't be read: {error}") from None
        wrong = _misplaced(seen, head, seq, link)
        if wrong:
            raise Bad(422, f"event {seq} {wrong}")
        link = sha256(link + sha256(line).digest()).digest()
        row = _row(seen, agent, line, leaf, link)
        rows.append(row._replace(host=name) if name else row)
    if link.hex() != head.hash:
        raise Bad(422, "the head's hash is not that of its events")
    return Examined(head, prev, link, rows)


def judge(batch: Examined, known: Known, held_at_last: bytes | None) -> Verdict:
    """Compare a batch with what is held of its chain.

    `held_at_last` is the held hash after the batch's last event (after its `prev`, if it is empty); None if the chain
    that is held does not reach so far. An overlap that agrees is accepted for its new part.
    """
    head = batch.head
    if head.first > known.last + 1:
        return Verdict("hole", [])
    if head.last <= known.last:
        return Verdict("repeat" if held_at_last == batch.hash else "fork", [])
    overlap = known.last - head.first + 1
    before = batch.rows[overlap - 1].hash if overlap else batch.prev
    return Verdict("accept", batch.rows[overlap:]) if before == known.hash else Verdict("fork", [])
