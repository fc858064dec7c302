"""What waits for the disk: in order, small in memory, and given up by rank, each one counted."""

import os
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from agent.backlog import Backlog
from agent.contract.codes import FINDING
from agent.contract.event import Event, seal
from tests.spooled import event


def told(number: int, severity: int = 1, code: str = "file.copied_out") -> Event:
    made = event(code, severity=severity, size=200)
    made.time, made.metadata.uid = number, f"{number:08d}{os.urandom(12).hex()}"
    return made


def drained(backlog: Backlog) -> list[Event]:
    out: list[Event] = []
    while backlog:
        assert backlog.take(700) is backlog.take(700), "the same ones until they are done"
        out += backlog.take(700)
        backlog.done()
    return out


def test_what_was_packed_comes_out_byte_for_byte_and_in_order() -> None:
    backlog, put = Backlog(), [told(number, 1 + number % 3) for number in range(5_000)]
    before = [seal(each, 7, 8, bytes(32)) for each in put]
    for at in range(0, 5_000, 333):
        assert backlog.put(put[at : at + 333]) is None
    assert len(backlog) == 5_000
    assert [seal(each, 7, 8, bytes(32)) for each in drained(backlog)] == before


def test_50_000_events_that_wait_take_a_few_megabytes() -> None:
    backlog = Backlog()
    tracemalloc.start()
    for first in range(0, 50_000, 500):
        assert backlog.put([told(number) for number in range(first, first + 500)]) is None
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(backlog) == 50_000
    assert held < 12 << 20


def test_the_oldest_that_is_not_durable_is_known_while_it_is_being_written() -> None:
    backlog = Backlog()
    assert backlog.since_ms is None
    backlog.put([told(number) for number in range(100, 4_100)])
    assert backlog.since_ms == 100
    first = backlog.take(700)
    assert backlog.since_ms == 100, "taken is not done"
    backlog.done()
    assert backlog.since_ms == 100 + len(first)


@given(
    st.lists(st.sampled_from([(1, "file.history"), (2, "file.copied_out"), (4, "copy.burst"), (1, "agent.gap")]), max_size=40),
    st.integers(0, 3),
)
def test_given_up_is_counted_and_never_a_finding_or_a_gap(kinds: list[tuple[int, str]], taken: int) -> None:
    backlog, put, shed = Backlog(20_000), [], 0
    for turn, (severity, code) in enumerate(kinds):
        many = [told(turn * 200 + each, severity, code) for each in range(200)]
        put += many
        if (gone := backlog.put(many)) is not None:
            shed += gone.count
            assert gone.since_ms <= turn * 200 + 200
        if turn < taken:
            backlog.take(700)
    left = drained(backlog)
    assert len(left) + shed == len(put)
    uids = {each.metadata.uid for each in left}
    order = [each.metadata.uid for each in put if each.metadata.uid in uids]
    assert [each.metadata.uid for each in left] == order
    for each in put:
        if each.class_uid == FINDING or each.metadata.event_code == "agent.gap":
            assert each.metadata.uid in uids
