"""From the core to the spool, on a thread of its own, so that a slow disk never blocks whoever reads the kernel.

Owns: the bounded queue of events that are not durable yet, and what is given up when the disk stays full for long: low
severities first, counted, told back as a `Lost` fact. Must not know what events mean beyond their severity and class.
"""

import threading
from collections.abc import Callable

from agent.contract.codes import FINDING
from agent.contract.event import Event
from agent.core.facts import Fact, Lost
from agent.spool import Spool, SpoolError

MAX_WAITING = 20_000
"""Events kept in memory while the disk refuses them."""
_GROUP = 2_000
_RETRY_S = 1.0


class Recorder:
    """Takes `(events, state)` from the sensing thread and makes them durable in order. `told` hears of losses."""

    def __init__(self, spool: Spool, told: Callable[[Fact], None], wake_sender: Callable[[], None]) -> None:
        self._spool, self._told, self._wake_sender = spool, told, wake_sender
        self._waiting: list[Event] = []
        self._state: bytes | None = None
        self._changed = threading.Condition()
        self._stop = False
        self._busy = False
        self.last_error = ""
        self.recorded = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many events are not durable yet."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """False once the thread died, which must stop the watchdog's pings."""
        return self._thread.is_alive()

    def put(self, events: list[Event], state: bytes | None, now_ms: int) -> None:
        """Queue events with the core's state after them. Never blocks."""
        with self._changed:
            self._waiting.extend(events)
            if state is not None:
                self._state = state
            dropped = self._shed() if len(self._waiting) > MAX_WAITING else []
            self._changed.notify()
        if dropped:
            since = min(event.time for event in dropped)
            reason = "disk_full" if self.last_error else "disk_slow"
            self._told(Lost(at_ms=now_ms, reason=reason, since_ms=since, until_ms=now_ms, count=len(dropped)))

    def close(self, within_s: float) -> bool:
        """Write what is waiting, then end. False if that did not succeed in time."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join(within_s)
        return not self._thread.is_alive() and not self._waiting

    def _shed(self) -> list[Event]:
        """Give up a tenth of the queue: never findings, lowest severity and oldest first."""
        order = sorted(range(len(self._waiting)), key=lambda at: (self._waiting[at].severity_id, at))
        gone = {at for at in order if self._waiting[at].class_uid != FINDING and not self._is_gap(at)}
        gone = set(sorted(gone, key=lambda at: (self._waiting[at].severity_id, at))[: MAX_WAITING // 10])
        dropped = [self._waiting[at] for at in sorted(gone)]
        self._waiting = [event for at, event in enumerate(self._waiting) if at not in gone]
        return dropped

    def _is_gap(self, at: int) -> bool:
        return self._waiting[at].metadata.event_code == "agent.gap"

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._state is None and not self._stop:
                    self._changed.wait()
                if not self._waiting and self._state is None:
                    return
                group, state = self._waiting[:_GROUP], self._state
                last = len(self._waiting) == len(group)
            try:
                self._spool.append(group, state if last else None)
            except SpoolError as error:
                self.last_error = str(error)
                with self._changed:
                    if self._stop:
                        return
                    self._changed.wait(_RETRY_S)
                continue
            self.last_error = ""
            self.recorded += len(group)
            with self._changed:
                written = set(map(id, group))
                self._waiting = [event for event in self._waiting if id(event) not in written]
                if last and self._state is state:
                    self._state = None
            self._wake_sender()
