"""What travels between agent and collector: enrolment, batch heads, receipts, problems; and the size limits of each.

Owns: the Structs and their limits, the NDJSON form of a batch. Must not know HTTP, keys or stores.
A wire type may grow by fields with defaults; none changes its meaning or type.
"""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

MAX_EVENTS = 2_000
"""Events in one batch, at most."""
MAX_EVENT_BYTES = 64 << 10
"""One event's bytes, at most."""
MAX_BATCH_BYTES = 8 << 20
"""A batch after decompression, at most."""
MAX_BODY_BYTES = 4 << 20
"""A request body as sent, at most."""
MAX_SKEW_MS = 10 * 60_000
"""How far the time of a signed request without a batch may be from the collector's clock."""


class Enrol(Struct):
    """POST /v1/enroll. `key`: the agent's Ed25519 public key, base64."""

    token: str
    name: str
    key: str


class Enrolled(Struct):
    """Its answer. `key`: the collector's Ed25519 public key, base64, which the agent pins."""

    agent: str
    key: str
    register: Raw | UnsetType = UNSET


class Head(Struct):
    """First line of a batch: events `first`..`last` of the chain `(agent, epoch)`, from hash `prev` to `hash` (hex).

    A heartbeat is an empty batch: `first` = `last` + 1 and `prev` = `hash`. `sent_at` is ms by the agent's clock.
    """

    agent: str
    epoch: int
    first: int
    last: int
    prev: str
    hash: str
    sent_at: int
    sig: str = ""


class Receipt(Struct):
    """The collector's word that all events up to `last` of `(agent, epoch)` are durable, with the chain head it holds."""

    agent: str
    epoch: int
    last: int
    hash: str
    tree_size: int
    sig: str = ""


class Rotation(Struct):
    """A collector's change of key, signed by both: `old` and `new` are base64, `size` the log's size when it changed."""

    old: str
    new: str
    size: int
    old_sig: str = ""
    new_sig: str = ""


class Folded(Struct):
    """The line that stands for an event whose content is gone: its digest (SHA-256 of its bytes, hex) keeps the chain."""

    seq: int
    digest: str


class Problem(Struct):
    """RFC 9457 problem details. In a 409 `reason` is `hole` or `fork`, `expected` the seq wanted, `hash` the head held."""

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    reason: str | UnsetType = UNSET
    epoch: int | UnsetType = UNSET
    expected: int | UnsetType = UNSET
    hash: str | UnsetType = UNSET


class BadBatch(Exception):
    """A batch body that can't be read; the sentence says why."""


_head = msgspec.json.Decoder(Head)
_folded = msgspec.json.Decoder(Folded, strict=True)


def batch_body(head: Head, lines: Sequence[bytes]) -> bytes:
    """NDJSON: the head, then one line an event (its exact bytes, or a `Folded` line)."""
    return b"\n".join((msgspec.json.encode(head), *lines, b""))


def read_batch(body: bytes) -> tuple[Head, list[bytes]]:
    """Split an NDJSON batch into its head and its lines, unread. Raises BadBatch."""
    lines = body.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise BadBatch("the batch is empty: its first line must be the head")
    try:
        head = _head.decode(lines[0])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadBatch(f"the batch head can't be read: {error}") from None
    if head.first < 1 or head.last < head.first - 1 or head.epoch < 0:
        raise BadBatch("the batch head has an impossible range")
    if len(lines) - 1 != head.last - head.first + 1:
        raise BadBatch(f"the head says {head.last - head.first + 1} events, the batch holds {len(lines) - 1}")
    return head, lines[1:]


def folded(line: bytes) -> Folded | None:
    """The `Folded` that `line` is, or None if it is an event. Told apart by its first bytes, which no event has."""
    if not line.startswith(b'{"seq":'):
        return None
    try:
        got = _folded.decode(line)
        return got if len(bytes.fromhex(got.digest)) == 32 else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def folded_line(seq: int, digest: bytes) -> bytes:
    """The line for an event that was folded into its digest."""
    return msgspec.json.encode(Folded(seq, digest.hex()))


class ApprovalEntry(Struct, omit_defaults=True, kw_only=True):
    """One approval in the register: medium `key`, for whom, by whom, why, from when until when (ms; `until` absent: no end).

    `machines` (agent ids, names, or "@" and the name of a group) and `dirs` (labels or paths of protected directories) empty:
    all. `lost`: the medium was reported lost. `once`: good for one plugging in on one machine; `used_by` says on which agent.
    """

    id: str
    key: str
    owner: str = ""
    approver: str = ""
    purpose: str = ""
    since: int = 0
    until: int | None = None
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    revoked: bool = False
    reason: str = ""
    lost: bool = False
    once: bool = False
    used_by: str = ""


class RegisterBody(Struct, kw_only=True):
    """The register as signed: `version` grows with each change, `issued_at` is ms by the collector's clock; `groups` of
    machines by name."""

    version: int
    issued_at: int
    approvals: list[ApprovalEntry] = []
    groups: dict[str, list[str]] | UnsetType = UNSET


class SignedRegister(Struct):
    """`body` is the JSON text of a `RegisterBody`, exactly as signed (`sig`: Ed25519 over "sekisho/register/v1\\n" + body)."""

    body: str
    sig: str
