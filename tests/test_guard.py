"""The agent watches itself: the clock, a former run's end, its own files."""

import os
import time
from pathlib import Path

import pytest

from agent import guard
from agent.core.facts import Clock, Lost, Tampered

NOW_MS = time.time_ns() // 1_000_000


def make(state: Path, spool: str | None = None) -> guard.Guard:
    (state / "agent.key").write_bytes(b"k" * 32)
    return guard.Guard(str(state), lambda: spool)


def test_a_first_start_has_lost_nothing(tmp_path: Path) -> None:
    assert list(make(tmp_path).former_run(False, NOW_MS)) == []


@pytest.mark.parametrize(("clean", "reason"), [(True, "stopped"), (False, "not_running")])
def test_the_time_since_the_last_sign_of_life_is_lost(tmp_path: Path, clean: bool, reason: str) -> None:
    watched = make(tmp_path)
    watched.touch()
    os.utime(tmp_path / "alive", (NOW_MS / 1000 - 60, NOW_MS / 1000 - 60))
    (lost,) = watched.former_run(clean, NOW_MS)
    assert isinstance(lost, Lost)
    assert (lost.reason, lost.count) == (reason, None)
    assert abs(lost.until_ms - lost.since_ms - 60_000) < 10


def test_the_sign_of_life_speaks_only_for_what_is_durable(tmp_path: Path) -> None:
    durable_ms = NOW_MS - 60_000
    watched = guard.Guard(str(tmp_path), lambda: None, lambda: durable_ms)
    watched.touch()
    (lost,) = guard.Guard(str(tmp_path), lambda: None).former_run(False, NOW_MS)
    assert isinstance(lost, Lost) and lost.since_ms == durable_ms


def test_a_loss_that_is_told_but_not_written_yet_is_told_again_after_a_kill(tmp_path: Path) -> None:
    durable_ms = NOW_MS - 60_000
    watched = guard.Guard(str(tmp_path), lambda: None, lambda: durable_ms)
    watched.touch()
    (lost,) = watched.former_run(False, NOW_MS)
    durable_ms = NOW_MS - 1  # the disk is slow
    watched.touch()
    (again,) = guard.Guard(str(tmp_path), lambda: None).former_run(False, NOW_MS + 500)
    assert isinstance(lost, Lost) and isinstance(again, Lost) and again.since_ms == lost.since_ms
    durable_ms = NOW_MS + 1_000
    watched.touch()
    (later,) = guard.Guard(str(tmp_path), lambda: None).former_run(False, NOW_MS + 5_000)
    assert isinstance(later, Lost) and later.since_ms == durable_ms


def test_a_clock_turned_back_while_the_agent_was_down_is_said(tmp_path: Path) -> None:
    watched = make(tmp_path)
    watched.touch()
    os.utime(tmp_path / "alive", (NOW_MS / 1000 + 3600, NOW_MS / 1000 + 3600))
    clock, lost = watched.former_run(True, NOW_MS)
    assert isinstance(clock, Clock) and clock.jump_ms < -3_500_000
    assert isinstance(lost, Lost) and lost.since_ms <= lost.until_ms == NOW_MS


def test_a_clock_that_is_set_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make(tmp_path)
    assert list(watched.drain(NOW_MS)) == []
    true_time = time.time_ns
    monkeypatch.setattr(guard.time, "time_ns", lambda: true_time() - 3_600_000_000_000)
    (clock,) = watched.drain(NOW_MS)
    assert isinstance(clock, Clock) and abs(clock.jump_ms + 3_600_000) < 100
    assert list(watched.drain(NOW_MS)) == []


def test_a_suspend_is_said_and_is_neither_a_jump_nor_a_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make(tmp_path)
    asleep_ns = 60_000_000_000
    true_clock, true_time = time.clock_gettime_ns, time.time_ns
    monkeypatch.setattr(guard.time, "time_ns", lambda: true_time() + asleep_ns)
    monkeypatch.setattr(
        guard.time, "clock_gettime_ns", lambda which: true_clock(which) + (asleep_ns if which == time.CLOCK_BOOTTIME else 0)
    )
    (clock,) = watched.drain(NOW_MS)
    assert isinstance(clock, Clock) and abs(clock.suspended_ms - 60_000) < 100 and not clock.jump_ms
    assert list(watched.drain(NOW_MS)) == []


def test_standing_still_for_seconds_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make(tmp_path)
    true_clock = time.monotonic
    monkeypatch.setattr(guard.time, "monotonic", lambda: true_clock() + 7)
    (lost,) = watched.drain(NOW_MS)
    assert isinstance(lost, Lost) and (lost.reason, lost.count) == ("stalled", None)
    assert 7_000 <= lost.until_ms - lost.since_ms < 8_000
    assert list(watched.drain(NOW_MS)) == []


def test_a_key_that_was_replaced_or_removed_is_tampering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make(tmp_path)
    monkeypatch.setattr(guard, "_FILES_EVERY_S", 0.0)
    assert list(watched.drain(NOW_MS)) == []
    (tmp_path / "other").write_bytes(b"x" * 32)
    (tmp_path / "other").rename(tmp_path / "agent.key")
    assert [fact.what for fact in watched.drain(NOW_MS) if isinstance(fact, Tampered)] == ["key_replaced"]
    (tmp_path / "agent.key").unlink()
    assert [fact.what for fact in watched.drain(NOW_MS) if isinstance(fact, Tampered)] == ["key_missing"]
    assert not watched.coverage(NOW_MS).ok


def test_what_is_wrong_with_the_spool_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = make(tmp_path, "spool_missing")
    monkeypatch.setattr(guard, "_FILES_EVERY_S", 0.0)
    assert [fact.what for fact in watched.drain(NOW_MS) if isinstance(fact, Tampered)] == ["spool_missing"]
    assert list(watched.drain(NOW_MS)) == []
