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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from agent import config
from agent.contract.event import path_bytes, path_text
from agent.core import facts
from agent.core.doubts import Doubt
from agent.core.facts import Fact
from agent.core.inbound import MOST_ASKED as MOST_TRACED
from agent.core.inbound import Trace
from agent.core.pipeline import MountWatch
from agent.core.staging import MOST_ASKED, Ask
from agent.guard import Guard
from agent.sense import Sensor, SensorError, autorun, disproof, rawread, standing
from agent.sense.allowance import Allowance
from agent.sense.arming import READ_MS as ARMED_MS
from agent.sense.arming import Arming
from agent.sense.fanotify import Fanotify
from agent.sense.holder import Holder
from agent.sense.mounts import Mounts
from agent.sense.nodes import Nodes
from agent.sense.origins import Origins
from agent.sense.processes import Processes
from agent.sense.refusing import Refusing, Rule
from agent.sense.rights import RightsWatch
from agent.sense.sessions import Sessions
from agent.sense.shares import Shares
from agent.sense.simulated import Simulated
from agent.sense.sockets import Sockets
from agent.sense.usbfs import Usbfs
from agent.watching import Watching

_TREES_EVERY_MS = 5_000
_GONE = (facts.Unmounted, facts.Unplugged)
_SWEEP_EVERY = 4
_GATHER_S = 0.01
_ATTENTIVE_MS = 60
_MOUNTING_MS = 1_000
ATTENTIVE_STEP_MS = 2


class Senses:
    """All sensors of one agent. `protect` and `simulated_dir` are the site's, `watches` asks the core for its media.

    `read_until_ms`: all that happened to files until then was taken.
    """

    def __init__(
        self,
        protect: list[str],
        simulated_dir: str,
        guard: Guard,
        take: Callable[[Fact], None],
        watches: Callable[[], list[MountWatch]],
        now_ms: int,
        staging: config.Staging | None = None,
        own: Iterable[str] = (),
        rights_every_s: float = 0.0,
    ) -> None:
        self.protect = protect
        self._staging, self._own = staging, [os.path.realpath(each) for each in own]
        self._guard, self._take, self._watches = guard, take, watches
        self._poll = select.poll()
        self._polled_holder = -1
        self._held: dict[int, int] = {}
        self._mounting: dict[int, int] = {}
        self._seen_trees: set[str] = set()
        self._asked: deque[Ask] = deque(maxlen=MOST_ASKED)
        self._traces: deque[Trace] = deque(maxlen=MOST_TRACED)
        self._origins = Origins()
        self._allowance = Allowance()
        self._doubting = Allowance(saved_s=1.0)  # of its own: a join that nobody doubts for want of time is a false one
        self._guessing = Allowance(share=0.05, saved_s=0.2)  # of its own: what is joined already comes first
        self._told_process: dict[int, facts.Process] = {}
        self._refused: list[facts.Refused] = []
        self._new_pids = self._stirred = False
        self._last_trees = self._mounts_at = self._ticks = 0
        self.read_until_ms = now_ms
        self._no_udev = ""
        self._rights = RightsWatch(rights_every_s)
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
            self._files.marks.on_folder = self._holder.hold_folder
        except (SensorError, PermissionError):
            from agent.sense.fallback import Fallback

            self._files, self._holder = Fallback(now_ms), None
        self._mounts = Mounts()
        self._sensors["mounts"] = self._mounts
        self._nodes = Nodes() if self._holder is not None else None
        if self._nodes is not None:
            self._poll.register(self._nodes.fileno(), select.POLLIN)
        self._usbfs: Usbfs | None = None
        if self._holder is not None:
            self._usbfs = self._sensors["usbfs"] = Usbfs()
        self._shares: Shares | None = None
        if self._holder is not None:
            self._shares = self._sensors["shares"] = Shares()
        self.watching = Watching(self._files, self._holder, self._mounts, self._shares)
        self.arming: Arming | None = None
        if isinstance(self._files, Fanotify) and self._staging is not None and self._staging.watch:
            holder = self._holder if self._staging.hold else None
            self.arming = Arming(self._files.marks, self._files.paths, holder, self._processes.parent, self._own)
        self._udev: Any = None
        try:
            from agent.sense.udev import Udev

            self._udev = self._sensors["udev"] = Udev()
        except (ImportError, OSError) as error:
            self._no_udev = f"udev can't be asked: {error}"
        self._simulated: Simulated | None = None
        if simulated_dir:
            self._simulated = Simulated(simulated_dir, self._mounts.mount_at)
            self._sensors["simulated"] = self._simulated
        self._sockets: Sockets | None = None
        if self._holder is not None:
            self._sockets = self._sensors["sockets"] = Sockets(now_ms)
        self._sensors["sessions"] = Sessions()
        self._sensors["rights"] = self._rights
        self._sensors["guard"] = self._guard
        self._sensors["files"] = self._files
        for name, sensor in self._sensors.items():
            if sensor.fileno() >= 0 and name != "holder":
                events = Mounts.EVENTS if name == "mounts" else select.POLLIN
                self._poll.register(sensor.fileno(), events)

    @property
    def pids(self) -> list[int]:
        """The processes that sense: this one, and the one that holds if it is there."""
        holder = self._holder
        return [os.getpid(), *([holder.pid, *holder.refusers] if holder is not None and holder.pid else [])]

    @property
    def attentive(self) -> bool:
        """Whether somebody was held just now and may become another program: then do not sleep for long."""
        return bool(self._held or self._mounting)

    def may_refuse(self, closed: bool) -> None:
        """Opens can be refused from now on, by `refuse`; `closed`: also while nobody is there to judge them."""
        if self._holder is not None:
            self._holder.may_refuse(Refusing(closed))

    def refuse(self, rules: dict[bytes, Rule]) -> dict[bytes, str]:
        """Refuse opens by these rules and no others; those that can't be set, and why."""
        if self._holder is None:
            return dict.fromkeys(rules, "no permission events")
        return self._holder.refuse(rules)

    def also_poll(self, fd: int) -> None:
        """Wake for this descriptor, too."""
        self._poll.register(fd, select.POLLIN)

    def poll_no_more(self, fd: int) -> None:
        """Take it out again."""
        self._poll.unregister(fd)

    def wait(self, wait_ms: int) -> set[int]:
        """Descriptors that have something to read, after `wait_ms` at most."""
        self._poll_holder()
        if self.arming is not None and self.arming.armed:
            wait_ms = min(wait_ms, ARMED_MS)
        if self._sockets is not None:
            wait_ms = min(wait_ms, max(self._sockets.due_ms(now_ms := _now_ms()) - now_ms, 1))
        return {fd for fd, _ in self._poll.poll(wait_ms)}

    def begin(self, now_ms: int) -> None:
        """What is there at the start."""
        self.look_for_trees(now_ms)
        self._look_at_folders()
        for name in ("mounts", "udev", "simulated", "sessions"):
            if name in self._sensors:
                self._take_devices(self._sensors[name].drain(now_ms))
        self._follow_media(now_ms, starting=True)
        self._take_standing(now_ms)
        self._arm(now_ms)

    def gather(self, ready: set[int], now_ms: int) -> None:
        """All that is to be read."""
        gone = self._media_came(ready, now_ms)
        self._look_elsewhere(ready, now_ms)
        if self._asked:
            self._take_all(self.compare([], now_ms))
        if self._traces:
            self._take_all(self.trace([], now_ms))
        if gone:
            self._take_files(now_ms)  # also what came since we were woken: it was done before its medium went
        elif self._files.fileno() in ready:
            self._read_files(now_ms)  # before the process table: whoever did it may be about to end
        elif (self.arming is not None and self.arming.armed) or (self._shares is not None and self._shares.fileno() in ready):
            self._take_files(now_ms)
        if not self._files.behind:
            self.read_until_ms = now_ms
        if any(isinstance(fact, facts.Unplugged) for fact in gone):
            self._take_holders(now_ms)  # what went to it until it was pulled, while it is still known
        self._take_devices(gone)
        if gone:
            self._follow_media(now_ms)
        if self._usbfs is not None and (self._usbfs.fileno() in ready or self._usbfs.due(now_ms)):
            self._take_holders(now_ms)
        if self._stirred:  # not before: marking the bare folder under a medium that went would forget its paths
            self._stirred = False
            self._look_at_folders()
        self._read_processes(now_ms)
        self._look_again(now_ms)
        if self._refused:
            self._take_refused(now_ms)
        if self._sockets is not None and self._sockets.due_ms(now_ms) <= _now_ms():
            self._take_ways(now_ms)

    def tick(self, now_ms: int) -> None:
        """What must be asked by the clock, once a second."""
        self._take_all(self._guard.drain(now_ms))
        self._take_all(self._sensors["sessions"].drain(now_ms))
        if self._udev is not None:
            self._take_all(self._udev.count(now_ms))
        if self._simulated:
            told = list(self._simulated.drain(now_ms))
            if any(isinstance(fact, _GONE) for fact in told):
                self._take_files(now_ms)
            self._take_all(told)
            self._look_at_folders()
        self._rights.protect(path_text(os.fsencode(path)) for path, there in self.watching.trees.items() if there)
        self._take_all(self._rights.drain(now_ms))
        self._take_all(self._files.grown(now_ms))
        self._take_ways(now_ms)
        self._take_holders(now_ms)
        self._ticks += 1
        if self._ticks % _SWEEP_EVERY == 0:
            self._take_all(self._files.sweep(now_ms))
        if self._holder is not None:
            self._holder.check(now_ms)
        if self._shares is not None:
            self._shares.check(now_ms)
        if now_ms - self._last_trees >= _TREES_EVERY_MS or now_ms < self._last_trees:
            self.look_for_trees(now_ms)
        self._take_standing(now_ms)
        self._take_all(self._mounts.elsewhere(now_ms))
        self._take_all(self._mounts.served_afar(now_ms))
        self._follow_media(now_ms)
        self._arm(now_ms)

    def stir(self, directories: Iterable[str]) -> None:
        """Rights were changed in these protected directories: who may read them is worth a look soon."""
        self._rights.stir(directories)

    def last(self, now_ms: int) -> None:
        """What the kernel still has to tell, at the end."""
        self._read_processes(now_ms)
        self._take_files(now_ms)
        self._take_ways(now_ms)
        self.read_until_ms = now_ms

    def coverage(self, now_ms: int) -> Iterator[facts.Coverage]:
        """What each sensor sees, and what should be watched and is not."""
        for sensor in self._sensors.values():
            yield sensor.coverage(now_ms)
        yield from self.watching.coverage(now_ms)
        if self.arming is not None:
            yield self.arming.coverage(now_ms)
        if self._no_udev:
            yield facts.Coverage(at_ms=now_ms, sensor="udev", ok=False, blind=["devices"], why=self._no_udev)

    def close(self) -> None:
        """Give everything back."""
        for sensor in self._sensors.values():
            sensor.close()
        if self.arming is not None:
            self.arming.close()
        if self._nodes is not None:
            self._nodes.close()

    def compare(self, asked: list[Ask], now_ms: int) -> Iterator[Fact]:
        """Look at files elsewhere that may be copies of protected ones; for what there is no time now, in a later turn."""
        self._asked.extend(asked)
        while self._asked and self.arming is not None and self._allowance.left:
            question = self._asked.popleft()
            with self._allowance.spending():
                answers = list(self.arming.look([question], now_ms))
            yield from answers

    def trace(self, asked: list[Trace], now_ms: int) -> Iterator[Fact]:
        """Look at files that may have come from media; for what there is no time now, in a later turn."""
        self._traces.extend(asked)
        while self._traces and self.arming is not None and self._allowance.left:
            question = self._traces.popleft()
            with self._allowance.spending():
                answer = self._origins.look(question, self.arming.where, now_ms)
            yield answer

    def disprove(self, doubtful: list[Doubt], now_ms: int) -> Iterator[Fact]:
        """Look at files on media that may hold what their writers read; where there is no time, that is not known."""
        for doubt in doubtful:
            allowance = self._guessing if doubt.only else self._doubting
            if not allowance.left:
                yield facts.Compared(at_ms=now_ms, key=doubt.key, path=doubt.path, size=doubt.size, alike="unknown")
                continue
            with allowance.spending():
                answers = list(disproof.look([doubt], now_ms))
            yield from answers

    def follow_copies(self, copies: list[tuple[bytes, str]], now_ms: int) -> Iterator[Fact]:
        """Watch these copies, wherever they go; what of them is gone is told."""
        for key, path in copies if self.arming is not None else ():
            yield from self._files.follow_staged(key, path, now_ms)

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
        gone: list[Fact] = [fact for fact in told if isinstance(fact, _GONE)]
        if told:
            self._take_devices(fact for fact in told if fact not in gone)
            self._follow_media(now_ms)
        self._mounts_at = now_ms
        return gone

    def _take_devices(self, told: Iterable[Fact]) -> None:
        for fact in told:
            if self._usbfs is not None:
                self._usbfs.learn(fact)
            if self._nodes is not None and isinstance(fact, facts.Plugged):
                self._nodes.watch(fact.device.nodes)
            if isinstance(fact, facts.Mounted) and fact.dev[:2] not in ("", "0:") and not fact.fs.startswith("fuse"):
                fact.autorun = autorun.look(os.fsdecode(path_bytes(fact.reach or fact.mount)))
            self._take(fact)

    def _look_elsewhere(self, ready: set[int], now_ms: int) -> None:
        """Whoever opens a medium's device is about to mount it, in a namespace of its own perhaps: look there for a while."""
        if self._nodes is not None and self._nodes.fileno() in ready:
            for pid in self._nodes.openers(now_ms):
                self._on_pid(pid)
                if self._mounts.foreign(pid):
                    self._mounting[self._mounts.eldest(pid)] = now_ms + _MOUNTING_MS
            if written := list(self._nodes.written()):
                self._take_files(now_ms)  # what was read for that comes first
                self._take_all(written)
        for pid, until_ms in list(self._mounting.items()):
            self._take_elsewhere(pid, now_ms)
            if not until_ms - _MOUNTING_MS <= now_ms < until_ms:
                del self._mounting[pid]

    def _take_elsewhere(self, pid: int, now_ms: int) -> None:
        """What was mounted in the namespace of `pid`, and what was written there before we came."""
        told = list(self._mounts.also(pid, now_ms))
        if told:
            self._take_all(told)
            self._take_all(self.watching.follow(self._watches(), now_ms, now_ms - _MOUNTING_MS))

    def _take_standing(self, now_ms: int) -> None:
        """What was open already in directories that are watched since the last call."""
        watched = {path for path, there in self.watching.trees.items() if there}
        fresh, self._seen_trees = sorted(watched - self._seen_trees), watched
        if fresh:
            self._take_all(standing.look(fresh, now_ms, self._on_pid, set(self.pids)))

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
            if self.arming is not None:
                self.arming.ignore = self._files.ignore

    def _read_processes(self, now_ms: int) -> None:
        for fact in self._processes.drain(now_ms):
            if isinstance(fact, facts.ProcGone):
                self._told_process.pop(fact.pid, None)
            self._take(fact)
        self._held_first(now_ms)
        if self._processes.programs.executed:
            self._take_executed(now_ms)

    def _take_executed(self, now_ms: int) -> None:
        """What was run from media."""
        programs = self._processes.programs
        executed, programs.executed = programs.executed, []
        for pid, key, path in executed:
            self._on_pid(pid)
            self._take(facts.Executed(at_ms=now_ms, pid=pid, key=key, path=path_text(path)))

    def _held_first(self, now_ms: int) -> None:
        if self._holder is None:
            return
        for fact in self._holder.drain(now_ms):
            if isinstance(fact, facts.Refused):
                self._refused.append(fact)  # told after what its opener read
                continue
            if isinstance(fact, facts.ProcSeen):
                at_ns = self._holder.looked_ns.get(fact.process.pid, 0)
                fact.process = self._processes.learn(fact.process, now_ms, at_ns)
                self._told_process[fact.process.pid] = fact.process
                self._held[fact.process.pid] = now_ms + _ATTENTIVE_MS
                if isinstance(self._files, Fanotify):  # before what it writes is told
                    self._take_all(self._files.other_names(fact.process.files, now_ms))
            self._take(fact)
        if self.arming is not None and self.arming.armed and not self._processes.programs.armed:
            self._follow_programs()

    def _look_again(self, now_ms: int) -> None:
        """A shell's child is held at its redirection, before its exec: what it became is worth a second look."""
        for pid, until_ms in list(self._held.items()):
            if self._processes.changed(pid):
                self._on_pid(pid)
            if now_ms >= until_ms or now_ms < until_ms - _ATTENTIVE_MS:
                del self._held[pid]

    def _read_files(self, now_ms: int) -> None:
        self._new_pids = False
        self._take_files(now_ms)
        if not self._new_pids:
            time.sleep(_GATHER_S)  # nobody new: let the kernel merge and queue; each wake is paid by whoever opens

    def _take_files(self, now_ms: int) -> None:
        """What happened to files; who read one may have a way out open, or write elsewhere."""
        take, readers, arming = self._take, set(), self.arming
        written = arming.take() if arming is not None else []
        fetchers = set[int]()
        raw = self._nodes.readers if self._nodes is not None else None
        for fact in self._files.drain(now_ms, self._on_pid):
            if raw and type(fact) is facts.Closed and fact.pid in raw:
                self._take_all(rawread.read_for(fact, self.protect))
            take(fact)
            if type(fact) is facts.Opened:
                readers.add(fact.pid)
            elif type(fact) is facts.MediumRead:
                fetchers.add(fact.pid)
        if self._shares is not None:  # after the files that were read for it
            self._take_all(self._shares.drain(now_ms, self._on_pid))
        if self._sockets is not None:
            for pid in readers:
                process = self._told_process.get(pid)
                self._sockets.reading(pid, process.ppid if process is not None else 0, now_ms)
        if arming is not None:
            if readers or fetchers or written:
                self._processes.catch_up(now_ms)
            for pid in readers | fetchers:
                arming.read(pid, now_ms)
            if written:  # taken before what was opened by then was read, told after it
                self._take_all(arming.facts(written, now_ms, self._on_pid))

    def _take_refused(self, now_ms: int) -> None:
        """Who was refused, after all that they read until then; a small process that died is replaced at once."""
        self._take_files(now_ms)
        refused, self._refused = self._refused, []
        self._take_all(refused)

    def _take_ways(self, now_ms: int) -> None:
        """Ways out that are no mounts."""
        if self._sockets is not None:
            self._take_all(self._sockets.drain(now_ms, self._on_pid))

    def _take_holders(self, now_ms: int) -> None:
        """Who holds a phone by its node; a file system that is served from it is watched at once."""
        if self._usbfs is not None:
            told = list(self._usbfs.drain(now_ms, self._on_pid))
            self._take_all(told)
            if any(isinstance(fact, facts.Plugged) for fact in told):
                self._follow_media(now_ms)

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
        self._take_elsewhere(pid, now_ms)  # what a container mounted for itself

    def look_for_trees(self, now_ms: int) -> None:
        """Watch the protected directories that are there now."""
        self._last_trees = now_ms
        self.watching.protect([*self.protect, *self._mounts.views([os.path.realpath(path) for path in self.protect])])
        if self._nodes is not None:
            self._nodes.watch_below(rawread.devices(self.protect))

    def _look_at_folders(self) -> None:
        if self._simulated is not None:
            self.watching.expect(self._simulated.folders())

    def _arm(self, now_ms: int) -> None:
        """Copies are looked for on all file systems of the machine, while somebody may make one."""
        if self.arming is not None:
            self.arming.watch(self._mounts.local(self.watching.media))
            self.arming.step(now_ms)

    def _follow_media(self, now_ms: int, starting: bool = False) -> None:
        since_ms = None if starting else self._mounts_at
        self._take_all(self.watching.follow(self._watches(), now_ms, since_ms))
        self._wake_on_exec(not self.watching.all_held)
        self._follow_programs()

    def _follow_programs(self) -> None:
        """Which program a process became is told while it can matter: a medium is there, or somebody reads protected files."""
        wanted = bool(self.watching.media) or (self.arming is not None and self.arming.armed)
        if wanted or self._processes.programs.armed:
            systems = [*self._mounts.local(self.watching.media, read_only=True), *self.watching.alone]
            self._processes.programs.arm(systems if wanted else [])
            self._processes.programs.media = tuple(os.fsencode(mount).rstrip(b"/") + b"/" for mount in self.watching.media)

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
