"""Cosigning checkpoints, and asking for it: the C2SP protocols tlog-witness and tlog-cosignature, as texts and bytes.

Owns: what a witness signs and when (only after the new checkpoint was shown to contain the one it signed before), the body of
`POST /add-checkpoint`, verifier keys (`name+hash+key`), and the block that a printed report carries. Pure.
Must not know: HTTP, mail, files, when it is time; where sizes seen before are kept.
"""

import base64
import binascii
import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from agent.contract.chain import NotWhole
from server_stub import tree
from server_stub.refusal import Refusal

COSIGNATURE = 0x04
"""C2SP signed-note: the type of keys that make `cosignature/v1`."""
LOG = 0x01
MAX_PROOF = 63


class Refused(Refusal):
    """An `add-checkpoint` that is not cosigned: HTTP `status`; for 409 `size` is what this witness last saw."""

    def __init__(self, status: int, why: str, size: int = 0) -> None:
        super().__init__(why)
        self.status, self.why, self.size = status, why, size


class Asked(NamedTuple):
    """The body of an `add-checkpoint`: the size its sender thinks we saw, the proof from there, the checkpoint."""

    old: int
    path: list[bytes]
    note: str

    @property
    def origin(self) -> str:
        """Whose log it is."""
        return self.note.partition("\n")[0]


def vkey(name: str, key: bytes, kind: int = LOG) -> str:
    """A verifier key (C2SP signed-note): `name+hash+base64(kind ‖ key)`."""
    return f"{name}+{key_id(name, key, kind).hex()}+{base64.b64encode(bytes([kind]) + key).decode()}"


def key_id(name: str, key: bytes, kind: int = LOG) -> bytes:
    """The first 4 bytes of SHA-256(name ‖ 0x0A ‖ kind ‖ key)."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + key).digest()[:4]


def read_vkey(text: str) -> tuple[str, bytes]:
    """Name and Ed25519 key of a verifier key; its hash and kind are not asked for. Raises ValueError."""
    name, _, rest = text.strip().partition("+")
    try:
        data = base64.b64decode(rest.partition("+")[2], validate=True)
    except binascii.Error:
        data = b""
    if not name or len(data) != 33:
        raise ValueError(f'"{text[:60]}" is no key; `sekisho-collector key show` of the other collector prints it')
    return name, data[1:]


def body(old: int, path: Sequence[bytes], note: str) -> bytes:
    """An `add-checkpoint`."""
    lines = [f"old {old}", *(base64.b64encode(step).decode() for step in path)]
    return ("\n".join(lines) + "\n\n" + note).encode()


def read_body(data: bytes) -> Asked:
    """Read an `add-checkpoint`. Raises Refused 400."""
    try:
        head, _, note = data.decode().partition("\n\n")
        first, *proof = head.split("\n")
        word, _, number = first.partition(" ")
        if word != "old" or not number.isdecimal() or len(number) > 18 or len(proof) > MAX_PROOF:
            raise ValueError(first)
        path = [base64.b64decode(line, validate=True) for line in proof]
        if any(len(step) != 32 for step in path):
            raise ValueError("a hash of another length")
        return Asked(int(number), path, note)
    except ValueError:
        raise Refused(400, "the body is no add-checkpoint: old SIZE, a proof, an empty line, a checkpoint") from None


def judge(asked: Asked, key: bytes, seen: tuple[int, bytes] | None) -> tuple[int, bytes]:
    """Size and root of a checkpoint that may be cosigned; `seen` is what this witness signed last. Raises Refused."""
    try:
        size, root = tree.read_checkpoint(asked.note, asked.origin, key)
    except NotWhole as error:
        raise Refused(403, error.why) from None
    held, held_root = seen or (0, tree.EMPTY)
    if asked.old > size:
        raise Refused(400, "the checkpoint is smaller than the size it is said to follow")
    if asked.old != held:
        raise Refused(409, "another size was cosigned last", held)
    if held == size and held_root != root:
        raise Refused(409, "another tree of this size was cosigned: the log was rewritten", held)
    if held and size > held:
        try:
            tree.check_consistency(held, size, held_root, root, asked.path)
        except NotWhole as error:
            raise Refused(422, f"{error.why}: the log was rewritten, or the proof is wrong") from None
    return size, root


def _signed(note: str, at_s: int) -> bytes:
    return f"cosignature/v1\ntime {at_s}\n".encode() + note.partition("\n\n")[0].encode() + b"\n"


def cosign(note: str, name: str, key: SigningKey, at_s: int) -> str:
    """The signature line of a `cosignature/v1` over the checkpoint in `note`, made at `at_s` (s)."""
    sig = key.sign(_signed(note, at_s)).signature
    data = key_id(name, bytes(key.verify_key), COSIGNATURE) + struct.pack(">Q", at_s) + sig
    return f"— {name} {base64.b64encode(data).decode()}\n"


def check_cosignature(note: str, line: str, name: str, key: bytes) -> int:
    """When (s) `name` cosigned the checkpoint in `note`. Raises NotWhole."""
    parts = line.strip().split(" ")
    try:
        data = base64.b64decode(parts[2], validate=True)
        if parts[:2] != ["—", name] or len(data) != 76 or data[:4] != key_id(name, key, COSIGNATURE):
            raise ValueError(line)
        (at_s,) = struct.unpack(">Q", data[4:12])
        VerifyKey(key).verify(_signed(note, at_s), data[12:])
    except (ValueError, IndexError, BadSignatureError):
        raise NotWhole("the cosignature is not that witness's") from None
    return int(at_s)


def printed(note: str) -> str:
    """A checkpoint as a block for a printed page: what it proves is typed in again, or scanned, in three short lines."""
    text, _, signatures = note.partition("\n\n")
    origin, size, root = text.split("\n")[:3]
    rows = [f"log   {origin}", f"size  {size}", f"root  {root}"]
    rows += [f"sig   {line}" for line in signatures.strip().split("\n") if line]
    return "\n".join(rows) + "\n"
