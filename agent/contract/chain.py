"""Hash links, epochs and batch heads: what makes the order and wholeness of events provable.

Owns: the hash recurrence, the exact bytes that are signed, and checking both. Keys are arguments, never files.
Must not know: where events are kept or sent. Layouts: docs/reference.md, "Chain, batches, receipts".

    hash_0 = SHA-256(agent id "\\n" epoch)                 hash_i = SHA-256(hash_{i-1} ‖ SHA-256(bytes_i))
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from agent.contract.wire import Head, Receipt, Rotation

_PIECE = 2047
"""From 2,048 bytes on, about what an event has, hashlib lets other threads in: that takes longer than hashing does."""


class NotWhole(Exception):
    """A chain, head or receipt does not hold. `seq` is the first bad event, 0 if it is not about one event."""

    def __init__(self, why: str, seq: int = 0) -> None:
        super().__init__(why)
        self.why, self.seq = why, seq


def agent_id(public_key: bytes) -> str:
    """The id of an agent (and of a collector's own chain): the first 32 hex digits of SHA-256 of its Ed25519 key."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def genesis(agent: str, epoch: int) -> bytes:
    """hash_0 of a chain: SHA-256 of the agent id, a newline and the epoch in decimal."""
    return hashlib.sha256(f"{agent}\n{epoch}".encode()).digest()


def digest(data: bytes) -> bytes:
    """SHA-256 of an event's exact bytes: what stays of it when its content goes."""
    found = hashlib.sha256(data[:_PIECE])
    for at in range(_PIECE, len(data), _PIECE):
        found.update(data[at : at + _PIECE])
    return found.digest()


def link(prev: bytes, event_digest: bytes) -> bytes:
    """hash_i from hash_{i-1} and the digest of event i."""
    return hashlib.sha256(prev + event_digest).digest()


def fold(prev: bytes, digests: Iterable[bytes]) -> bytes:
    """The hash after all `digests` in order, starting from `prev`."""
    for event_digest in digests:
        prev = hashlib.sha256(prev + event_digest).digest()
    return prev


def head_bytes(head: Head) -> bytes:
    """What an agent signs of a batch head: a fixed first line, then the fields but `sig`, one a line."""
    fields = (head.agent, head.epoch, head.first, head.last, head.prev, head.hash, head.sent_at)
    return "\n".join(("sekisho/batch/v1", *map(str, fields), "")).encode()


def receipt_bytes(receipt: Receipt) -> bytes:
    """What a collector signs of a receipt."""
    fields = (receipt.agent, receipt.epoch, receipt.last, receipt.hash, receipt.tree_size)
    return "\n".join(("sekisho/receipt/v1", *map(str, fields), "")).encode()


def check_any(data: bytes, sig: str, public_keys: Iterable[bytes]) -> None:
    """Raise NotWhole unless `sig` is one of these keys' signature over `data`."""
    for key in public_keys:
        try:
            return check(data, sig, key)
        except NotWhole:
            continue
    raise NotWhole("the signature does not fit")


def rotation_bytes(rotation: Rotation) -> bytes:
    """What the old and the new key of a collector both sign of a rotation."""
    return "\n".join(("sekisho/rotation/v1", rotation.old, rotation.new, str(rotation.size), "")).encode()


def successors(key: bytes, rotations: Sequence[Rotation]) -> list[bytes]:
    """`key` and the keys that took its place, in order; a rotation that both keys did not sign ends the list."""
    keys = [key]
    for rotation in rotations:
        try:
            old, new = (base64.b64decode(text, validate=True) for text in (rotation.old, rotation.new))
            if old != keys[-1]:
                continue
            check(rotation_bytes(rotation), rotation.old_sig, old)
            check(rotation_bytes(rotation), rotation.new_sig, new)
        except (NotWhole, ValueError):
            break
        keys.append(new)
    return keys


def request_bytes(method: str, target: str, agent: str, time_ms: str) -> bytes:
    """What an agent signs of a request without a batch; goes into the header `Sekisho-Signature` (base64)."""
    return "\n".join(("sekisho/request/v1", method, target, agent, time_ms, "")).encode()


def sign(data: bytes, key: SigningKey) -> str:
    """Ed25519 (RFC 8032) over `data`, base64."""
    return base64.b64encode(key.sign(data).signature).decode()


def check(data: bytes, sig: str, public_key: bytes) -> None:
    """Raise NotWhole unless `sig` (base64) is `public_key`'s Ed25519 signature over `data`."""
    try:
        VerifyKey(public_key).verify(data, base64.b64decode(sig, validate=True))
    except (BadSignatureError, ValueError, TypeError):
        raise NotWhole("the signature does not fit") from None
