"""The RFC 6962 Merkle tree over all accepted events: hashes, root, proofs, and the signed checkpoint.

Owns: leaf and node hashing, the frontier (one hash per set bit of the size) that grows as leaves come, inclusion and
consistency proofs, and the checkpoint's text (C2SP tlog-checkpoint over C2SP signed-note). Pure: for proofs it asks a
function that is handed in for hashes of complete subtrees; where they are kept is the store's affair.
Must not know: events, agents, SQL.

A *complete subtree* `(level, index)` holds the 2**level leaves from `index << level` on.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from agent.contract.chain import NotWhole

Subtree = Callable[[int, int], bytes]
"""`(level, index)` → hash of that complete subtree."""

EMPTY = hashlib.sha256().digest()
"""Root of the empty tree (RFC 6962, 2.1)."""

TILE = 8
"""Hashes are kept for leaves and for every TILE-th level; those between are computed from at most 2**TILE of them."""


def leaf_hash(data: bytes) -> bytes:
    """RFC 6962, 2.1: SHA-256(0x00 ‖ data)."""
    return hashlib.sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """RFC 6962, 2.1: SHA-256(0x01 ‖ left ‖ right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: the roots of its complete subtrees, largest first."""

    def __init__(self, size: int = 0, roots: Sequence[bytes] = ()) -> None:
        if size.bit_count() != len(roots):
            raise ValueError("a frontier has one hash for each set bit of its size")
        self.size, self.roots = size, list(roots)

    def add(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Append a leaf hash; the `(level, index, hash)` of the kept levels (multiples of TILE, above 0) it completed."""
        done = []
        level, index, carry = 0, self.size, leaf
        while index & 1:
            carry = hashlib.sha256(b"\1" + self.roots.pop() + carry).digest()
            level, index = level + 1, index >> 1
            if level % TILE == 0:
                done.append((level, index, carry))
        self.roots.append(carry)
        self.size += 1
        return done

    def root(self) -> bytes:
        """The tree's root hash now."""
        if not self.roots:
            return EMPTY
        root = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            root = node_hash(left, root)
        return root

    def copy(self) -> "Frontier":
        """The same edge, to grow apart from this one."""
        return Frontier(self.size, self.roots)


def frontier_of(size: int, subtree: Subtree) -> Frontier:
    """The frontier of a tree of `size` leaves whose hashes are kept elsewhere."""
    roots, start = [], 0
    for level in reversed(range(size.bit_length())):
        if size >> level & 1:
            roots.append(subtree(level, start >> level))
            start += 1 << level
    return Frontier(size, roots)


def _range(start: int, end: int, subtree: Subtree) -> bytes:
    """Root over the leaves `start`..`end`-1, as RFC 6962's MTH splits them; `start` is where such a split begins."""
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return subtree(level, start >> level)
    split = 1 << (count - 1).bit_length() - 1
    return node_hash(_range(start, start + split, subtree), _range(start + split, end, subtree))


def root_at(size: int, subtree: Subtree) -> bytes:
    """The root the tree had at `size` leaves."""
    return _range(0, size, subtree) if size else EMPTY


def inclusion(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """Proof that leaf `index` is in the tree of `size` leaves, lowest hash first (RFC 6962, 2.1.1). Raises ValueError."""
    if not 0 <= index < size:
        raise ValueError("the leaf is not in a tree of that size")
    start, end, path = 0, size, []
    while end - start > 1:
        split = start + (1 << (end - start - 1).bit_length() - 1)
        if index < split:
            path.append(_range(split, end, subtree))
            end = split
        else:
            path.append(_range(start, split, subtree))
            start = split
    return path[::-1]


def consistency(old: int, new: int, subtree: Subtree) -> list[bytes]:
    """Proof that the tree of `new` leaves begins with that of `old` (RFC 6962, 2.1.2). Raises ValueError."""
    if not 0 < old <= new:
        raise ValueError("sizes must be 1 or more, and the old one not above the new one")
    start, end, whole, path = 0, new, True, []
    while end != old:
        split = start + (1 << (end - start - 1).bit_length() - 1)
        if old <= split:
            path.append(_range(split, end, subtree))
            end = split
        else:
            path.append(_range(start, split, subtree))
            start, whole = split, False
    if not whole:
        path.append(_range(start, end, subtree))
    return path[::-1]


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Raise NotWhole unless `path` leads from `leaf` to `root` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size:
        raise NotWhole("the proof is for a leaf outside the tree")
    node, last = index, size - 1
    got = leaf
    for step in path:
        if last == 0:
            raise NotWhole("the inclusion proof is too long")
        if node & 1 or node == last:
            got = node_hash(step, got)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            got = node_hash(got, step)
        node, last = node >> 1, last >> 1
    if last or got != root:
        raise NotWhole("the inclusion proof does not lead to the root")


def check_consistency(old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> None:
    """Raise NotWhole unless `path` shows that tree `new` begins with tree `old` (RFC 9162, 2.1.4.2)."""
    if not 0 < old <= new:
        raise NotWhole("the consistency proof is for impossible sizes")
    if old == new:
        if path or old_root != new_root:
            raise NotWhole("two trees of one size differ")
        return
    steps = list(path) if old & (old - 1) else [old_root, *path]
    if not steps:
        raise NotWhole("the consistency proof is empty")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise NotWhole("the consistency proof is too long")
        if node & 1 or node == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            second = node_hash(second, step)
        node, last = node >> 1, last >> 1
    if last or first != old_root or second != new_root:
        raise NotWhole("the consistency proof does not join the two roots")


def _key_hash(name: str, public_key: bytes) -> bytes:
    """C2SP signed-note: the first 4 bytes of SHA-256(name ‖ 0x0A ‖ 0x01 ‖ Ed25519 key)."""
    return hashlib.sha256(name.encode() + b"\n\x01" + public_key).digest()[:4]


def checkpoint(origin: str, size: int, root: bytes, key: SigningKey) -> str:
    """A signed C2SP tlog-checkpoint: origin, size and root, one a line, then the signature line of that origin's key."""
    text = f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"
    note = _key_hash(origin, bytes(key.verify_key)) + key.sign(text.encode()).signature
    return f"{text}\n— {origin} {base64.b64encode(note).decode()}\n"


def read_checkpoint(note: str, origin: str, public_key: bytes) -> tuple[int, bytes]:
    """Size and root from a checkpoint, after its signature was found good. Raises NotWhole."""
    text, _, signatures = note.partition("\n\n")
    lines = text.split("\n")
    if len(lines) < 3 or lines[0] != origin:
        raise NotWhole(f"the checkpoint is not one of {origin}")
    for line in signatures.splitlines():
        parts = line.split(" ")
        if len(parts) != 3 or parts[:2] != ["—", origin]:
            continue
        try:
            sig = base64.b64decode(parts[2], validate=True)
            if sig[:4] != _key_hash(origin, public_key):
                continue
            VerifyKey(public_key).verify(text.encode() + b"\n", sig[4:])
            return int(lines[1]), base64.b64decode(lines[2], validate=True)
        except (BadSignatureError, ValueError):
            continue
    raise NotWhole("no signature on the checkpoint fits the key")
