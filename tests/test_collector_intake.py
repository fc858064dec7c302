"""What makes a batch good, and that nothing else does: every way to spoil one is caught."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from agent.contract import chain, wire
from server_stub import intake
from server_stub.intake import Bad, Known
from tests.collector_client import Client, copied, draft

KEY = SigningKey(b"a" * 32)


def agent_with(count: int, epoch: int = 1) -> Client:
    agent = Client(0, key=KEY, epoch=epoch)
    for n in range(count):
        agent.append(draft(agent=agent.id, at=1_700_000_000_000 + n, **copied(f"{n}.csv")))
    return agent


TEN = agent_with(10)


def examined(agent: Client, first: int, last: int) -> intake.Examined:
    return intake.examine(agent.batch(first, last), True, agent.id, agent.public)


def known(agent: Client, last: int) -> Known:
    return Known(last, agent.hashes[last], last)


def held(agent: Client, batch: intake.Examined, last: int) -> bytes | None:
    return agent.hashes[batch.head.last] if batch.head.last <= last else None


@given(st.integers(0, 10), st.integers(1, 11), st.integers(0, 10))
@settings(deadline=None)
def test_any_true_part_of_a_chain_is_judged_by_where_it_stands(last: int, first: int, to: int) -> None:
    if to < first - 1:
        first = to + 1
    batch = examined(TEN, first, to)
    verdict = intake.judge(batch, known(TEN, last), held(TEN, batch, last))
    if first > last + 1:
        assert verdict.kind == "hole"
    elif to <= last:
        assert verdict.kind == "repeat"
    else:
        assert verdict.kind == "accept"
        assert [row.seq for row in verdict.rows] == list(range(last + 1, to + 1))
        assert [row.hash for row in verdict.rows] == TEN.hashes[last + 1 : to + 1]
        assert [row.raw for row in verdict.rows] == TEN.lines[last:to]


@given(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10))
@settings(deadline=None)
def test_another_history_is_a_fork_however_it_overlaps(last: int, first: int, to: int) -> None:
    other = agent_with(0)
    for n in range(10):
        other.append(draft(agent=other.id, at=1_800_000_000_000 + n, **copied(f"other {n}.csv")))
    if to < first or first > last + 1:
        return
    batch = examined(other, first, to)
    verdict = intake.judge(batch, known(TEN, last), held(TEN, batch, last))
    assert verdict.kind == "fork"
    assert not verdict.rows


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    body = bytearray(gzip.decompress(TEN.batch(4, 7)))
    at = data.draw(st.integers(0, len(body) - 2))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != body[at]))
    body[at] = byte
    if body[at - 1 : at + 3] == body[at - 1 : at] + bytes([byte]) + b"==":
        return  # the last digit of base64 has four bits that say nothing
    with pytest.raises(Bad) as refused:
        intake.examine(bytes(body), False, TEN.id, TEN.public)
    assert refused.value.status in (401, 413, 422)


@given(st.permutations(range(4)), st.lists(st.integers(0, 3), max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_other_order_or_choice_of_events_passes(order: list[int], choice: list[int]) -> None:
    lines = TEN.lines[3:7]
    for picked in ([lines[n] for n in order], [lines[n] for n in choice]):
        if picked == lines:
            continue
        body = wire.batch_body(TEN.head(4, 7), picked)
        with pytest.raises(Bad):
            intake.examine(body, False, TEN.id, TEN.public)


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_noise_is_refused_whatever_it_is(noise: bytes) -> None:
    for packed in (True, False):
        with pytest.raises(Bad):
            intake.examine(noise, packed, TEN.id, TEN.public)


def test_a_folded_event_keeps_the_chain_and_has_no_code() -> None:
    lines = [*TEN.lines]
    lines[4] = wire.folded_line(5, chain.digest(lines[4]))
    body = wire.batch_body(TEN.head(1, 10), lines)
    rows = intake.examine(body, False, TEN.id, TEN.public).rows
    assert rows[4].code is None and rows[4].uid is None
    assert rows[-1].hash == TEN.hashes[10]
    for wrong in (wire.folded_line(6, chain.digest(TEN.lines[4])), wire.folded_line(5, bytes(32))):
        with pytest.raises(Bad):
            intake.examine(wire.batch_body(TEN.head(1, 10), [*lines[:4], wrong, *lines[5:]]), False, TEN.id, TEN.public)


def resigned(agent: Client, head: wire.Head) -> wire.Head:
    head.sig = chain.sign(chain.head_bytes(head), agent.key)
    return head


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        ({"agent": "f" * 32}, "another machine"),
        ({"at": -1}, "time"),
        ({"at": 1 << 60}, "time"),
        ({"bytes": -5}, "bytes"),
        ({"bytes": 1 << 60}, "bytes"),
    ],
)
def test_an_agent_cannot_sign_what_an_event_may_not_say(ours: dict[str, int], why: str) -> None:
    agent = agent_with(0)
    agent.append(draft(**{"agent": agent.id, **ours}))  # type: ignore[arg-type]
    with pytest.raises(Bad, match=why) as refused:
        examined(agent, 1, 1)
    assert refused.value.status == 422


def test_events_that_claim_another_place_are_refused() -> None:
    whole = agent_with(2)
    for spoil, why in (
        (lambda raw: raw.replace(b'"sequence":2', b'"sequence":3'), "seq"),
        (lambda raw: raw.replace(b'"seq":2', b'"seq":3'), "seq"),
        (lambda raw: raw.replace(b'"epoch":1', b'"epoch":2'), "epoch"),
        (lambda raw: raw.replace(whole.hashes[1].hex().encode(), b"0" * 64), "prev"),
    ):
        agent = agent_with(1)
        raw = spoil(whole.lines[1])
        agent.lines.append(raw)
        agent.hashes.append(chain.link(agent.hashes[-1], chain.digest(raw)))
        with pytest.raises(Bad, match=why):
            examined(agent, 1, 2)


def test_a_new_epoch_begins_at_its_own_genesis() -> None:
    fresh = agent_with(2, epoch=2)
    batch = examined(fresh, 1, 2)
    assert intake.judge(batch, Known(0, chain.genesis(fresh.id, 2), 0), None).kind == "accept"
    head = resigned(fresh, wire.Head(fresh.id, 2, 1, 0, "00" * 32, "00" * 32, 0))
    with pytest.raises(Bad, match="epoch"):
        intake.examine(wire.batch_body(head, []), False, fresh.id, fresh.public)


def test_a_strangers_bomb_is_not_unpacked() -> None:
    stranger = Client(0)
    head = stranger.head(1, 0)
    bomb = gzip.compress(wire.batch_body(head, []) + b"\0" * (64 << 20))
    with pytest.raises(Bad) as refused:
        intake.examine(bomb, True, TEN.id, TEN.public)
    assert refused.value.status == 401
    own = gzip.compress(wire.batch_body(TEN.head(1, 0), []) + b"\0" * (64 << 20))
    with pytest.raises(Bad) as refused:
        intake.examine(own, True, TEN.id, TEN.public)
    assert refused.value.status == 413
