"""From the core to the spool, on a thread of its own, so that a slow disk never blocks whoever reads the kernel.

Owns: the thread, trying again while the disk refuses, and telling as a `Lost` fact what had to be given up meanwhile (which
events that are is `backlog.py`'s). Must not know what events mean.
"""

import threading
from collections.abc import Callable

from agent.backlog import Backlog
from agent.contract.form import AnyEvent
from agent.core.facts import Fact, Lost
from agent.spool import Spool, SpoolError

_GROUP = 512
"""Events of one transaction: four packs. More at once only take more memory: an fsync costs 0.3 µs an event already."""
_RETRY_S = 1.0


class Recorder:
    """Takes `(events, state)` from the sensing thread and makes them durable in order. `told` hears of losses."""

    def __init__(self, spool: Spool, told: Callable[[Fact], None], wake_sender: Callable[[], None]) -> None:
        self._spool, self._told, self._wake_sender = spool, told, wake_sender
        self._backlog = Backlog()
        self._state: bytes | None = None
        self._changed = threading.Condition()
        self._stop = False
        self.last_error = ""
        self.recorded = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many events are not durable yet."""
        return len(self._backlog)

    @property
    def since_ms(self) -> int | None:
        """The time of the oldest event that is not durable yet; None if there is none."""
        with self._changed:
            return self._backlog.since_ms

    @property
    def alive(self) -> bool:
        """False once the thread died, which must stop the watchdog's pings."""
        return self._thread.is_alive()

    def put(self, events: list[AnyEvent], state: bytes | None, now_ms: int) -> None:
        """Queue events with the core's state after them. Never blocks."""
        with self._changed:
            shed = self._backlog.put(events)
            if state is not None:
                self._state = state
            self._changed.notify()
        if shed is not None:
            reason = "disk_full" if self.last_error else "disk_slow"
            self._told(Lost(at_ms=now_ms, reason=reason, since_ms=shed.since_ms, until_ms=now_ms, count=shed.count))

    def close(self, within_s: float) -> bool:
        """Write what is waiting, then end. False if that did not succeed in time."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join(within_s)
        return not self._thread.is_alive() and not self._backlog

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._backlog and self._state is None and not self._stop:
                    self._changed.wait()
                if not self._backlog and self._state is None:
                    return
            if self._write():
                self._wake_sender()
                continue
            with self._changed:
                if self._stop:
                    return
                self._changed.wait_for(lambda: self._stop, _RETRY_S)  # not for more events: they can't be written either

    def _write(self) -> bool:
        """The oldest events, and the state once none waits behind them. What was written is not held on to."""
        with self._changed:
            group, state = self._backlog.take(_GROUP), self._state
            last = self._backlog.all_taken
        try:
            self._spool.append(group, state if last else None)
        except SpoolError as error:
            self.last_error = str(error)
            return False
        self.last_error = ""
        self.recorded += len(group)
        with self._changed:
            self._backlog.done()
            if last and self._state is state:
                self._state = None
        return True
