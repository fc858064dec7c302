"""The spool: what was appended is there, whole and in order, whatever happens to the process, the disk or the file."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.contract import chain, wire
from agent.contract.chain import NotWhole
from agent.core.facts import Lost, Tampered
from agent.identity import Acknowledged
from agent.spool import Spool, SpoolError, last_seq, read_events, verify
from tests.spooled import NOW_MS, Machine, event, gap

ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path / "state")
    yield made
    made.spool.close()


def receipt(machine: Machine, last: int) -> wire.Receipt:
    return wire.Receipt(machine.identity.agent, machine.spool.epoch, last, machine.spool.hash_at(last).hex(), last)


def edit(machine: Machine, *statements: str) -> None:
    """What an intruder with root does to the file of a stopped agent."""
    machine.spool.close()
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_events_come_back_as_the_bytes_that_were_sealed(machine):
    sealed = machine.spool.append([event(), event("medium.unapproved")], b"counters")
    sealed += machine.spool.append([event()])
    assert list(read_events(machine.state_dir)) == [(1, sealed[0]), (2, sealed[1]), (3, sealed[2])]
    assert list(read_events(machine.state_dir, 1, 1)) == [(2, sealed[1])]
    assert machine.spool.state() == b"counters"
    assert last_seq(machine.state_dir) == 3
    whole = verify(machine.state_dir, machine.identity.public_key)
    assert (whole.first, whole.last, whole.digests, whole.vouched) == (1, 3, 0, 0)


def test_a_restart_continues_the_chain_and_keeps_the_counters(machine):
    machine.spool.append([event()], b"one")
    machine.restart(NOW_MS + 5)
    machine.spool.append([event("agent.stopped")])
    assert (machine.spool.epoch, machine.spool.head[0], machine.spool.state()) == (NOW_MS, 2, b"one")
    assert machine.spool.previous == {}
    assert machine.spool.last_code() == "agent.stopped"
    verify(machine.state_dir)
    assert machine.told == []


def test_the_files_are_for_their_owner_alone(machine):
    machine.spool.append([event()])
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in machine.state_dir.iterdir() if path.stat().st_mode & 0o077
    } == {}


def test_batches_cover_the_chain_and_respect_their_limits(machine):
    machine.spool.append([event(bulk=1000) for _ in range(25)])
    after, prev, batches = 0, chain.genesis(machine.identity.agent, NOW_MS), []
    while (batch := machine.spool.next_batch(after, 10, 6000)).lines:
        assert (batch.first, batch.prev) == (after + 1, prev)
        assert batch.hash == chain.fold(batch.prev, map(chain.digest, batch.lines))
        assert len(batch.lines) <= 10
        assert sum(map(len, batch.lines)) <= 6000
        after, prev = batch.last, batch.hash
        batches.append(batch)
    assert (after, len(batches) > 4) == (25, True)
    assert (batch.first, batch.last, batch.prev, batch.hash) == (26, 25, prev, prev)
    assert len(machine.spool.next_batch(0, 10, 1).lines) == 1, "one event always goes, however small the limit"


def test_an_event_too_large_for_any_collector_goes_as_its_digest_and_is_counted(machine):
    machine.spool.append([event(), event(size=70_000), event()])
    lines = machine.spool.next_batch().lines
    assert [wire.folded(line) is not None for line in lines] == [False, True, False]
    (lost,) = machine.told_of(Lost)
    assert (lost.reason, lost.count, lost.first_seq, lost.last_seq) == ("too_large", 1, 2, 2)
    assert machine.spool.next_batch().lines == lines
    assert len(machine.told_of(Lost)) == 1


def test_two_agents_can_not_share_a_spool(machine):
    with pytest.raises(SpoolError, match="another sekisho-agent is using it") as caught:
        Spool.open(machine.state_dir, machine.identity, 1 << 20, NOW_MS)
    assert caught.value.retry is False


# -- room -------------------------------------------------------------------------------------------------------------


def small(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "state", 1 << 20)


def test_acknowledged_events_stay_while_they_fit_and_the_oldest_go_first(tmp_path):
    machine = small(tmp_path)
    machine.spool.append([event(bulk=1600) for _ in range(300)])
    machine.spool.release(300, receipt(machine, 300))
    assert len(list(read_events(machine.state_dir))) == 300
    machine.spool.append([event(bulk=1600) for _ in range(200)])
    held = [seq for seq, _ in read_events(machine.state_dir)]
    assert held == list(range(held[0], 501))
    assert 1 < held[0] <= 301
    assert machine.told == [], "what the collector holds is no loss"
    assert wire.folded(machine.spool.next_batch(0).lines[0]), "their digests stay"
    machine.spool.close()


def test_a_full_spool_folds_low_severities_first_keeps_findings_and_counts_each(tmp_path):
    machine = small(tmp_path)
    findings = [event("copy.burst", bulk=900) for _ in range(100)]
    machine.spool.append([event(severity=3, bulk=900), *findings])
    for _ in range(20):
        machine.spool.append([event(severity=1, bulk=900) for _ in range(100)])
    held = {seq for seq, _ in read_events(machine.state_dir)}
    assert set(range(1, 102)) <= held, "a higher severity and findings stay"
    lost = machine.told_of(Lost)
    assert {each.reason for each in lost} == {"spool_full"}
    assert sum(each.count for each in lost) == 2101 - len(held)
    assert min(each.first_seq for each in lost) == 102
    assert machine.path.stat().st_size <= 1 << 20
    whole = verify(machine.state_dir)
    assert (whole.last, whole.digests) == (2101, 2101 - len(held))
    machine.spool.close()


def test_a_spool_full_of_findings_says_so_and_loses_none(tmp_path):
    machine = small(tmp_path)
    kept = 0
    with pytest.raises(SpoolError, match="full of findings") as caught:
        while True:
            kept += len(machine.spool.append([event("copy.burst", bulk=900) for _ in range(50)]))
    assert caught.value.retry
    assert len(list(read_events(machine.state_dir))) == kept == machine.spool.head[0]
    machine.spool.release(kept, receipt(machine, kept))
    machine.spool.append([event("copy.burst", bulk=900) for _ in range(50)])
    verify(machine.state_dir)
    machine.spool.close()


def test_a_loss_is_told_until_its_gap_event_is_in_the_chain(tmp_path):
    machine = small(tmp_path)
    machine.spool.append([event(bulk=900) for _ in range(1200)])
    (lost,) = machine.told_of(Lost)
    machine.told.clear()
    machine.spool.append([event()])
    assert machine.told_of(Lost) == [], "once a run"
    machine.restart()
    (again,) = machine.told_of(Lost)
    assert (again.count, again.first_seq, again.last_seq) == (lost.count, lost.first_seq, lost.last_seq)
    machine.spool.append([gap(again)])
    assert machine.spool.stats()["losses_untold"] == 0
    machine.told.clear()
    machine.restart()
    assert machine.told == []
    machine.spool.close()


def test_each_of_several_losses_is_told_in_the_same_run(tmp_path):
    machine = small(tmp_path)
    for _ in range(3):
        machine.spool.append([event(bulk=900) for _ in range(1200)])
        (lost,) = machine.told_of(Lost)  # its row has the number of the one before, which is settled and gone
        machine.told.clear()
        machine.spool.append([gap(lost)])
    assert machine.spool.stats()["losses_untold"] == 0
    machine.spool.close()


def test_no_more_is_given_up_than_there_is_need_for(tmp_path):
    machine = small(tmp_path)
    large = [event() for _ in range(500)]
    for each in large:
        each.message = os.urandom(4_000).hex()
    machine.spool.append(large)
    assert machine.spool.size() > machine.spool.max_bytes // 2
    machine.spool.close()


def test_a_collector_restored_from_a_backup_gets_digests_and_their_loss_is_counted(tmp_path):
    machine = small(tmp_path)
    machine.spool.append([event(bulk=1600) for _ in range(300)])
    machine.spool.release(300, receipt(machine, 300))
    machine.spool.append([event(bulk=1600) for _ in range(250)])
    cut = machine.spool.stats()["cut"]
    assert cut
    assert machine.spool.rewind(20)
    (lost,) = machine.told_of(Lost)
    assert (lost.reason, lost.count, lost.first_seq, lost.last_seq) == ("collector_lost", cut - 20, 21, cut)
    assert machine.spool.acknowledged == 20
    batch = machine.spool.next_batch()
    assert batch.first == 21
    assert wire.folded(batch.lines[0])
    machine.spool.close()


def uid_of(data: bytes) -> str:
    return json.loads(data)["metadata"]["uid"]


def test_even_digests_are_bounded_and_a_new_epoch_bridges_what_is_gone(tmp_path):
    machine = small(tmp_path)
    for _ in range(8):
        machine.spool.append([event(bulk=3000) for _ in range(200)], b"counters")
        machine.spool.release(machine.spool.head[0], receipt(machine, machine.spool.head[0]))
    base = machine.spool.stats()["first"] - 1
    assert base > 0
    assert machine.spool.rewind(base - 1) is False
    verify(machine.state_dir)
    former, held = machine.spool.head, [uid_of(data) for _, data in read_events(machine.state_dir)]
    machine.told.clear()
    machine.spool.begin_epoch(NOW_MS + 9, "collector_lost", base)
    assert (machine.spool.epoch, machine.spool.state()) == (NOW_MS + 9, b"counters")
    assert [uid_of(data) for _, data in read_events(machine.state_dir)] == held, "recorded anew, in order"
    assert machine.spool.previous == {"epoch": NOW_MS, "seq": former[0], "hash": former[1]}
    (lost,) = machine.told_of(Lost)
    count = 1601 - base - len(held)
    assert (lost.reason, lost.count, lost.first_seq, lost.last_seq) == ("collector_lost", count, base, 1600)
    assert machine.spool.check_alive() is None
    machine.spool.append([event()])
    verify(machine.state_dir)
    machine.spool.close()


# -- damage, rollback, removal ----------------------------------------------------------------------------------------


def test_a_damaged_file_is_kept_aside_and_a_new_epoch_names_the_old_head(machine):
    machine.spool.append([event() for _ in range(10)])
    head = machine.spool.head
    machine.identity.acknowledge(
        Acknowledged(agent=machine.identity.agent, epoch=NOW_MS, seq=4, hash=machine.spool.hash_at(4).hex())
    )
    machine.spool.close()
    with machine.path.open("r+b") as file:
        file.seek(0)
        file.write(b"\0" * 4096)
    machine.open(NOW_MS - 1000)
    assert machine.spool.epoch > NOW_MS, "later than the former epoch though the clock was set back"
    assert machine.spool.previous["seq"] == 4, (head, "the last head that is known")
    assert [fact.what for fact in machine.told_of(Tampered)] == ["spool_corrupt"]
    (lost,) = machine.told_of(Lost)
    assert (lost.reason, lost.first_seq, lost.count) == ("spool_corrupt", 5, None)
    assert (machine.state_dir / machine.told_of(Tampered)[0].detail["kept_as"]).exists()
    machine.restart()
    assert machine.spool.previous["seq"] == 4, "named again, as no event has named it yet"
    machine.spool.append([event()])
    verify(machine.state_dir, machine.identity.public_key)


def damage(machine: Machine, start: int = 8) -> None:
    """Overwrite most pages of a stopped agent's file, but for the first and the last ones."""
    machine.spool.close()
    pages = machine.path.stat().st_size // 4096
    with machine.path.open("r+b") as file:
        file.seek(start * 4096)
        file.write(os.urandom(4096 * (pages - start - 8)))


@pytest.mark.parametrize("who", ["the recorder", "the sender"])
def test_damage_that_shows_only_later_costs_no_new_event(machine, who):
    for _ in range(20):
        machine.spool.append([event(bulk=300) for _ in range(100)], b"counters")
    damage(machine)
    try:
        machine.open(NOW_MS + 1)
    except SpoolError:
        pytest.fail("a start must not fail for it")
    if who == "the sender" and machine.spool.epoch == NOW_MS:
        with pytest.raises(SpoolError, match="damaged"):
            machine.spool.next_batch(0)
    while machine.spool.epoch == NOW_MS:
        machine.spool.append([event(bulk=3000) for _ in range(100)])
    assert [fact.what for fact in machine.told_of(Tampered)] == ["spool_corrupt"]
    assert machine.told_of(Lost)[0].reason == "spool_corrupt"
    assert machine.spool.state() == b"counters", "they could still be read"
    machine.spool.append([event()])
    verify(machine.state_dir, machine.identity.public_key)
    assert machine.spool.check_alive() is None


@pytest.mark.parametrize("junk", [b"", b"not a database at all" * 400])
def test_a_file_that_is_no_spool_is_kept_aside(machine, junk):
    machine.spool.close()
    machine.path.write_bytes(junk)
    machine.open(NOW_MS + 1)
    assert [fact.what for fact in machine.told_of(Tampered)] == ["spool_corrupt"]
    machine.spool.append([event()])


def test_an_older_copy_put_back_is_noticed_before_it_forks_the_chain(machine, tmp_path):
    machine.spool.append([event() for _ in range(3)])
    machine.spool.close()
    shutil.copy(machine.path, tmp_path / "yesterday")
    machine.open().append([event() for _ in range(3)])
    machine.identity.acknowledge(Acknowledged(agent=machine.identity.agent, epoch=NOW_MS, seq=6, hash=machine.spool.head[1]))
    machine.spool.close()
    shutil.copy(tmp_path / "yesterday", machine.path)
    with pytest.raises(NotWhole, match=r"the tail was cut off: head\.json names event 6") as caught:
        verify(machine.state_dir, machine.identity.public_key)
    assert caught.value.seq == 4
    machine.open(NOW_MS + 1)
    assert [fact.what for fact in machine.told_of(Tampered)] == ["spool_rolled_back"]
    assert machine.spool.previous["seq"] == 6


def test_a_spool_deleted_while_the_agent_was_stopped_is_noticed(machine):
    machine.spool.append([event()])
    machine.identity.acknowledge(Acknowledged(agent=machine.identity.agent, epoch=NOW_MS, seq=1, hash=machine.spool.head[1]))
    machine.spool.close()
    machine.path.unlink()
    machine.open(NOW_MS + 1)
    assert [fact.what for fact in machine.told_of(Tampered)] == ["spool_missing"]
    assert machine.spool.previous["seq"] == 1


def test_a_file_removed_under_a_running_agent_is_noticed_and_mended_without_loss(machine):
    sealed = machine.spool.append([event() for _ in range(5)], b"counters")
    assert machine.spool.check_alive() is None
    for path in machine.state_dir.glob("spool.db*"):
        path.unlink()
    sealed += machine.spool.append([event()])
    assert machine.spool.check_alive() == "spool_missing"
    assert machine.spool.check_alive() is None
    sealed += machine.spool.append([event()])
    assert [data for _, data in read_events(machine.state_dir)] == sealed
    verify(machine.state_dir)


def test_a_file_replaced_under_a_running_agent_is_noticed_and_put_aside(machine, tmp_path):
    machine.spool.append([event()])
    shutil.copy(machine.path, tmp_path / "copy")
    shutil.move(tmp_path / "copy", machine.path)
    assert machine.spool.check_alive() == "spool_replaced"
    assert machine.spool.check_alive() is None
    assert list(machine.state_dir.glob("spool.db.foreign-*"))
    machine.spool.append([event()])
    assert verify(machine.state_dir).last == 2


def test_rows_removed_under_a_running_agent_are_noticed(machine):
    machine.spool.append([event() for _ in range(3)])
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        db.execute("DELETE FROM link WHERE seq = 3")
        db.commit()
    assert machine.spool.check_alive() == "spool_altered"


def test_another_machines_spool_is_not_continued(machine):
    machine.spool.append([event()])
    machine.machine_id.write_text("2" * 32 + "\n")
    former = machine.identity.agent
    machine.restart(NOW_MS + 1)
    assert machine.identity.former == former != machine.identity.agent
    assert [fact.what for fact in machine.told_of(Tampered)] == ["cloned_identity", "spool_foreign"]
    assert machine.spool.head[0] == 0


# -- verify names the first bad event ---------------------------------------------------------------------------------

TAMPERING = {
    "an altered byte": (["UPDATE content SET bytes = replace(bytes, 'mount', 'mounT') WHERE seq = 4"], 4, "was altered"),
    "a removed event": (["DELETE FROM link WHERE seq = 4", "DELETE FROM content WHERE seq = 4"], 4, "is missing"),
    "a removed content": (["DELETE FROM content WHERE seq = 4"], 4, "was removed"),
    "a removed link": (["DELETE FROM link WHERE seq = 10"], 10, "its link was removed"),
    "two swapped": (
        [
            "UPDATE content SET seq = -4 WHERE seq = 4",
            "UPDATE content SET seq = 4 WHERE seq = 5",
            "UPDATE content SET seq = 5 WHERE seq = -4",
        ],
        4,
        "was altered",
    ),
    "two swapped with their digests": (
        [
            f"UPDATE {table} SET seq = {new} WHERE seq = {old}"
            for table in ("content", "link")
            for old, new in ((4, -4), (5, 4), (-4, 5))
        ],
        4,
        "stands elsewhere",
    ),
    "the tail": (["DELETE FROM link WHERE seq > 7", "DELETE FROM content WHERE seq > 7"], 8, "the tail was cut off"),
    "the tail behind an acknowledged event": (
        ["DELETE FROM link WHERE seq > 5", "DELETE FROM content WHERE seq > 5", "DELETE FROM meta WHERE key = 'head'"],
        6,
        "the tail was cut off",
    ),
    "the start": (["UPDATE meta SET value = zeroblob(32) WHERE key = 'base_hash'"], 1, "the start of the chain"),
    "a content called cut": (
        ["DELETE FROM content WHERE seq = 4", "UPDATE link SET gone = 1, digest = zeroblob(32) WHERE seq = 4"],
        4,
        "does not follow",
    ),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_verify_names_the_first_bad_event(machine, how):
    machine.spool.append([event() for _ in range(10)])
    machine.spool.release(6, receipt(machine, 6))
    head = machine.spool.next_batch(0).head(NOW_MS)
    head.sig = chain.sign(chain.head_bytes(head), machine.identity.key)
    machine.spool.save_head(head)
    assert verify(machine.state_dir, machine.identity.public_key).vouched == 10
    statements, seq, why = TAMPERING[how]
    edit(machine, *statements)
    with pytest.raises(NotWhole, match=why) as caught:
        verify(machine.state_dir, machine.identity.public_key)
    assert caught.value.seq == seq


def test_a_chain_made_anew_without_the_key_does_not_fit_the_signed_head(machine):
    """An intruder rewrites an event and every link after it, consistently."""
    sealed = machine.spool.append([event() for _ in range(6)])
    head = machine.spool.next_batch(0).head(NOW_MS)
    head.sig = chain.sign(chain.head_bytes(head), machine.identity.key)
    machine.spool.save_head(head)
    machine.spool.close()
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        prev = db.execute("SELECT hash FROM link WHERE seq = 2").fetchone()[0]
        former = prev
        for seq in range(3, 7):
            data = sealed[seq - 1].replace(b'"mount"', b'"print"').replace(former.hex().encode(), prev.hex().encode())
            former = db.execute("SELECT hash FROM link WHERE seq = ?", (seq,)).fetchone()[0]
            prev = chain.link(prev, chain.digest(data))
            db.execute("UPDATE link SET digest = ?, hash = ? WHERE seq = ?", (chain.digest(data), prev, seq))
            db.execute("UPDATE content SET bytes = ? WHERE seq = ?", (data, seq))
        db.commit()
    assert verify(machine.state_dir).last == 6, "the links alone can't tell"
    with pytest.raises(NotWhole, match="is not the one that the signed head names"):
        verify(machine.state_dir, machine.identity.public_key)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6), st.booleans())
def test_any_bytes_in_the_files_place_raise_only_what_is_said(whole_file, changes, start):
    """Flip bytes anywhere: verify finds it whole (what was hit is not ours) or raises these two; a start survives it."""
    machine = whole_file
    data = bytearray(machine.good)
    for where, flip in changes:
        data[int(where * len(data))] ^= flip
    machine.path.write_bytes(data)
    with contextlib.suppress(NotWhole, SpoolError):
        list(read_events(machine.state_dir))
        verify(machine.state_dir, machine.identity.public_key)
    if start:
        machine.open(NOW_MS + 1)
        machine.spool.append([event()])
        machine.spool.close()
    for path in machine.state_dir.glob("spool.db*"):
        path.unlink()


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """A stopped machine and its spool's bytes."""
    machine = Machine(tmp_path_factory.mktemp("flip") / "state")
    machine.spool.append([event(bulk=200) for _ in range(60)], b"counters")
    machine.spool.close()
    machine.good = machine.path.read_bytes()
    return machine


def test_verify_and_reading_say_where_there_is_no_spool(tmp_path):
    with pytest.raises(SpoolError, match="there is no spool"):
        verify(tmp_path)
    (tmp_path / "spool.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(SpoolError, match="damaged"):
        list(read_events(tmp_path))


# -- crashes and full disks -------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from tests.spooled import Machine, event, gap
from agent.core.facts import Lost
machine = Machine(Path(sys.argv[1]), 1 << 20)
print(machine.spool.head[0], flush=True)
while True:
    gaps = [gap(lost) for lost in machine.told_of(Lost)]
    machine.told.clear()
    machine.spool.append([event(bulk=300) for _ in range(7)] + gaps, b"x" * 100)
    print(machine.spool.head[0], flush=True)
"""


def test_what_was_reported_as_appended_survives_kill_9(tmp_path):
    state_dir, dice, reported = tmp_path / "state", random.Random(20), 0
    for _ in range(16):
        with subprocess.Popen([sys.executable, "-c", _WRITER, state_dir], stdout=subprocess.PIPE, cwd=ROOT) as writer:
            for _ in range(dice.randrange(2, 60)):
                reported = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split(b"\n")[:-1]  # lines reported between our last look and the kill
            reported = int(rest[-1]) if rest else reported
        assert last_seq(state_dir) >= reported
        assert verify(state_dir).last >= reported
    machine = Machine(state_dir, 1 << 20)
    with contextlib.closing(sqlite3.connect(machine.path)) as db:
        gone, held = (db.execute(f"SELECT count(*) FROM link WHERE gone {sign} 0").fetchone()[0] for sign in (">", "="))
        (pending,) = db.execute("SELECT total(count) FROM lost").fetchone()
    from agent.contract.event import read

    told = [read(data).unmapped.sekisho.lost for _, data in read_events(state_dir)]
    assert gone == pending + sum(lost.count for lost in told if lost), "every folded event is counted exactly once"
    assert gone > 0
    assert gone + held == machine.spool.head[0]
    machine.spool.close()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode:
        pytest.skip("needs root and mount(8) for a tiny tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_half_writes_nothing_and_the_same_call_works_later(tiny_disk):
    machine = Machine(tiny_disk / "state", 64 << 20)
    kept: list[bytes] = []
    with pytest.raises(SpoolError, match="the disk is full; free some space") as caught:
        while True:
            waiting = [event(bulk=2000) for _ in range(20)]
            kept += machine.spool.append(waiting, b"counters")
    assert caught.value.retry
    assert [data for _, data in read_events(machine.state_dir)] == kept
    with pytest.raises(SpoolError):
        machine.spool.append(waiting)
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    kept += machine.spool.append(waiting)
    assert [data for _, data in read_events(machine.state_dir)] == kept
    assert verify(machine.state_dir).last == len(kept)
    machine.spool.close()


def test_on_a_full_disk_what_the_collector_holds_gives_way_to_what_is_new(tiny_disk):
    subprocess.run(["mount", "-o", "remount,size=4m", tiny_disk], check=True)
    machine = Machine(tiny_disk / "state", 8 << 20)
    kept = 0
    with pytest.raises(SpoolError, match="the disk is full"):
        while True:
            kept += len(machine.spool.append([event(bulk=2000) for _ in range(5)]))
    with (tiny_disk / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))  # whoever filled the disk does not stop at our file
    machine.spool.release(kept, receipt(machine, kept))
    assert machine.spool.acknowledged == kept
    for _ in range(5):
        kept += len(machine.spool.append([event(bulk=2000) for _ in range(5)], b"counters"))
    assert machine.spool.next_batch().last == kept
    assert machine.spool.stats()["cut"] > 0
    assert verify(machine.state_dir).last == kept
    machine.restart()
    assert machine.spool.head[0] == kept
    machine.spool.close()


def test_a_disk_gone_read_only_is_said_and_heals(tiny_disk):
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    machine = Machine(tiny_disk / "state", 64 << 20)
    machine.spool.append([event()])
    machine.spool.close()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(SpoolError) as caught:
        machine.open()
    assert caught.value.retry
    subprocess.run(["mount", "-o", "remount,rw", tiny_disk], check=True)
    machine.open().append([event()])
    assert verify(machine.state_dir).last == 2
    machine.spool.close()


# -- any sequence -----------------------------------------------------------------------------------------------------


class AnySequence(RuleBasedStateMachine):
    """Whatever is done in whatever order: the chain stays whole, and what is gone is acknowledged or counted once."""

    def __init__(self):
        super().__init__()
        self.dir = None

    @initialize()
    def begin(self):
        import tempfile

        self.dir = Path(tempfile.mkdtemp())
        self.machine = Machine(self.dir / "state", 160 << 10)
        self.bytes: dict[int, bytes] = {}
        self.counted = 0
        self.most_acked = 0

    def teardown(self):
        if self.dir:
            self.machine.spool.close()
            shutil.rmtree(self.dir)

    @rule(
        events=st.lists(
            st.tuples(st.sampled_from(["file.written", "file.copied_out", "copy.burst"]), st.integers(0, 6000)), max_size=12
        ),
        tell=st.booleans(),
    )
    def append(self, events, tell):
        told = self.machine.told_of(Lost) if tell else []
        made = [event(code, bulk=size) for code, size in events] + [gap(lost) for lost in told]
        first = self.machine.spool.head[0] + 1
        try:
            sealed = self.machine.spool.append(made)
        except SpoolError as error:
            assert error.code == "spool_full"
            assert self.machine.spool.head[0] == first - 1
            return
        self.bytes.update(enumerate(sealed, first))
        if tell:
            self.counted += sum(lost.count for lost in told)
            self.machine.told = [fact for fact in self.machine.told if fact not in told]

    @rule(part=st.floats(0, 1))
    def release(self, part):
        acked, last = self.machine.spool.acknowledged, self.machine.spool.head[0]
        upto = acked + int((last - acked) * part)
        self.machine.spool.release(upto, receipt(self.machine, upto))
        self.most_acked = max(self.most_acked, upto)

    @rule(part=st.floats(0, 1))
    def collector_is_restored(self, part):
        base = self.machine.spool.stats()["first"] - 1
        to = base + int((self.machine.spool.head[0] - base) * part)
        assert self.machine.spool.rewind(to)

    @rule(part=st.floats(0, 1))
    def refuse(self, part):
        self.machine.spool.refuse(int(self.machine.spool.head[0] * part))

    @rule()
    def restart(self):
        self.machine.told.clear()  # told in the former run, but no gap event was appended: told again
        self.machine.restart()

    @invariant()
    def whole(self):
        if self.dir is None:
            return
        machine = self.machine
        found = verify(machine.state_dir, machine.identity.public_key)
        assert found.last == machine.spool.head[0] == len(self.bytes)
        held = dict(read_events(machine.state_dir))
        assert all(self.bytes[seq] == data for seq, data in held.items())
        assert found.first - 1 <= self.most_acked
        stats = machine.spool.stats()
        gone = {seq for seq in range(found.first, found.last + 1) if seq not in held}
        assert len(gone) <= stats["cut"] + stats["folded"] + stats["refused"]
        with contextlib.closing(sqlite3.connect(machine.path)) as db:
            assert all(seq <= self.most_acked for (seq,) in db.execute("SELECT seq FROM link WHERE gone = 1"))
            (pending,) = db.execute("SELECT total(count) FROM lost").fetchone()
        counted = self.counted + pending
        assert counted >= stats["folded"] + stats["refused"]
        if found.first == 1:
            assert counted == stats["folded"] + stats["refused"]
        after, prev = found.first - 1, machine.spool.hash_at(found.first - 1)
        while (batch := machine.spool.next_batch(after, 50)).lines:
            for line in batch.lines:
                folded = wire.folded(line)
                prev = chain.link(prev, bytes.fromhex(folded.digest) if folded else chain.digest(line))
            after = batch.last
            assert prev == batch.hash
        assert (after, prev.hex()) == machine.spool.head
        assert stats["bytes"] <= machine.max_bytes


AnySequence.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_sequence_keeps_the_chain_whole_and_loses_nothing_uncounted = AnySequence.TestCase
