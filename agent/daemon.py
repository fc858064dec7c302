"""The daemon: one thread senses and thinks, one records, two talk to the collector. Wires, starts, stops.

Owns: the way of a fact through the core to the recorder, the bounded queues between threads, the clock's ticks, signals,
reload and status. Decides nothing: what a fact means is the core's, in which order sensors are asked is `senses`'.
One event, walked: `turn` → `Senses.gather` → `_take` → `Core.feed` → `Recorder.put` → `Spool.append` → `Sender`.
"""

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent import __version__, config, identity, service
from agent.contract.codes import SEVERITIES
from agent.contract.form import AnyEvent
from agent.core import facts
from agent.core.facts import Fact
from agent.core.pipeline import Core, CoreConfig, ProtectedDir, WindowLimit
from agent.enforcing import STIRRING, Enforcing, policy_of
from agent.factlog import FactLog, NotPrivate
from agent.guard import Guard
from agent.notify import Notifier
from agent.recorder import Recorder
from agent.sender import Sender
from agent.sense import sizes
from agent.senses import ATTENTIVE_STEP_MS, Senses
from agent.spool import Spool, SpoolError
from agent.unlocking import Desk

_TICK_MS = 1_000
_SETTLES_MS = 1_000
_SUMMARY_EVERY_MS = 3_600_000
_STOP_WITHIN_S = 5.0
_UNDO_WITHIN_S = 2.0
_HAND_ON = 500
"""Events made within one turn before they are handed on: a storm must not pile them up."""
_ENOUGH_WAITING = 1_000
"""Events not durable yet (the backlog packs none so far), above which the recorder is waited for; PATIENCE steps at most."""
_GIVE_BACK_EVERY_MS, _CALM_MS = 60_000, 5_000
"""What a storm needed goes back to the system once it has passed; what little is needed all the time, now and then."""
_LET_WRITE_S = 0.01
_PATIENCE = 100


class StartError(Exception):
    """The daemon can't start; str() is one sentence that says what to do."""


def bare_config() -> config.Config:
    """A configuration with nothing in it but defaults."""
    return config.Config()


def core_config(site: config.Config, agent: str) -> CoreConfig:
    """What the core needs to know of a site's configuration. `agent` is the agent id."""
    return CoreConfig(
        agent=agent,
        name=site.agent.name or socket.gethostname(),
        version=__version__,
        protect=[ProtectedDir(path=os.path.realpath(each.path), label=each.label) for each in site.agent.protect],
        limits=[
            WindowLimit(name=each.name, window_s=int(each.window), bytes=each.bytes, files=each.files, ways=tuple(each.ways))
            for each in site.agent.limit
        ],
        require_approval=site.agent.media.require_approval,
        record_names=site.agent.media.record_names,
        first_use=site.agent.media.first_use,
        device_type=service.chassis(),
        ways_off=frozenset(way for way in ("network", "print", "bluetooth") if getattr(site.agent.ways, way) == "off"),
        ways_severity=next(number for number, word in SEVERITIES.items() if word == site.agent.ways.severity),
        keep_copies_ms=int(site.agent.staging.keep * 1000),
        enforce=policy_of(site.agent),
    )


class Daemon:
    """`Daemon(config).run()` returns an exit code. Raises StartError before anything is watched."""

    def __init__(self, site: config.Config, record: str | None = None) -> None:
        self._site = site
        self._factlog: FactLog | None = None
        self._inbox: deque[Fact] = deque()
        self._wake, self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = self._reloading = False
        self._stop_threads = threading.Event()
        self._told_coverage: dict[str, facts.Coverage] = {}
        self._listener: socket.socket | None = None
        self._made: list[AnyEvent] = []
        self._notifier: Notifier | None = None
        self._config_error = ""
        self._disproving = False
        self._last_tick = self._last_summary = self._gave_back_ms = self._done = self._busy_ms = 0
        try:
            if record:
                self._factlog = FactLog(record)
            self._open_state()
        except OSError as error:
            raise StartError(f"{error.filename}: {error.strerror}; choose another agent.state_dir, or run as root") from None
        except (identity.IdentityError, SpoolError, NotPrivate) as error:
            raise StartError(str(error)) from None

    # -- start ---------------------------------------------------------------------------------------------------------

    def _open_state(self) -> None:
        agent = self._site.agent
        now_ms = _now_ms()
        Path(agent.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._identity = identity.load_or_create(agent.state_dir)
        self._spool = Spool.open(agent.state_dir, self._identity, agent.spool.max_bytes, now_ms, self._tell)
        self._core = Core(core_config(self._site, self._identity.agent), _uids().__next__)
        self._core.restore(self._spool.state())
        self._sender = Sender(self._identity, agent, self._spool, self._tell)
        self._recorder = Recorder(self._spool, self._tell, self._sender.wake)
        self._guard = Guard(agent.state_dir, self._spool.check_alive, self._durable_ms)
        self._desk = Desk(agent.state_dir, self._identity)

    # -- run -----------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Watch until SIGTERM or SIGINT; then record what is known, say so, and return 0."""
        service.raise_descriptor_limit()
        service.share_one_heap()
        service.collect_rarely()
        sys.setswitchinterval(0.0005)  # the thread that senses must not wait 5 ms for one that packs a batch
        now_ms = _now_ms()
        agent = self._site.agent
        protect = [each.path for each in agent.protect]
        self._senses = Senses(
            protect,
            agent.media.simulated_dir,
            self._guard,
            self._take,
            self._core.watches,
            now_ms,
            agent.staging,
            [agent.state_dir],
            float(agent.access.every),
        )
        self._enforcing = Enforcing(agent, self._senses, self._core.stops, self._tell)
        self._senses.also_poll(self._wake)
        self._give_voice()
        self._open_door()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        self._recorder.start()
        talkers = self._sender.start(self._stop_threads)
        self._begin(now_ms)
        service.notify("READY=1")
        watchdog_ms = int(os.environ.get("WATCHDOG_USEC", "0")) // 3000
        pinged = 0
        code = 0
        while not self._stopping:
            self.turn()
            now = time.monotonic_ns() // 1_000_000
            if watchdog_ms and now - pinged >= watchdog_ms and self._recorder.alive:
                service.notify("WATCHDOG=1")
                pinged = now
        service.notify("STOPPING=1")
        if not self._end(talkers):
            code = 1
        return code

    def _give_voice(self) -> None:
        """Who is to be told at the machine, by the mode: nobody if it only observes."""
        agent = self._site.agent
        if agent.mode == "observe":
            if self._notifier is not None:
                self._notifier.close()
            self._notifier = None
            return
        if self._notifier is None:
            name = agent.name or socket.gethostname()
            self._notifier = Notifier(agent.warn.contact, agent.warn.approval_url, agent.collector.url, name)
        self._notifier.contact, self._notifier.approval_url = agent.warn.contact, agent.warn.approval_url

    def _open_door(self) -> None:
        """Answer `status`; again if somebody removed the socket with the state directory."""
        if self._listener is not None:
            if Path(self._site.agent.state_dir, "agent.sock").exists():
                return
            self._senses.poll_no_more(self._listener.fileno())
            self._listener.close()
            self._listener = None
        with contextlib.suppress(OSError):  # the directory is gone or the disk full: tried again with the next tick
            self._listener = service.listen(self._site.agent.state_dir)
            self._senses.also_poll(self._listener.fileno())

    def _begin(self, now_ms: int) -> None:
        clean = self._spool.last_code() == "agent.stopped"
        self._take(
            facts.Started(
                at_ms=now_ms,
                boot_id=service.read("/proc/sys/kernel/random/boot_id"),
                config_digest=self._site.digest,
                mode=self._site.agent.mode,
                previous=self._spool.previous,
            )
        )
        known = bool(self._spool.previous or self._spool.last_code())
        self._senses.begin(now_ms)
        if known:  # not before all sensors watch: until then nobody saw what was done
            self._take_all(self._guard.former_run(clean, _now_ms()))
        self._enforcing.step(now_ms)
        self._follow_copies(now_ms)
        self._tell_coverage(now_ms)
        self._guard.touch()
        self._hand_on(now_ms)
        self._last_tick = self._last_summary = now_ms

    def turn(self) -> None:
        """One round: wait for something to read or for the next tick, take every fact, hand the events on."""
        due_ms = min(self._last_tick + _TICK_MS, self._core.due_ms or 1 << 62)
        wait_ms = max(0, min(ATTENTIVE_STEP_MS if self._senses.attentive else _TICK_MS, due_ms - _now_ms()))
        ready = self._senses.wait(wait_ms)
        now_ms = _now_ms()
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
        if self._listener is not None and self._listener.fileno() in ready:
            service.answer(self._listener, self.status(now_ms))
        while self._inbox:
            self._take(self._inbox.popleft())
        self._senses.gather(ready, now_ms)
        if now_ms - self._last_tick >= _TICK_MS or now_ms < self._last_tick:
            self._tick(now_ms)
        elif self._core.due_ms is not None and now_ms >= self._core.due_ms:
            self._take(facts.Tick(at_ms=now_ms))
        self._enforcing.step(now_ms)
        self._hand_on(now_ms)

    def _tick(self, now_ms: int) -> None:
        self._last_tick = now_ms
        self._open_door()
        self._senses.stir(self._core.stirred())
        self._senses.tick(now_ms)
        self._follow_copies(now_ms)
        self._tell_coverage(now_ms)
        self._take(facts.Tick(at_ms=now_ms))
        self._desk.look(now_ms, self._core.keys_present, self._core.known_ms, self._core.unlocks_used, self._unlock)
        if now_ms - self._last_summary >= _SUMMARY_EVERY_MS or now_ms < self._last_summary:
            self._last_summary = now_ms
            self._take(facts.Summary(at_ms=now_ms, detail=self._summary()))
        if self._notifier is not None:
            self._notifier.step(now_ms)
        if self._reloading:
            self._reload(now_ms)
        self._give_back(now_ms)

    def _give_back(self, now_ms: int) -> None:
        """Return memory that is not in use: a few seconds after the last event was recorded or delivered, and once a minute."""
        done = self._recorder.recorded + self._spool.acknowledged
        if done != self._done:
            self._done, self._busy_ms = done, now_ms
        calm = self._busy_ms > self._gave_back_ms and now_ms - self._busy_ms >= _CALM_MS
        if calm or not 0 <= now_ms - self._gave_back_ms < _GIVE_BACK_EVERY_MS:
            self._gave_back_ms = now_ms
            self._spool.give_back()
            service.give_back()

    # -- from one room to the next -------------------------------------------------------------------------------------

    def _take(self, fact: Fact) -> None:
        if self._factlog is not None:
            self._factlog.write(fact)
        self._made += self._core.feed(fact)
        if type(fact) in STIRRING:
            self._enforcing.stir(type(fact))
        if self._core.wanted:
            self._take_all(sizes.look(self._core.ask(), fact.at_ms))
        if self._core.unlike:
            self._take_all(self._senses.compare(self._core.compare(), fact.at_ms))
        if self._core.untraced:
            self._take_all(self._senses.trace(self._core.trace(), fact.at_ms))
        if self._core.doubtful and not self._disproving:
            self._disproving = True
            while self._core.doubtful:  # each answer may lead to the next question
                self._take_all(self._senses.disprove(self._core.doubt(), fact.at_ms))
            self._disproving = False
        if self._core.unmarked:
            self._take_all(self._senses.follow_copies(self._core.mark(), fact.at_ms))
        if len(self._made) >= _HAND_ON:
            self._hand_on(fact.at_ms, with_state=False)

    def _hand_on(self, now_ms: int, with_state: bool = True) -> None:
        """The events made so far go to the recorder, at the end of a turn with the counters as they are after them."""
        state = self._core.state() if with_state and self._core.state_changed else None
        if self._made or state is not None:
            made, self._made = self._made, []
            if self._notifier is not None:
                for event in made:
                    self._notifier.take(event)
            self._recorder.put(made, state, now_ms)
        patience = _PATIENCE if with_state else 0  # once a turn, or nobody would look at anything else
        while self._recorder.waiting > _ENOUGH_WAITING and not self._recorder.last_error and patience > 0:
            time.sleep(_LET_WRITE_S)  # file facts stay in the kernel's queue meanwhile: there one takes 100 bytes
            patience -= 1

    def _unlock(self, fact: facts.Unlocked) -> bool:
        """Take a break-glass code; True once it is durable, so that no crash lets it be taken twice."""
        self._take(fact)
        self._hand_on(fact.at_ms)
        deadline = time.monotonic() + _STOP_WITHIN_S
        while self._recorder.waiting and time.monotonic() < deadline:
            time.sleep(_LET_WRITE_S)
        return not self._recorder.waiting

    def _take_all(self, many: Iterable[Fact]) -> None:
        for fact in many:
            self._take(fact)

    def _follow_copies(self, now_ms: int) -> None:
        """Watch all known copies, at the start and when the small process that trips on them is a new one."""
        if self._senses.arming is not None and self._senses.arming.wants_copies:
            self._senses.arming.wants_copies = False
            self._take_all(self._senses.follow_copies(self._core.copies(), now_ms))

    def _durable_ms(self) -> int:
        """Until when all that happened is durable; while files settle in the core, that is a second ago at best."""
        recorded_ms, core_ms = self._recorder.since_ms, self._core.untold_since_ms
        settled_ms = self._senses.read_until_ms - (0 if self._stopping else _SETTLES_MS)
        return min(settled_ms, recorded_ms or settled_ms, core_ms or settled_ms)

    def _tell(self, fact: Fact) -> None:
        """From any thread: a fact for the core."""
        self._inbox.append(fact)
        with contextlib.suppress(BlockingIOError):  # full: it rings anyway
            os.write(self._bell, b"!")

    def _coverage(self, now_ms: int) -> Iterator[facts.Coverage]:
        yield from self._senses.coverage(now_ms)
        yield from self._enforcing.coverage(now_ms)
        blind = ["config_refused"] if self._config_error else []
        yield facts.Coverage(at_ms=now_ms, sensor="config", ok=not blind, blind=blind, why=self._config_error)

    def _tell_coverage(self, now_ms: int) -> None:
        for said in self._coverage(now_ms):
            self._tell_if_new(said)

    def _tell_if_new(self, said: facts.Coverage) -> None:
        """What is not seen, once; and again when a sensor fails, fails otherwise, or is whole again."""
        before = self._told_coverage.get(said.sensor)
        self._told_coverage[said.sensor] = said
        if before is None:
            news = bool(said.blind) or not said.ok
        else:
            news = before.ok != said.ok or (not said.ok and before.blind != said.blind)
        if news:
            self._take(said)

    # -- people and signals --------------------------------------------------------------------------------------------

    def status(self, now_ms: int) -> dict[str, Any]:
        """What `status`, `media` and the pytest fixtures read."""
        sending = self._sender.status()
        coverage = list(self._coverage(now_ms))
        blind = sorted({code for each in coverage if not each.ok for code in each.blind})
        return {
            "running": True,
            "healthy": not blind and not self._recorder.last_error and not sending.get("last_error"),
            "version": __version__,
            "agent": self._identity.agent,
            "name": self._site.agent.name or socket.gethostname(),
            "mode": self._site.agent.mode,
            "pid": os.getpid(),
            "protected": [{"path": path, "watched": watched} for path, watched in self._senses.watching.trees.items()],
            "watched_media": self._senses.watching.media,
            "blind": blind,
            "sensors": [
                {"name": each.sensor, "ok": each.ok, "sees": each.sees, "blind": each.blind, "why": each.why}
                for each in coverage
            ],
            "media": self._core.media_now(now_ms),
            "notices": self._notifier.status() if self._notifier is not None else None,
            "queue": {"waiting": self._recorder.waiting, "error": self._recorder.last_error},
            "spool": self._spool.stats(),
            "collector": sending,
            "counts": self._core.counts(),
            "memory_kib": service.pss_kib(self._senses.pids),
        }

    def _summary(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "sensors": {each.sensor: each.ok for each in self._told_coverage.values()},
            "waiting": self._recorder.waiting,
            "counts": self._core.counts(),
            **({"notices": self._notifier.status()} if self._notifier is not None else {}),
            "memory_kib": service.pss_kib(self._senses.pids),
            "cpu_ms": int((usage.ru_utime + usage.ru_stime) * 1000),
        }

    def _on_stop(self, *_: object) -> None:
        self._stopping = True

    def _on_reload(self, *_: object) -> None:
        self._reloading = True

    def _reload(self, now_ms: int) -> None:
        """SIGHUP: read the file again. A bad file changes nothing and is said; state_dir and collector need a restart."""
        self._reloading = False
        service.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            site = config.load(self._site.source)
        except config.ConfigError as error:
            self._config_error = str(error)
            service.notify("READY=1")
            return
        self._config_error = ""
        site.agent.state_dir, site.agent.collector = self._site.agent.state_dir, self._site.agent.collector
        self._site = site
        self._core.reconfigure(core_config(site, self._identity.agent))
        self._enforcing.reload(site.agent)
        self._give_voice()
        self._senses.protect = [each.path for each in site.agent.protect]
        self._senses.look_for_trees(now_ms)
        self._take(facts.Config(at_ms=now_ms, config_digest=site.digest, mode=site.agent.mode))
        service.notify("READY=1")

    def _end(self, talkers: list[threading.Thread]) -> bool:
        """Take what the kernel still has to tell, record it, and say that we stop. False if it could not be recorded."""
        now_ms = _now_ms()
        self._senses.last(now_ms)
        self._enforcing.close(_UNDO_WITHIN_S)
        while self._inbox:
            self._take(self._inbox.popleft())
        self._take(facts.Stopping(at_ms=_now_ms()))
        self._hand_on(now_ms)
        recorded = self._recorder.close(_STOP_WITHIN_S)
        self._stop_threads.set()
        self._sender.wake()
        for talker in talkers:
            talker.join(_STOP_WITHIN_S)
        self._senses.close()
        if self._notifier is not None:
            self._notifier.close()
        if self._listener is not None:
            self._listener.close()
        Path(self._site.agent.state_dir, "agent.sock").unlink(missing_ok=True)
        self._spool.close()
        return recorded


def _uids() -> Iterator[str]:
    """128 bits from the kernel each, in hex: what OCSF's metadata.uid asks for, and can't be guessed.

    Read 64 at a time: each read lets another thread in, which is a tenth of the time a storm takes.
    """
    while True:
        some = os.urandom(64 * 16).hex()
        for at in range(0, len(some), 32):
            yield some[at : at + 32]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
