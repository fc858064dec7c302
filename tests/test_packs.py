"""Packed contents: every event comes back as its exact bytes, whatever goes; the first layout still opens."""

import contextlib
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import packs
from agent.contract import chain, wire
from agent.contract.chain import NotWhole
from agent.spool import read_events, verify
from tests.spooled import NOW_MS, Machine, event


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path / "state")
    yield made
    made.spool.close()


def rows(machine: Machine) -> int:
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        return int(db.execute("SELECT count(*) FROM content").fetchone()[0])


def edit(machine: Machine, *statements: str) -> None:
    machine.spool.close()
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


lines = st.lists(st.binary(max_size=40).map(lambda raw: b"{" + raw.replace(b"\n", b"") + b"}"), max_size=300)


@settings(deadline=None, max_examples=60)
@given(st.lists(lines, max_size=4), st.sets(st.integers(1, 900)), st.integers(0, 900), st.integers(1, 200))
def test_what_is_not_dropped_stays_and_is_read_in_order(groups, going, until, few):
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE content (seq INTEGER PRIMARY KEY, bytes BLOB NOT NULL)")
        kept: dict[int, bytes] = {}
        for group in groups:
            first = max(kept, default=0) + 1
            packs.write(db, first, group)
            kept |= dict(enumerate(group, first))
        packs.drop(db, going)
        kept = {seq: data for seq, data in kept.items() if seq not in going}
        assert list(packs.read(db)) == sorted(kept.items())
        assert list(packs.read(db, until)) == sorted((seq, data) for seq, data in kept.items() if seq > until)
        old = [seq for seq in sorted(kept) if seq <= until]
        gone = packs.drop_oldest(db, until, few)
        assert gone == old[: len(gone)]
        assert len(gone) >= min(few, len(old))
        assert list(packs.read(db)) == sorted((seq, data) for seq, data in kept.items() if seq not in gone)


def test_a_storm_is_packed_and_every_event_of_it_is_found_alone(machine):
    sealed = machine.spool.append([event() for _ in range(1000)])
    assert rows(machine) == 8
    assert [data for _, data in read_events(machine.state_dir)] == sealed
    assert list(read_events(machine.state_dir, 640, 1)) == [(641, sealed[640])]
    assert machine.spool.next_batch(639, 3).lines == sealed[639:642]
    assert verify(machine.state_dir).last == 1000
    machine.spool.refuse(700)
    assert machine.spool.next_batch(699, 1).lines == [wire.folded_line(700, chain.digest(sealed[699]))]


def test_a_damaged_pack_is_found_and_the_others_are_read(machine):
    sealed = machine.spool.append([event() for _ in range(384)])
    edit(machine, "UPDATE content SET bytes = CAST(substr(bytes, 1, 50) || x'00' || substr(bytes, 52) AS BLOB) WHERE seq = 129")
    with pytest.raises(NotWhole, match="event 129 was altered"):
        verify(machine.state_dir)
    read = dict(read_events(machine.state_dir))
    assert [read[seq] for seq in (1, 128, 257, 384)] == [sealed[seq - 1] for seq in (1, 128, 257, 384)]


def test_an_event_taken_out_of_a_pack_is_missed(machine):
    sealed = machine.spool.append([event() for _ in range(20)])
    machine.spool.close()
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        packs.drop(db, [7])
        db.commit()
    with pytest.raises(NotWhole, match="the content of event 7 was removed"):
        verify(machine.state_dir)
    assert [seq for seq, _ in read_events(machine.state_dir)] == [seq for seq in range(1, 21) if seq != 7]
    assert dict(read_events(machine.state_dir))[8] == sealed[7]


def test_a_row_put_over_a_pack_hides_nothing(machine):
    sealed = machine.spool.append([event() for _ in range(40)])
    edit(machine, "INSERT INTO content VALUES (5, '{}')")
    assert [seq for seq, _ in read_events(machine.state_dir)] == list(range(1, 41))
    assert dict(read_events(machine.state_dir))[5] == sealed[4]


def test_a_spool_of_the_first_layout_opens_goes_on_and_is_whole(machine):
    """The first layout had one row an event, and version 1."""
    sealed = machine.spool.append([event() for _ in range(40)])
    machine.spool.close()
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        db.execute("DELETE FROM content")
        db.executemany("INSERT INTO content VALUES (?, ?)", enumerate(sealed, 1))
        db.execute("PRAGMA user_version = 1")
        db.commit()
    assert verify(machine.state_dir).last == 40
    machine.restart(NOW_MS + 1)
    assert machine.told == []
    sealed += machine.spool.append([event() for _ in range(40)])
    assert [data for _, data in read_events(machine.state_dir)] == sealed
    assert verify(machine.state_dir).last == 80
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,), "an agent that knows no packs must not open it"
