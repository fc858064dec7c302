"""Bundles: whole ones, and each way to break one, judged alike by the product and by a verifier written from the page alone.

`vectors/bundle-*.zip` with the verdicts in `vectors/bundles.json`: `kind` ("whole" or what is wrong) and the place named.
`SEKISHO_REWRITE=1 pytest tests/test_bundles.py` makes them anew; read the verdicts' diff, for others rely on them.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from agent.contract import chain, wire
from server_stub import bundle, retention, shares, signers, verify
from server_stub.bundle import BATCHES, EVENTS, GAPS, KEYS, LEAVES, MANIFEST
from tests import bundles, second_verifier
from tests.bundles import COLLECTOR, DAY, EPOCH, THIEF, A, B, Log, Machine, lines_of, reroot, with_batches, with_lines

VECTORS = Path(__file__).parent / "vectors"
ID_A, ID_B = (chain.agent_id(bytes(key.verify_key)) for key in (A, B))
Case = tuple[bytes, str, tuple[str, int, int] | None]


def first(path: Path) -> tuple[str, Any]:
    """The product's verdict, as the vectors give it."""
    bad = verify.verify(str(path)).bad
    return ("whole", None) if bad is None else (bad.kind, list(bad.place) if bad.place else None)


def second(path: Path) -> tuple[str, Any]:
    kind, place = second_verifier.verify(str(path))
    return kind, list(place) if place else None


def at(machine: str, seq: int) -> tuple[str, int, int]:
    return machine, EPOCH, seq


def resealed(log: Log, parts: bundles.Members, machine: Machine, key: SigningKey, since: int) -> bundles.Members:
    """The lines and batches of `machine` replaced by a chain made anew, signed by `key`; all else as it was."""
    lines = lines_of(parts)
    for n, line in enumerate(lines):
        got = json.loads(line)
        if got.get("device", {}).get("uid") == machine.id and got["metadata"]["sequence"] >= since:
            lines[n] = machine.lines[got["metadata"]["sequence"] - 1] + b"\n"

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["agent"] == machine.id:
                row |= {"start": machine.hashes[row["taken"] - 1].hex(), "prev": machine.hashes[row["first"] - 1].hex()}
                row["hash"] = machine.hashes[row["last"]].hex()
                bundles.resigned(row, key)

    return with_batches(with_lines(parts, lines), change)


def cases(room: Path) -> dict[str, Case]:
    """name → bundle, kind, place."""
    made: dict[str, tuple[bundles.Members, str, tuple[str, int, int] | None]] = {}
    room.mkdir()
    log = bundles.small_log(room)
    whole = bundles.members(log.bundle())
    lines = lines_of(whole)
    one = Machine(A, "ws-1")
    for seq in range(1, 8):
        one.event(**({"message": "nothing happened"} if seq == 5 else {}))

    def set_row(number: int, **changes: Any) -> bundles.Members:
        return with_batches(whole, lambda rows: rows[number].update(changes))

    made["whole"] = (whole, "whole", None)
    made["whole-filtered"] = (bundles.members(log.bundle(agent="ws-2")), "whole", None)
    made["whole-one-event"] = (bundles.members(log.bundle(q="ws-1-1760000000000-6")), "whole", None)
    made["whole-none"] = (bundles.members(log.bundle(user="nobody")), "whole", None)
    made["whole-earlier"] = (bundles.members(log.bundle(size=6)), "whole", None)
    # One line, as anybody with an editor could.
    made["altered"] = (
        with_lines(whole, [*lines[:1], lines[1].replace(b'ws-1"', b'ws-9"'), *lines[2:]]),
        "altered",
        at(ID_A, 2),
    )
    made["altered-last-of-chain"] = (
        with_lines(whole, [*lines[:-1], lines[-1].replace(b"copied_out", b"written")]),
        "altered",
        at(ID_A, 7),
    )
    made["altered-prev"] = (
        with_lines(whole, [*lines[:1], lines[1].replace(one.hashes[1].hex().encode(), b"0" * 64), *lines[2:]]),
        "altered",
        at(ID_A, 2),
    )
    made["altered-seq"] = (with_lines(whole, [lines[0].replace(b'"seq":1', b'"seq":99'), *lines[1:]]), "altered", at(ID_A, 1))
    made["altered-time"] = (
        with_lines(whole, [*lines[:3], lines[3].replace(b'"time":1760000001000', b'"time":1700000000000'), *lines[4:]]),
        "altered",
        at(ID_B, 1),
    )
    made["altered-noise"] = (with_lines(whole, [*lines[:2], b"{}\n", *lines[3:]]), "altered", at(ID_A, 3))
    made["removed"] = (with_lines(whole, lines[:1] + lines[2:]), "removed", at(ID_A, 2))
    made["removed-last"] = (with_lines(whole, lines[:-1]), "removed", at(ID_A, 7))
    made["removed-all"] = (with_lines(whole, []), "removed", at(ID_A, 1))
    made["inserted-copy"] = (with_lines(whole, [*lines[:2], lines[0], *lines[2:]]), "inserted", at(ID_A, 1))
    made["inserted-last"] = (with_lines(whole, [*lines, lines[-1]]), "inserted", at(ID_A, 7))
    stranger = Machine(THIEF, "ws-x")
    made["inserted-stranger"] = (
        with_lines(whole, [*lines[:3], stranger.event() + b"\n", *lines[3:]]),
        "inserted",
        at(stranger.id, 1),
    )
    made["reordered"] = (with_lines(whole, [lines[0], lines[2], lines[1], *lines[3:]]), "reordered", at(ID_A, 2))
    made["reordered-machines"] = (with_lines(whole, [*lines[:2], lines[3], lines[2], *lines[4:]]), "reordered", at(ID_A, 3))
    digest = json.loads(lines[7])["digest"].encode()
    made["altered-digest"] = (
        with_lines(whole, [*lines[:7], lines[7].replace(digest, b"0" * 64), *lines[8:]]),
        "altered",
        at(ID_B, 4),
    )
    made["altered-to-digest"] = (
        with_lines(whole, [wire.folded_line(1, chain.digest(lines[0][:-1])) + b"\n", *lines[1:]])
        | {LEAVES: bytes(32) + whole[LEAVES]},
        "tree",
        None,
    )
    # The batches: what was signed, and how it stood in the log.
    made["forged-head"] = (set_row(1, sent_at=EPOCH), "forged", at(ID_B, 1))
    made["forged-other-key"] = (with_batches(whole, lambda rows: bundles.resigned(rows[0], THIEF)), "forged", at(ID_A, 1))
    made["forged-chain-made-anew"] = (resealed(log, whole, one, THIEF, 5), "forged", at(ID_A, 1))
    made["removed-batch"] = (with_batches(with_lines(whole, lines[3:]), lambda rows: rows.pop(0)), "removed", at(ID_B, 1))
    made["removed-tail"] = (with_batches(with_lines(whole, lines[:-3]), lambda rows: rows.pop()), "removed", None)
    made["reordered-batches"] = (
        with_batches(with_lines(whole, lines[3:5] + lines[:3] + lines[5:]), lambda rows: rows.insert(0, rows.pop(1))),
        "removed",
        at(ID_B, 1),
    )

    def swap(rows: list[dict[str, Any]]) -> None:
        rows.insert(0, rows.pop(1))
        rows[0]["pos"], rows[1]["pos"] = 0, 2

    made["tree-batches-swapped"] = (with_batches(with_lines(whole, lines[3:5] + lines[:3] + lines[5:]), swap), "tree", None)
    made["unreadable-batches"] = (whole | {BATCHES: b"{}\n"}, "unreadable", None)
    made["unreadable-lacks-keys"] = ({name: data for name, data in whole.items() if name != KEYS}, "unreadable", None)
    made["forged-manifest"] = (
        whole | {MANIFEST: whole[MANIFEST].replace(b'"filter": {}', b'"filter": {"user": "x"}')},
        "forged",
        None,
    )
    part = bundles.members(log.bundle(agent="ws-2"))
    made["tree-gap-altered"] = (part | {GAPS: bytes(32) + part[GAPS][32:]}, "tree", None)
    made["unreadable-gaps-short"] = (part | {GAPS: part[GAPS][:-32]}, "unreadable", None)
    # Whoever has the collector's key can make a log anew, but no machine's signature.
    made["removed-by-the-collector"] = (
        reroot(
            with_batches(
                with_lines(whole, lines[:5] + lines[6:]),
                lambda rows: [rows.pop(2), [row.update(pos=row["pos"] - 1) for row in rows[2:]]],
            ),
            size=len(lines) - 1,
            lines=len(lines) - 1,
        ),
        "removed",
        at(ID_A, 4),
    )
    log.close()
    # A machine's own key can say anything from then on; not that it was said before.
    room = room.with_name("late")
    room.mkdir()
    log, late = Log(room), Machine(A, "ws-1")
    for day in (10, 11, 12, 3):
        late.event(at=EPOCH + day * DAY)
    log.take(late, 1, 4)
    made["back-dated"] = (bundles.members(log.bundle()), "back-dated", at(ID_A, 4))
    log.close()
    room = room.with_name("clock")
    room.mkdir()
    log, late = Log(room), Machine(A, "ws-1")
    late.event(at=EPOCH + 10 * DAY)
    late.event("agent.clock", at=EPOCH + 3 * DAY)
    late.event(at=EPOCH + 3 * DAY + 5)
    log.take(late, 1, 3)
    made["whole-clock-was-set"] = (bundles.members(log.bundle()), "whole", None)
    log.close()
    # Content that retention erased, a key that was changed, and the collector's own words.
    room = room.with_name("kept")
    room.mkdir()
    log = bundles.small_log(room)
    log.note("mori")
    log.writer.submit(lambda writer: retention.portion(writer, EPOCH + 10**12, 0)).result(10)
    log.note("mori")
    made["whole-erased"] = (bundles.members(log.bundle()), "whole", None)
    own = bundles.members(log.bundle(event="register.changed"))
    made["whole-collectors-own"] = (own, "whole", None)
    log.close()
    (room / "signing.key").write_bytes(b"old")
    renewed = SigningKey(bytes(range(50, 82)))
    store = bundles.SqliteStore(room / "collector.db")
    signers.rotate(store.session(), room / "signing.key", COLLECTOR, renewed, log.writer.size)
    store.close()
    log = Log(room, renewed)
    log.keys = {ID_A: bytes(A.verify_key), ID_B: bytes(B.verify_key)}
    log.note("sato")
    rotated = bundles.members(log.bundle())
    made["whole-key-changed"] = (rotated, "whole", None)
    keys = json.loads(rotated[KEYS])
    keys["rotations"][0]["old_sig"] = keys["rotations"][0]["new_sig"]
    made["forged-rotation"] = (rotated | {KEYS: json.dumps(keys).encode()}, "forged", None)
    log.close()
    return {name: (bundles.packed(parts), kind, place) for name, (parts, kind, place) in made.items()}


def fixed(parts: bundles.Members) -> bool:
    """Whether a bundle can be made again to the byte: what the collector says itself has random names in it."""
    return b"usb:1" not in parts[EVENTS] if EVENTS in parts else True


def verdicts() -> dict[str, Any]:
    return json.loads((VECTORS / "bundles.json").read_text("utf-8"))["verdicts"]


def test_the_vectors_are_what_this_code_makes(tmp_path: Path) -> None:
    made = cases(tmp_path / "made")
    expected = {name: [kind, list(place) if place else None] for name, (_, kind, place) in made.items()}
    if os.environ.get("SEKISHO_REWRITE"):
        for path in VECTORS.glob("bundle-*.zip"):
            path.unlink()
        for name, (data, _, _) in made.items():
            (VECTORS / f"bundle-{name}.zip").write_bytes(data)
        told = {"collector": bundles.b64(COLLECTOR), "verdicts": expected}
        (VECTORS / "bundles.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    assert verdicts() == expected, "run SEKISHO_REWRITE=1 pytest tests/test_bundles.py and read the diff"
    held = {path.name: bundles.members(path.read_bytes()) for path in VECTORS.glob("bundle-*.zip")}
    anew = {f"bundle-{name}.zip": bundles.members(data) for name, (data, _, _) in made.items()}
    assert held.keys() == anew.keys()
    assert {name: parts for name, parts in held.items() if fixed(parts)} == {
        name: parts for name, parts in anew.items() if fixed(parts)
    }


@pytest.mark.parametrize("name", sorted(path.stem.removeprefix("bundle-") for path in VECTORS.glob("bundle-*.zip")))
def test_every_vector_gets_its_verdict_from_both_verifiers(name: str) -> None:
    path = VECTORS / f"bundle-{name}.zip"
    expected = tuple(verdicts()[name])
    assert (first(path), second(path)) == (expected, expected)


def test_the_second_verifier_is_short_and_knows_nothing_of_ours() -> None:
    text = Path(second_verifier.__file__).read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert "import agent" not in text and "server_stub" not in text and "from tests" not in text


@pytest.mark.parametrize("name", ["whole", "whole-filtered", "whole-erased", "whole-key-changed"])
def test_any_byte_changed_in_what_is_proven_is_found_by_both(name: str, tmp_path: Path) -> None:
    chance, parts = random.Random(name), bundles.members((VECTORS / f"bundle-{name}.zip").read_bytes())
    path = tmp_path / "b.zip"
    unheard = {bundle.README}
    for _ in range(150):
        member = chance.choice([each for each, data in parts.items() if data and each not in unheard])
        data = bytearray(parts[member])
        spot = chance.randrange(len(data))
        data[spot] ^= 1 << chance.randrange(8)
        path.write_bytes(bundles.packed(parts | {member: bytes(data)}))
        got = first(path)[0], second(path)[0]
        # Names and white space in keys.json are nobody's proof; the last letter before "=" has bits that mean nothing.
        quiet = member == KEYS or (member in (bundle.SIGNATURE, bundle.CHECKPOINT) and spot >= len(data) - 4)
        assert "whole" not in got or quiet, (member, spot, got)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_in_any_other_order_or_choice_are_found_and_named_alike(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    parts = bundles.members((VECTORS / "bundle-whole.zip").read_bytes())
    lines = lines_of(parts)
    order = data.draw(st.lists(st.sampled_from(range(len(lines))), max_size=len(lines) + 2))
    path = tmp_path_factory.getbasetemp() / "any.zip"
    path.write_bytes(bundles.packed(parts | {EVENTS: b"".join(lines[n] for n in order)}))
    got = first(path)
    assert got == second(path)
    assert (got[0] == "whole") == (order == list(range(len(lines))))


@pytest.mark.parametrize(
    "harm",
    [
        lambda parts: parts | {EVENTS: b"x" * (40 << 20)},
        lambda parts: with_batches(parts, lambda rows: rows[0].update(last=10**12)),
        lambda parts: with_batches(parts, lambda rows: rows[0].update(last=-5)),
        lambda parts: with_batches(parts, lambda rows: rows[0].update(pos=2**52)),
        lambda parts: parts | {BATCHES: b"[" * 100_000},
        lambda parts: with_lines(parts, [b"[" * 60_000 + b"\n", *lines_of(parts)[1:]]),
        lambda parts: parts | {KEYS: parts[KEYS].replace(b"=", b"")},
        lambda parts: {},
    ],
    ids=["endless line", "endless batch", "backward batch", "far away", "nested batch", "nested event", "keys", "empty"],
)
def test_a_hostile_bundle_costs_little_and_is_bad(harm: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    path.write_bytes(bundles.packed(harm(bundles.members((VECTORS / "bundle-whole.zip").read_bytes()))))
    assert first(path)[0] != "whole"


def test_shares_find_what_one_walk_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are small: here every few lines are another process's share."""
    monkeypatch.setattr(shares, "SHARE_LINES", 3)
    monkeypatch.setattr(shares.os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    for name in (
        "whole",
        "whole-filtered",
        "whole-erased",
        "removed-last",
        "altered-last-of-chain",
        "back-dated",
        "tree-gap-altered",
    ):
        assert first(VECTORS / f"bundle-{name}.zip") == tuple(verdicts()[name]), name


def test_what_lies_beside_the_proof_is_said_not_to_be_covered(tmp_path: Path) -> None:
    """An evidence pack is a bundle with pages for people in it."""
    path = tmp_path / "case.zip"
    path.write_bytes(bundles.packed(bundles.members((VECTORS / "bundle-whole.zip").read_bytes()) | {"report.html": b"<p>"}))
    verdict = verify.verify(str(path))
    assert verdict.bad is None and verdict.uncovered == ["report.html"]
