"""The tree against a naive RFC 6962, and checkpoints that only their own key can make."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from agent.contract.chain import NotWhole
from server_stub import tree


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + mth(leaves[:split]) + mth(leaves[split:])).digest()


def leaves_of(count: int) -> list[bytes]:
    return [f"leaf {n}".encode() for n in range(count)]


def subtree_of(leaves: list[bytes]) -> tree.Subtree:
    return lambda level, index: mth(leaves[index << level : (index + 1) << level])


def test_known_roots_of_certificate_transparency() -> None:
    # From the test data of Certificate Transparency's reference implementation (merkle_tree_test).
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    frontier = tree.Frontier()
    for each in inputs:
        frontier.add(tree.leaf_hash(bytes.fromhex(each)))
    assert frontier.root().hex() == "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    assert tree.Frontier().root().hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@given(st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_the_growing_edge_has_the_root_of_the_whole(count: int) -> None:
    leaves, frontier, kept = leaves_of(count), tree.Frontier(), {}
    for leaf in leaves:
        for level, index, node in frontier.add(tree.leaf_hash(leaf)):
            kept[level, index] = node
    assert frontier.root() == mth(leaves) == tree.root_at(count, subtree_of(leaves))
    assert tree.frontier_of(count, subtree_of(leaves)).roots == frontier.roots
    assert kept == {(8, n): mth(leaves[n << 8 : (n + 1) << 8]) for n in range(count >> 8)}


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_inclusion_holds_for_its_leaf_alone(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 130))
    index = data.draw(st.integers(0, size - 1))
    leaves = leaves_of(size)
    path = tree.inclusion(index, size, subtree_of(leaves))
    leaf, root = tree.leaf_hash(leaves[index]), mth(leaves)
    tree.check_inclusion(leaf, index, size, path, root)
    wrong = data.draw(st.sampled_from(["leaf", "path", "shorter", "longer", "root", "index"]))
    if wrong == "path" and not path:
        wrong = "longer"
    if wrong == "shorter" and not path:
        wrong = "leaf"
    if wrong == "index" and size == 1:
        wrong = "root"
    bad = bytes(32)
    spoiled = {
        "leaf": (bad, index, size, path, root),
        "path": (leaf, index, size, [*path[:-1], bad], root),
        "shorter": (leaf, index, size, path[:-1], root),
        "longer": (leaf, index, size, [*path, bad], root),
        "root": (leaf, index, size, path, bad),
        "index": (leaf, (index + 1) % size, size, path, root),
    }[wrong]
    with pytest.raises(NotWhole):
        tree.check_inclusion(*spoiled)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_consistency_holds_for_a_prefix_alone(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, 130))
    old = data.draw(st.integers(1, new))
    leaves = leaves_of(new)
    path = tree.consistency(old, new, subtree_of(leaves))
    old_root, new_root = mth(leaves[:old]), mth(leaves)
    tree.check_consistency(old, new, old_root, new_root, path)
    other = mth([*leaves[: old - 1], b"another"])
    with pytest.raises(NotWhole):
        tree.check_consistency(old, new, other, new_root, path)
    with pytest.raises(NotWhole):
        tree.check_consistency(old, new, old_root, new_root, [*path, bytes(32)])


def test_sizes_that_cannot_be_are_refused() -> None:
    nothing = subtree_of([])
    with pytest.raises(ValueError, match="not in a tree"):
        tree.inclusion(3, 3, nothing)
    with pytest.raises(ValueError, match="sizes"):
        tree.consistency(0, 3, nothing)
    with pytest.raises(ValueError, match="frontier"):
        tree.Frontier(3, [bytes(32)])
    with pytest.raises(NotWhole):
        tree.check_inclusion(bytes(32), 1, 1, [], bytes(32))
    with pytest.raises(NotWhole):
        tree.check_consistency(2, 1, bytes(32), bytes(32), [])
    with pytest.raises(NotWhole):
        tree.check_consistency(2, 4, bytes(32), bytes(32), [])


def test_a_checkpoint_is_read_only_with_its_own_key_and_name() -> None:
    key, other = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
    note = tree.checkpoint("sekisho/abc", 7, b"r" * 32, key)
    assert note.splitlines()[:2] == ["sekisho/abc", "7"]
    assert tree.read_checkpoint(note, "sekisho/abc", bytes(key.verify_key)) == (7, b"r" * 32)
    for spoiled, origin, public in (
        (note, "sekisho/abc", bytes(other.verify_key)),
        (note, "sekisho/xyz", bytes(key.verify_key)),
        (note.replace("\n7\n", "\n8\n"), "sekisho/abc", bytes(key.verify_key)),
        (note.partition("\n\n")[0], "sekisho/abc", bytes(key.verify_key)),
        ("", "sekisho/abc", bytes(key.verify_key)),
    ):
        with pytest.raises(NotWhole):
            tree.read_checkpoint(spoiled, origin, public)
