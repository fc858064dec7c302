"""A sensor pointed at ourselves: the clock, the sign of life, the agent's own files.

Owns: noticing that the wall clock jumped against the monotonic one, that the machine was suspended or we stood still, that
a former run ended without a word (so that what the kernel told a dead agent is said to be lost), that the key or the spool
changed under us. Must not know how any of it is reported. The sign of life is the modification time of `STATE/alive`, which
costs no fsync.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.core.facts import Clock, Coverage, Fact, Lost, Tampered

_JUMP_MS = 2_000
_STALL_S = 5.0
"""We are asked once a second. Storms and slow disks may make that two or three; longer, and nobody was there."""
_ALIVE_EVERY_S = 5.0
_FILES_EVERY_S = 10.0


class Guard:
    """A Sensor asked by the clock. `spool_ok` returns a stable code of what is wrong with the spool, or None.

    `durable_ms` tells until when (ms) all that happened is durable: the sign of life never speaks for more, so that what a
    killed agent had read or still had to read, but not written, lies within the gap that the next run tells.
    """

    def __init__(
        self,
        state_dir: str,
        spool_ok: Callable[[], str | None],
        durable_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._state = Path(state_dir)
        self._spool_ok, self._durable_ms = spool_ok, durable_ms
        self._offset_ms = _wall_minus_monotonic()
        self._suspended_ms = _suspended_ms()
        self._asked_at = time.monotonic()
        self._alive_at = self._files_at = -1e9
        self._key = self._stat_key()
        self._said: set[str] = set()
        self._owed: tuple[int, int] | None = None
        """Since when and at what time a loss was told that may not be durable yet"""

    def fileno(self) -> int:
        """None to poll."""
        return -1

    def former_run(self, clean: bool, now_ms: int) -> Iterator[Fact]:
        """What a former run could not see: from its last sign of life until now, when all sensors watch. Call once, before the
        first `drain`."""
        try:
            last_ms = int((self._state / "alive").stat().st_mtime * 1000)
        except OSError:
            return
        if last_ms > now_ms + _JUMP_MS:
            yield Clock(at_ms=now_ms, jump_ms=now_ms - last_ms)
            last_ms = now_ms
        reason = "stopped" if clean else "not_running"
        yield self._owing(Lost(at_ms=now_ms, reason=reason, since_ms=min(last_ms, now_ms), until_ms=now_ms))

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """Since the last call: clock jumps, suspends, a stall of our own, altered files."""
        offset_ms = _wall_minus_monotonic()
        if abs(offset_ms - self._offset_ms) >= _JUMP_MS:
            yield Clock(at_ms=now_ms, jump_ms=offset_ms - self._offset_ms)
        self._offset_ms = offset_ms
        suspended_ms = _suspended_ms()
        if suspended_ms - self._suspended_ms >= _JUMP_MS:
            yield Clock(at_ms=now_ms, suspended_ms=suspended_ms - self._suspended_ms)
        self._suspended_ms = suspended_ms
        now = time.monotonic()
        if now - self._asked_at >= _STALL_S:  # it does not go on while the machine is suspended
            since_ms = now_ms - int((now - self._asked_at) * 1000)
            yield self._owing(Lost(at_ms=now_ms, reason="stalled", since_ms=since_ms, until_ms=now_ms))
        self._asked_at = now
        if now - self._alive_at >= _ALIVE_EVERY_S:
            self._alive_at = now
            self.touch()
        if now - self._files_at >= _FILES_EVERY_S:
            self._files_at = now
            yield from self._files(now_ms)

    def touch(self) -> None:
        """Leave the sign of life."""
        alive, at_ms = self._state / "alive", self._durable_ms()
        if self._owed is not None and at_ms > self._owed[1]:
            self._owed = None
        if self._owed is not None:
            at_ms = min(at_ms, self._owed[0])
        times = (at_ms * 1_000_000, at_ms * 1_000_000)
        try:
            os.utime(alive, ns=times)  # in one step: whoever is killed between two would have been alive until now
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                alive.touch(mode=0o600)
                os.utime(alive, ns=times)
        except OSError:
            return  # a state directory that is read-only or gone is reported by the spool, which can't write either

    def _owing(self, lost: Lost) -> Lost:
        """Until this is durable, the sign of life stays before it: killed now, the next run tells it."""
        since_ms = lost.since_ms if self._owed is None else min(lost.since_ms, self._owed[0])
        self._owed = (since_ms, lost.at_ms)
        return lost

    def coverage(self, now_ms: int) -> Coverage:
        """Healthy while nothing of ours was altered."""
        why = f"altered: {', '.join(sorted(self._said))}" if self._said else ""
        return Coverage(at_ms=now_ms, sensor="guard", ok=not self._said, sees=["own_files", "clock"], why=why)

    def close(self) -> None:
        """Leave a last sign of life."""
        self.touch()

    def _files(self, now_ms: int) -> Iterator[Fact]:
        found = {code for code in (self._spool_ok(), self._key_changed()) if code}
        for code in sorted(found - self._said):
            yield Tampered(at_ms=now_ms, what=code)
        self._said = found

    def _stat_key(self) -> tuple[int, int, int] | None:
        try:
            found = (self._state / "agent.key").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, stat.S_IMODE(found.st_mode)

    def _key_changed(self) -> str | None:
        now = self._stat_key()
        if now is None:
            return "key_missing"
        return "key_replaced" if now != self._key else None


def _suspended_ms() -> int:
    """How long the machine has been suspended since boot."""
    return (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) // 1_000_000


def _wall_minus_monotonic() -> int:
    """ms between the wall clock and CLOCK_BOOTTIME, which goes on through suspend; constant unless somebody sets the clock."""
    return (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 1_000_000
