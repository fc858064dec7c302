"""Chains, batch heads and receipts as vectors that any implementation can run, and the laws they rest on.

Each file in `vectors/` holds one case: `kind` "batch" (`head`, then `lines` as sent) or "receipt", the `key` that must have
signed it (Ed25519 public key, hex), and the verdict: `whole`, and if not, `seq` (the first event that does not fit, 0 if it is
not about one event).
`SEKISHO_REWRITE=1 pytest tests/test_chain.py` writes them anew; read the diff, for others rely on them.
"""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from agent.contract import chain, wire
from agent.contract.chain import NotWhole
from agent.contract.event import read
from server_stub import intake

VECTORS = Path(__file__).parent / "vectors"
KEY, OTHER = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))
AGENT = chain.agent_id(bytes(KEY.verify_key))
EPOCH = 1_760_000_000_000


def line(seq: int, prev: bytes, epoch: int = EPOCH, text: str = "") -> bytes:
    """An event's bytes: as small as they may be, but for text that shows UTF-8 and escapes."""
    sekisho = {"seq": seq, "epoch": epoch, "prev": prev.hex()}
    event = {
        "class_uid": 1001,
        "type_uid": 100101,
        "severity_id": 1,
        "time": EPOCH + seq,
        "metadata": {"uid": f"uid-{seq}{text}", "event_code": "file.written", "sequence": seq},
        "device": {"uid": AGENT, "hostname": "ws-042", "type_id": 2},
        "message": f"顧客 \\xff {text}",
        "unmapped": {"sekisho": sekisho},
    }
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def digest_of(data: bytes) -> bytes:
    folded = wire.folded(data)
    return bytes.fromhex(folded.digest) if folded else chain.digest(data)


def events(count: int, first: int = 1, prev: bytes | None = None) -> list[bytes]:
    prev = chain.genesis(AGENT, EPOCH) if prev is None else prev
    lines = []
    for seq in range(first, first + count):
        lines.append(line(seq, prev))
        prev = chain.link(prev, chain.digest(lines[-1]))
    return lines


def batch(
    lines: list[bytes], first: int = 1, prev: bytes | None = None, key: SigningKey = KEY, **changes: Any
) -> dict[str, Any]:
    """A batch over `lines` as they are; `changes` to the head are made before it is signed."""
    prev = chain.genesis(AGENT, EPOCH) if prev is None else prev
    head = wire.Head(AGENT, EPOCH, first, first + len(lines) - 1, prev.hex(), "", EPOCH + 10)
    head.hash = chain.fold(prev, map(digest_of, lines)).hex()
    head = msgspec.structs.replace(head, **changes)
    head.sig = chain.sign(chain.head_bytes(head), key)
    return {"kind": "batch", "head": msgspec.to_builtins(head), "lines": [each.decode() for each in lines]}


def after_signing(made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return made | {"head": made["head"] | changes}


def receipt(key: SigningKey = KEY, **changes: Any) -> dict[str, Any]:
    made = wire.Receipt(AGENT, EPOCH, 3, "ab" * 32, 42)
    made.sig = chain.sign(chain.receipt_bytes(made), key)
    return {"kind": "receipt", "receipt": msgspec.to_builtins(msgspec.structs.replace(made, **changes))}


def cases() -> dict[str, tuple[str, dict[str, Any], int | None]]:
    """name → what it shows, the case, the first bad seq (None: whole)."""
    three = events(3)
    prev = chain.fold(chain.genesis(AGENT, EPOCH), map(chain.digest, three))
    start = chain.genesis(AGENT, EPOCH)
    second = [three[0], wire.folded_line(2, chain.digest(three[1])), three[2]]
    misfolded = [three[0], wire.folded_line(2, bytes(32)), three[2]]
    wrong_prev = [three[0], line(2, bytes(32)), three[2]]
    inserted = [three[0], line(2, chain.link(start, chain.digest(three[0])), text="new"), three[1], three[2]]
    altered = [three[0], three[1].replace(b"file.written", b"file.staged"), three[2]]
    return {
        "batch-whole": ("three events of a new epoch", batch(three), None),
        "batch-whole-continued": ("two events that follow three", batch(events(2, 4, prev), 4, prev), None),
        "batch-whole-folded": ("the second event is only its digest", batch(second), None),
        "batch-whole-heartbeat": ("an empty batch", batch([], 4, prev), None),
        "batch-altered": ("the second event says another code; the head was made before", batch(three) | {
            "lines": [each.decode() for each in altered]}, 3),
        "batch-altered-head-anew": ("the same, and the head was made anew: the third event's prev tells", batch(altered), 3),
        "batch-removed": ("the second of three events is gone", batch([three[0], three[2]]), 2),
        "batch-removed-count": ("the head says three events, two are there", after_signing(
            batch(three), last=3) | {"lines": [three[0].decode(), three[2].decode()]}, 0),
        "batch-swapped": ("the second and third event changed places", batch([three[0], three[2], three[1]]), 2),
        "batch-inserted": ("a second event was put in; those after it say another seq", batch(inserted), 3),
        "batch-wrong-prev": ("the second event names another hash before it", batch(wrong_prev), 2),
        "batch-wrong-epoch": ("the first event says another epoch", batch([line(1, start, EPOCH + 1)]), 1),
        "batch-misfolded": ("the digest in place of the second event is another's", batch(misfolded), 3),
        "batch-wrong-genesis": ("a first event that does not follow SHA-256 of agent id and epoch", batch(
            [line(1, bytes(32))], 1, bytes(32)), 0),
        "batch-wrong-hash": ("the head's hash is not that of its events", batch(three, hash="00" * 32), 3),
        "batch-wrong-key": ("signed by another key", batch(three, key=OTHER), 0),
        "batch-head-altered": ("the head's time was altered after signing", after_signing(batch(three), sent_at=1), 0),
        "batch-sig-garbage": ("the signature is not base64", after_signing(batch(three), sig="?"), 0),
        "receipt-whole": ("a receipt", receipt(), None),
        "receipt-wrong-key": ("signed by another key", receipt(OTHER), 0),
        "receipt-later": ("it was made to cover one event more after signing", receipt(last=4), 0),
        "receipt-other-agent": ("it was given another agent's name", receipt(agent="f" * 32), 0),
        "receipt-other-tree": ("its tree size was altered", receipt(tree_size=43), 0),
    }  # fmt: skip


def check_batch(head: wire.Head, lines: list[bytes], key: bytes) -> None:
    """What a verifier has to do, in one place. Raises NotWhole."""
    chain.check(chain.head_bytes(head), head.sig, key)
    if len(lines) != head.last - head.first + 1:
        raise NotWhole("another number of events than the head says")
    prev = bytes.fromhex(head.prev)
    if head.first == 1 and prev != chain.genesis(head.agent, head.epoch):
        raise NotWhole("the epoch begins elsewhere")
    for seq, data in enumerate(lines, head.first):
        folded = wire.folded(data)
        if folded is None:
            stamp = read(data).unmapped.sekisho
            if (stamp.seq, stamp.epoch, stamp.prev) != (seq, head.epoch, prev.hex()):
                raise NotWhole("stands elsewhere", seq)
        elif folded.seq != seq:
            raise NotWhole("stands elsewhere", seq)
        prev = chain.link(prev, digest_of(data))
    if prev.hex() != head.hash:
        raise NotWhole("the head's hash is another", head.last)


def test_the_vectors_are_what_this_code_makes():
    made = {}
    for name, (shows, case, seq) in cases().items():
        verdict = {"whole": True} if seq is None else {"whole": False, "seq": seq}
        made[f"{name}.json"] = json.dumps(
            {"shows": shows, "key": bytes(KEY.verify_key).hex(), **case, **verdict}, indent=1, ensure_ascii=False
        )
    if os.environ.get("SEKISHO_REWRITE"):
        VECTORS.mkdir(exist_ok=True)
        for path in VECTORS.glob("*-*.json"):
            if path.name.startswith(("batch-", "receipt-")):
                path.unlink()
        for name, text in made.items():
            (VECTORS / name).write_text(text + "\n", "utf-8")
    found = {path.name: path.read_text("utf-8").rstrip("\n") for path in VECTORS.glob("*.json") if path.name in made}
    assert found == made, "run SEKISHO_REWRITE=1 pytest tests/test_chain.py and read the diff"


@pytest.mark.parametrize("name", cases())
def test_every_vector_gets_its_verdict(name):
    case = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    key = bytes.fromhex(case["key"])
    try:
        if case["kind"] == "receipt":
            got = msgspec.convert(case["receipt"], wire.Receipt)
            chain.check(chain.receipt_bytes(got), got.sig, key)
        else:
            check_batch(msgspec.convert(case["head"], wire.Head), [each.encode() for each in case["lines"]], key)
    except NotWhole as error:
        assert (case["whole"], case.get("seq")) == (False, error.seq), error.why
    else:
        assert case["whole"]


@pytest.mark.parametrize("name", [name for name in cases() if name.startswith("batch-")])
def test_the_collector_judges_every_vector_alike(name):
    case = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    body = wire.batch_body(msgspec.convert(case["head"], wire.Head), [each.encode() for each in case["lines"]])
    try:
        intake.examine(body, False, AGENT, bytes.fromhex(case["key"]))
    except intake.Bad:
        assert not case["whole"]
    else:
        assert case["whole"]


def test_an_agents_id_is_the_hash_of_its_key():
    assert AGENT == "56475aa75463474c0285df5dbf2bcab7"
    assert chain.genesis(AGENT, 7) == chain.digest(f"{AGENT}\n7".encode())


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(0, 20))
def test_a_chain_may_be_cut_anywhere_and_followed_from_there(datas, at):
    digests = [chain.digest(data) for data in datas]
    start = chain.genesis(AGENT, EPOCH)
    middle = chain.fold(start, digests[:at])
    assert chain.fold(middle, digests[at:]) == chain.fold(start, digests)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12), st.data())
def test_any_change_of_any_event_changes_the_head(datas, data):
    start, digests = chain.genesis(AGENT, EPOCH), [chain.digest(each) for each in datas]
    at = data.draw(st.integers(0, len(datas) - 1))
    changed = bytearray(datas[at])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    others = [*digests[:at], chain.digest(bytes(changed)), *digests[at + 1 :]]
    assert chain.fold(start, others) != chain.fold(start, digests)
    assert chain.fold(start, digests[:at] + digests[at + 1 :]) != chain.fold(start, digests)


@given(st.binary(), st.text(max_size=120))
def test_what_is_signed_is_only_accepted_unchanged(data, junk):
    key = bytes(KEY.verify_key)
    sig = chain.sign(data, KEY)
    chain.check(data, sig, key)
    for wrong, its_sig, its_key in (
        (data + b"x", sig, key),
        (data, junk, key),
        (data, sig, bytes(OTHER.verify_key)),
        (data, sig, b""),
    ):
        with pytest.raises(NotWhole):
            chain.check(wrong, its_sig, its_key)


@given(st.integers(1, 2**53), st.binary(min_size=32, max_size=32))
def test_a_digest_line_is_told_from_an_event(seq, digest):
    got = wire.folded(wire.folded_line(seq, digest))
    assert (got.seq, bytes.fromhex(got.digest)) == (seq, digest)
    assert wire.folded(line(seq, digest)) is None
    assert wire.folded(b'{"seq":1,"digest":"00"}') is None
    assert wire.folded(b'{"seq":1') is None


def test_no_two_kinds_of_signed_text_can_be_taken_for_each_other():
    head = wire.Head(AGENT, EPOCH, 1, 0, "00", "00", 1)
    texts = [
        chain.head_bytes(head),
        chain.receipt_bytes(wire.Receipt(AGENT, EPOCH, 0, "00", 1)),
        chain.request_bytes("GET", "/v1/register", AGENT, "1"),
        b"sekisho/register/v1\n{}",
    ]
    assert len({text.partition(b"\n")[0] for text in texts}) == len(texts)
