"""The sensors together: in which order they are asked, and what one of them must be told of what another one saw.

Owns: opening them (the file sensor with a fallback), the poll(2) set, and three rules of order. Whoever did something is
looked at before what was done is told, for it may be about to end. Media that came are told before their files, media that
went after them. And a shell's child, held at its redirection, is looked at again when it has become another program.
Every fact goes to `take` at once. Must not know the core beyond its wishes (`watches`), nor what becomes of a fact.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agent.core import facts
from agent.core.facts import Fact
from agent.core.pipeline import MountWatch
from agent.guard import Guard
from agent.sense import Sensor, SensorError
from agent.sense.fanotify import Fanotify
from agent.sense.holder import Holder
from agent.sense.mounts import Mounts
from agent.sense.processes import Processes
from agent.sense.sessions import Sessions
from agent.sense.simulated import Simulated
from agent.watching import Watching

_TREES_EVERY_MS = 5_000
_SWEEP_EVERY = 4
_GATHER_S = 0.01
_ATTENTIVE_MS = 60
ATTENTIVE_STEP_MS = 2


class Senses:
    """All sensors of one agent. `protect` and `simulated_dir` are the site's, `watches` asks the core for its media."""

    def __init__(
        self,
        protect: list[str],
        simulated_dir: str,
        guard: Guard,
        take: Callable[[Fact], None],
        watches: Callable[[], list[MountWatch]],
        now_ms: int,
    ) -> None:
        self.protect = protect
        self._guard, self._take, self._watches = guard, take, watches
        self._poll = select.poll()
        self._polled_holder = -1
        self._held: dict[int, int] = {}
        self._told_process: dict[int, facts.Process] = {}
        self._new_pids = self._stirred = False
        self._last_trees = self._mounts_at = self._ticks = 0
        self._no_udev = ""
        self._sensors: dict[str, Sensor] = {}
        self._open(simulated_dir, now_ms)

    def _open(self, simulated_dir: str, now_ms: int) -> None:
        self._processes = Processes(now_ms)
        self._sensors["processes"] = self._processes
        self._files: Any
        try:
            self._files = Fanotify()
            self._holder: Holder | None = Holder()
            self._sensors["holder"] = self._holder
        except (SensorError, PermissionError):
            from agent.sense.fallback import Fallback

            self._files, self._holder = Fallback(now_ms), None
        self._mounts = Mounts()
        self._sensors["mounts"] = self._mounts
        self.watching = Watching(self._files, self._holder, self._mounts)
        try:
            from agent.sense.udev import Udev

            self._sensors["udev"] = Udev()
        except (ImportError, OSError) as error:
            self._no_udev = f"udev can't be asked: {error}"
        self._simulated: Simulated | None = None
        if simulated_dir:
            self._simulated = Simulated(simulated_dir, self._mounts.mount_at)
            self._sensors["simulated"] = self._simulated
        self._sensors["sessions"] = Sessions()
        self._sensors["guard"] = self._guard
        self._sensors["files"] = self._files
        for name, sensor in self._sensors.items():
            if sensor.fileno() >= 0 and name != "holder":
                events = Mounts.EVENTS if name == "mounts" else select.POLLIN
                self._poll.register(sensor.fileno(), events)

    @property
    def pids(self) -> list[int]:
        """The processes that sense: this one, and the one that holds if it is there."""
        return [os.getpid(), *([self._holder.pid] if self._holder is not None and self._holder.pid else [])]

    @property
    def attentive(self) -> bool:
        """Whether somebody was held just now and may become another program: then do not sleep for long."""
        return bool(self._held)

    def also_poll(self, fd: int) -> None:
        """Wake for this descriptor, too."""
        self._poll.register(fd, select.POLLIN)

    def poll_no_more(self, fd: int) -> None:
        """Take it out again."""
        self._poll.unregister(fd)

    def wait(self, wait_ms: int) -> set[int]:
        """Descriptors that have something to read, after `wait_ms` at most."""
        self._poll_holder()
        return {fd for fd, _ in self._poll.poll(wait_ms)}

    def begin(self, now_ms: int) -> None:
        """What is there at the start."""
        self.look_for_trees(now_ms)
        self._look_at_folders()
        for name in ("mounts", "udev", "simulated", "sessions"):
            if name in self._sensors:
                self._take_all(self._sensors[name].drain(now_ms))
        self._follow_media(now_ms, starting=True)

    def gather(self, ready: set[int], now_ms: int) -> None:
        """All that is to be read."""
        gone = self._media_came(ready, now_ms)
        if self._files.fileno() in ready:
            self._read_files(now_ms)  # before the process table: whoever did it may be about to end
        self._take_all(gone)
        if gone:
            self._follow_media(now_ms)
        if self._stirred:  # not before: marking the bare folder under a medium that went would forget its paths
            self._stirred = False
            self._look_at_folders()
        self._read_processes(now_ms)
        self._look_again(now_ms)

    def tick(self, now_ms: int) -> None:
        """What must be asked by the clock, once a second."""
        self._take_all(self._guard.drain(now_ms))
        self._take_all(self._sensors["sessions"].drain(now_ms))
        if self._simulated:
            self._take_all(self._simulated.drain(now_ms))
            self._look_at_folders()
        self._take_all(self._files.grown(now_ms))
        self._ticks += 1
        if self._ticks % _SWEEP_EVERY == 0:
            self._take_all(self._files.sweep(now_ms))
        if self._holder is not None:
            self._holder.check(now_ms)
        if now_ms - self._last_trees >= _TREES_EVERY_MS or now_ms < self._last_trees:
            self.look_for_trees(now_ms)
        self._follow_media(now_ms)

    def last(self, now_ms: int) -> None:
        """What the kernel still has to tell, at the end."""
        self._read_processes(now_ms)
        self._take_all(self._files.drain(now_ms, self._on_pid))

    def coverage(self, now_ms: int) -> Iterator[facts.Coverage]:
        """What each sensor sees, and what should be watched and is not."""
        for sensor in self._sensors.values():
            yield sensor.coverage(now_ms)
        yield from self.watching.coverage(now_ms)
        if self._no_udev:
            yield facts.Coverage(at_ms=now_ms, sensor="udev", ok=False, blind=["devices"], why=self._no_udev)

    def close(self) -> None:
        """Give everything back."""
        for sensor in self._sensors.values():
            sensor.close()

    # -- order -------------------------------------------------------------------------------------------------------

    def _media_came(self, ready: set[int], now_ms: int) -> list[Fact]:
        """Take what tells of media that came, before their files are read; return what tells of those that went."""
        told: list[Fact] = []
        for name in ("mounts", "udev", "simulated"):
            sensor = self._sensors.get(name)
            if sensor is not None and sensor.fileno() in ready:
                told += sensor.drain(now_ms)
                if name == "mounts":
                    self.look_for_trees(now_ms)
                    told += self._simulated.look(now_ms) if self._simulated else ()
                self._stirred = True
        gone: list[Fact] = [fact for fact in told if isinstance(fact, facts.Unmounted | facts.Unplugged)]
        if told:
            self._take_all(fact for fact in told if fact not in gone)
            self._follow_media(now_ms)
        self._mounts_at = now_ms
        return gone

    def _poll_holder(self) -> None:
        """The process that holds comes and goes with the media, and its socket with it."""
        fd = self._holder.fileno() if self._holder is not None else -1
        if fd == self._polled_holder:
            return
        if self._polled_holder >= 0:
            with contextlib.suppress(KeyError, OSError):
                self._poll.unregister(self._polled_holder)
        if fd >= 0:
            self._poll.register(fd, select.POLLIN)
        self._polled_holder = fd
        if self._holder is not None and isinstance(self._files, Fanotify):
            self._files.ignore = {os.getpid(), self._holder.pid}

    def _read_processes(self, now_ms: int) -> None:
        for fact in self._processes.drain(now_ms):
            if isinstance(fact, facts.ProcGone):
                self._told_process.pop(fact.pid, None)
            self._take(fact)
        self._held_first(now_ms)

    def _held_first(self, now_ms: int) -> None:
        if self._holder is None:
            return
        for fact in self._holder.drain(now_ms):
            if isinstance(fact, facts.ProcSeen):
                fact.process = self._processes.learn(fact.process, now_ms)
                self._told_process[fact.process.pid] = fact.process
                self._held[fact.process.pid] = now_ms + _ATTENTIVE_MS
            self._take(fact)

    def _look_again(self, now_ms: int) -> None:
        """A shell's child is held at its redirection, before its exec: what it became is worth a second look."""
        for pid, until_ms in list(self._held.items()):
            if self._processes.changed(pid):
                self._on_pid(pid)
            if now_ms >= until_ms or now_ms < until_ms - _ATTENTIVE_MS:
                del self._held[pid]

    def _read_files(self, now_ms: int) -> None:
        self._new_pids = False
        self._take_all(self._files.drain(now_ms, self._on_pid))
        if not self._new_pids:
            time.sleep(_GATHER_S)  # nobody new: let the kernel merge and queue; each wake is paid by whoever opens

    def _on_pid(self, pid: int) -> None:
        """A pid in a buffer that was just read: look at it before anything else, it may be about to end."""
        now_ms = _now_ms()
        if pid not in self._told_process:
            self._held_first(now_ms)  # whoever was held is told of before its open is allowed
        process = self._processes.look(pid, now_ms)
        if self._told_process.get(pid) is process:
            return
        self._new_pids = True
        self._told_process[pid] = process
        self._take(facts.ProcSeen(at_ms=now_ms, process=process))
        elsewhere = list(self._mounts.also(pid, now_ms))  # what a container mounted for itself
        if elsewhere:
            self._take_all(elsewhere)
            self._follow_media(now_ms)

    def look_for_trees(self, now_ms: int) -> None:
        """Watch the protected directories that are there now."""
        self._last_trees = now_ms
        self.watching.protect(self.protect)

    def _look_at_folders(self) -> None:
        if self._simulated is not None:
            self.watching.expect(self._simulated.folders())

    def _follow_media(self, now_ms: int, starting: bool = False) -> None:
        since_ms = None if starting else self._mounts_at
        self._take_all(self.watching.follow(self._watches(), now_ms, since_ms))
        self._wake_on_exec(not self.watching.all_held)

    def _wake_on_exec(self, wanted: bool) -> None:
        """While a medium is there whose openers can't be held (a folder plays it), programs are looked at when they start."""
        fd = self._processes.wake_fd
        if wanted == self._processes.eager or fd < 0:
            return
        self._processes.eager = wanted
        if wanted:
            self._poll.register(fd, select.POLLIN)
        else:
            self._poll.unregister(fd)

    def _take_all(self, many: Iterable[Fact]) -> None:
        for fact in many:
            self._take(fact)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
