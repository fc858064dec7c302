"""Core.feed(fact) → events: the stages in reading order on one page. What each stage knows is in its own room.

Owns: the order of the stages, what a fact means by the place where it happened, and when the state is worth keeping. Must
not know the shape of events, how a join is graded or judged, or any edge. No clock: time is what the facts say. `feed` never
raises for what facts say, in whatever order they come.

State is handed out with the events that changed it; a large one (thousands of distinct files within the windows, or of known
copies) once in 2 ms for each KB of it, 5 s at most, while they come in a storm: after a kill, that much is not counted.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from agent.contract.codes import MEDIUM
from agent.contract.event import Event
from agent.contract.form import AnyEvent
from agent.core import facts, history
from agent.core.devices import Devices
from agent.core.doubts import Doubt
from agent.core.grading import Left
from agent.core.inbound import Brought, Inbound, Trace
from agent.core.joins import Arrival, Joins, Known, Settled, Written
from agent.core.judging import Judging
from agent.core.limits import WindowLimit
from agent.core.lineage import Lineage
from agent.core.media import Media, Mount, MountWatch, clean_path
from agent.core.ocsf import Writer
from agent.core.people import People
from agent.core.places import Place, Places, ProtectedDir
from agent.core.reads import Read, read_elsewhere, read_of
from agent.core.refusals import Refusals
from agent.core.register import MediaRegister
from agent.core.rights import AccessRights
from agent.core.staging import Ask, Copy, Staging
from agent.core.stopping import EnforcePolicy, Stop
from agent.core.ways import Departure, Ways

__all__ = ["Core", "CoreConfig", "MountWatch", "ProtectedDir", "WindowLimit"]

MOST_AT_ONCE = 2_000
"""Events that one `feed` hands out: an archive of 50,000 files must not fill the memory. The rest comes with the next facts."""
_SWEEP_MS = 10_000
_MOST_HELD = 512
_KEEP_MS = 5_000
_KEEP_BYTES_A_MS = 500
_UNEVEN_MS = 1_000
"""What was read in one go is told with the time at which that began, a process looked at meanwhile with its own: that is no
clock set back, for which all that waits would be settled at once."""


_SETTLES = (facts.Tick, facts.Stopping)
"""Told when all that happened to files until then was told. With any other fact a read may be in the queue yet that is in a
file whose time has come."""


class CoreConfig(Struct, kw_only=True):
    """All that the core needs to know of a site. `device_type` is OCSF's `device.type_id` (2 Desktop, 3 Laptop, 0 unknown).

    `ways_off` are ways of which nothing is told, `ways_severity` is that of what left by a way that is no medium.
    `keep_copies_ms`: so long files outside are known as copies of protected ones. `first_use`: a person's first medium on this
    machine is a finding.
    """

    agent: str
    name: str = ""
    version: str = ""
    protect: list[ProtectedDir] = []
    limits: list[WindowLimit] = []
    require_approval: bool = True
    record_names: bool = False
    device_type: int = 0
    ways_off: frozenset[str] = frozenset()
    ways_severity: int = MEDIUM
    keep_copies_ms: int = 90 * 86_400_000
    enforce: EnforcePolicy = EnforcePolicy()
    first_use: bool = False


class _State(Struct, array_like=True):
    register: bytes
    limits: bytes
    lineage: bytes
    unapproved: bytes
    rights: bytes = b""
    devices: bytes = b""


class Core:
    """The whole pure middle of the agent. `new_uid` gives ids that can't be guessed."""

    def __init__(self, config: CoreConfig, new_uid: Callable[[], str]) -> None:
        self._media, self._people, self._lineage = Media(), People(), Lineage()
        self._places = Places(self._media)
        self._staging = Staging(self._lineage)
        self.unlike, self.unmarked = self._staging.asked, list[tuple[bytes, str]]()
        self._untold_since_ms = 0
        self._held_lately: dict[bytes, facts.OpenFile] = {}
        self._history, self._rights = history.History(), AccessRights()
        self._joins = Joins(self._people, self._is_protected, self._known_as, self._lineage.left_behind)
        self._writer = Writer(config.agent, clean_path(config.name), config.version, config.device_type, new_uid)
        register = MediaRegister(config.agent, config.name)
        self._inbound = Inbound(self._people, self._is_on_medium)
        self.untraced = self._inbound.asked
        self._judging = Judging(self._people, self._media, self._places, register, self._writer, new_uid)
        self._refusals = Refusals(
            self._people, self._media, self._places, self._joins.reads, self._judging, self._writer, new_uid
        )
        self._register, self._limits, self._unapproved = register, self._judging.limits, self._judging.unapproved
        self._devices = Devices(self._media, self._people, self._judging, self._writer, new_uid)
        self._rooms: tuple[Any, ...] = (register, self._limits, self._lineage, self._unapproved, self._rights, self._devices)
        """All that outlives a restart, in the order of `_State`."""
        self.wanted = self._joins.wanted
        self.doubtful = self._joins.doubtful
        self._ways = Ways(self._people, self._joins.reads, self.wanted)
        self._waiting: deque[tuple[Arrival | Departure | Brought, Left | None]] = deque()
        self._counts: Counter[str] = Counter()
        self._now_ms = self._swept_ms = self._kept_ms = self._keep_every_ms = 0
        self._dirty = self._state_lost = False
        self.reconfigure(config)
        self._stages: dict[type[facts.Fact], Callable[[Any], Iterable[AnyEvent]]] = {
            facts.ProcSeen: self._on_proc_seen,
            facts.ProcGone: self._on_proc_gone,
            facts.Opened: self._on_opened,
            facts.MediumRead: self._on_medium_read,
            facts.Executed: self._on_executed,
            facts.Traced: self._on_traced,
            facts.Sized: self._on_sized,
            facts.Created: self._on_created,
            facts.Grown: self._on_grown,
            facts.Closed: self._on_closed,
            facts.Compared: self._on_compared,
            facts.Deleted: self._on_deleted,
            facts.Moved: self._on_moved,
            facts.Attributes: self._on_attributes,
            facts.Rights: self._on_rights,
            facts.Found: self._on_found,
            facts.Plugged: lambda fact: self._on_plugged(facts.writable(fact)),
            facts.Unplugged: lambda fact: self._on_unplugged(facts.writable(fact)),
            facts.Transferred: self._on_transferred,
            facts.Mounted: self._on_mounted,
            facts.Unmounted: self._on_unmounted,
            facts.NodeWritten: self._on_node_written,
            facts.WayHeld: self._on_way_held,
            facts.WayClosed: self._on_way_closed,
            facts.WayUsed: self._on_way_used,
            facts.Session: self._on_session,
            facts.Register: self._on_register,
            facts.RegisterConfirmed: self._on_register_confirmed,
            facts.Coverage: lambda fact: iter((self._writer.sensors(fact),)),
            facts.Lost: lambda fact: iter((self._writer.gap(fact),)),
            facts.Tampered: lambda fact: iter((self._writer.tampered(fact),)),
            facts.Clock: self._on_clock,
            facts.Acted: self._refusals.acted,
            facts.Refused: self._refusals.refused,
            facts.Unlocked: self._on_unlocked,
            facts.Started: self._on_started,
            facts.Stopping: self._on_stopping,
            facts.Summary: lambda fact: iter((self._writer.life("agent.heartbeat", fact.at_ms, fact.detail),)),
            facts.Config: lambda fact: iter((self._config_event(fact.at_ms, fact.config_digest, fact.mode),)),
            facts.Tick: self._on_tick,
        }

    def feed(self, fact: facts.Fact) -> list[AnyEvent]:
        """One fact in, the events that it leads to out; also those that were only waiting for time to pass."""
        at_ms = fact.at_ms
        back, self._now_ms = at_ms < self._now_ms - _UNEVEN_MS, at_ms
        if back or isinstance(fact, _SETTLES):
            self._arrived(self._joins.due(at_ms, back))
            self._came(self._inbound.due(at_ms, back))
        told, waiting = self._stages[type(fact)](fact), self._waiting
        if not told and not waiting and not self._state_lost:
            return []
        events: list[AnyEvent] = [*self._lost_state(), *told] if told or self._state_lost else []
        left, most = self._judging.left, len(waiting) if isinstance(fact, facts.Stopping) else MOST_AT_ONCE
        while waiting and most > 0:
            left(*waiting.popleft(), events)
            most -= 1
        if isinstance(fact, facts.Stopping):
            events.append(self._writer.life("agent.stopped", at_ms, {"reason": fact.reason} if fact.reason else {}))
        for event in events:
            self._counts[event.code] += 1
        return events

    def _lost_state(self) -> Iterator[Event]:
        if self._state_lost:
            self._state_lost = False
            yield self._writer.gap(facts.Lost(at_ms=self._now_ms, reason="state_unreadable", since_ms=0, until_ms=self._now_ms))

    # -- who -----------------------------------------------------------------------------------------------------------

    def _on_proc_seen(self, fact: facts.ProcSeen) -> Iterator[Event]:
        for file in fact.process.files:
            self._held_lately.pop(file.key, None)
            self._held_lately[file.key] = file
            if len(self._held_lately) > _MOST_HELD:
                del self._held_lately[next(iter(self._held_lately))]
        if self._people.seen(fact):
            self._joins.forget(fact.process.pid)
            self._ways.forget(fact.process.pid)
            self._inbound.forget(fact.process.pid)
        return iter(())

    def _on_proc_gone(self, fact: facts.ProcGone) -> Iterator[Event]:
        self._people.gone(fact)
        return iter(())

    def _on_session(self, fact: facts.Session) -> Iterator[Event]:
        self._people.sit_down(fact)
        return iter(())

    # -- files ---------------------------------------------------------------------------------------------------------

    def _on_opened(self, fact: facts.Opened) -> Iterable[Event]:
        path = fact.path
        if not path.isascii():
            path = fact.path = clean_path(path)
        end = path.rfind("/") + 1
        folder = path[:end]
        root, mount = self._places.known.get(folder) or self._places.look_up(folder)
        if root is not None:
            name = path[end:]
            self._joins.read(fact.pid, folder, name, root.path, fact.size, fact.inode, fact.at_ms)
            return self._noted(root, fact, history.READ)
        if mount is None and (origin := self._lineage.of(fact.key, path)) is not None:
            via = origin.path if origin.path != path else ""
            self._joins.read(fact.pid, folder, path[end:], origin.root, fact.size, fact.inode, fact.at_ms, via)
            if (root := self._places.root(origin.root)) is not None:
                return self._noted(root, fact, history.READ, origin.path)
        elif mount is None and (copy := self._lineage.opened(fact.key, path, fact.at_ms)) is not None:
            first = copy.sources[0]
            self._joins.read(fact.pid, folder, path[end:], first.root, fact.size, fact.inode, fact.at_ms, first.path)
        return ()

    def _on_medium_read(self, fact: facts.MediumRead) -> Iterable[Event]:
        root, mount = self._place(fact)
        if root is None and mount is not None and mount.way != "network":
            self._inbound.opened(fact, mount)
        return ()

    def _on_executed(self, fact: facts.Executed) -> Iterable[Event]:
        _, mount = self._place(fact)
        if mount is not None and mount.way != "network":
            self._came(self._inbound.ran(self._people.who(fact.pid), fact.pid, fact.path, mount, fact.at_ms))
        return ()

    def _on_traced(self, fact: facts.Traced) -> Iterable[Event]:
        fact.path, fact.source = clean_path(fact.path), clean_path(fact.source)
        self._came(self._inbound.traced(fact))
        return ()

    def _on_sized(self, fact: facts.Sized) -> Iterable[Event]:
        self._arrived(self._joins.sized(fact))
        self._departed(self._ways.sized(fact))
        if not self._inbound.idle:
            self._came(self._inbound.sized(fact))
        return ()

    def _on_created(self, fact: facts.Created) -> Iterable[Event]:
        root, mount = self._place(fact)
        if root is None and mount is not None:
            if not self._linked(fact, mount, fact.size):
                self._joins.created(fact, mount)
        elif root is not None and not self._inbound.idle:
            self._inbound.made(fact.key, fact.at_ms)
        return ()

    def _linked(self, fact: facts.FileFact, mount: Mount, size: int | None) -> bool:
        """Whether what was made on a medium is another name of a protected file, link(2): told so, as no close may follow."""
        origin = None if self._lineage.empty else self._origin(fact, None)
        if origin is not None:
            self._arrived((self._joins.moved_onto(fact, mount, origin, size, False),))
        return origin is not None

    def _on_grown(self, fact: facts.Grown) -> Iterable[Event]:
        root, mount = self._place(fact)
        if root is None and mount is not None:
            self._joins.grown(fact, mount, fact.size)
        return ()

    def _on_closed(self, fact: facts.Closed) -> Iterable[Event]:
        if not fact.path:  # removed by now; whoever was seen with it in hand tells what it was
            held = self._held_lately.get(fact.key)
            if held is None:
                return ()
            fact.path, fact.size = held.path, held.size
        root, mount = self._place(fact)
        if mount is None and not self._inbound.idle:
            self._came(self._inbound.written(fact))
        if root is not None:
            return self._noted(root, fact, history.WRITE)
        if mount is None:
            if self._lineage.of(fact.key, fact.path) is None:
                self._arrived(self._joins.elsewhere(fact))
            return ()
        if fact.made:
            self._linked(fact, mount, fact.size)
        read = self._held_open(fact)
        if (arrival := self._joins.closed(fact, mount, fact.size)) is not None:
            self._arrived((arrival,))
        return read

    def _held_open(self, fact: facts.FileFact) -> Iterable[Event]:
        """What its writer was seen to hold open it has read, though nobody told of the opening: a file that was moved out a
        moment before, or a descriptor older than the agent."""
        entry = self._people.who(fact.pid)
        if entry is None or entry.files is entry.taken:
            return ()
        entry.taken, told = entry.files, list[Event]()
        of = self._joins.reads.of(fact.pid)
        for file in entry.files:
            if of is None or not of.opened(file.path):
                told += self._on_opened(
                    facts.Opened(at_ms=fact.at_ms, pid=fact.pid, key=file.key, path=file.path, size=file.size)
                )
        return told

    def _on_compared(self, fact: facts.Compared) -> Iterator[AnyEvent]:
        fact.path = clean_path(fact.path)
        if (settled := self._joins.compared(fact)) is not None:
            self._arrived(settled)
            return
        copy = self._staging.answered(fact)
        if copy is not None:
            if fact.alike != "gone":
                self.unmarked.append((fact.key, fact.path))
            yield from self._staged(copy)

    def _staged(self, copy: Copy) -> Iterator[AnyEvent]:
        events = list(self._judging.staged(copy))
        if events:
            self._lineage.told(copy.written.key, events[0].uid)
        return iter(events)

    def _on_found(self, fact: facts.Found) -> Iterable[Event]:
        root, mount = self._place(fact)
        if root is None and mount is not None:
            self._joins.found(fact, mount, fact.size)
        return ()

    def _place(self, fact: facts.FileFact) -> Place:
        """Where the file of a fact is; its path is made fit to be written."""
        path = fact.path
        if not path.isascii():
            path = fact.path = clean_path(path)
        folder = path[: path.rfind("/") + 1]
        return self._places.known.get(folder) or self._places.look_up(folder)

    def _on_deleted(self, fact: facts.Deleted) -> Iterator[Event]:
        fact.path = clean_path(fact.path)
        root, mount = self._places.of(fact.path)
        if root is not None:
            yield from self._noted(root, fact, history.DELETE)
        elif mount is not None:
            self._arrived([self._joins.deleted(fact)])
        else:
            self._lineage.gone(fact.key, fact.at_ms)

    def _on_moved(self, fact: facts.Moved) -> Iterator[Event]:
        fact.path, fact.old_path = clean_path(fact.path), clean_path(fact.old_path)
        (root, mount), (old_root, old_mount) = self._places.of(fact.path), self._places.of(fact.old_path)
        if old_root is not None:
            yield from self._noted(old_root, fact, history.RENAME, fact.old_path)
        if mount is None and old_mount is not None and old_root is None and fact.path and old_mount.way != "network":
            self._came((self._inbound.moved(fact, old_mount),))
        if root is not None:
            self._lineage.came_back(fact.key, fact.at_ms)
        elif mount is not None and old_mount is not None and old_root is None:
            self._arrived([self._joins.moved_within(fact, fact.old_path, fact.size, fact.is_dir)])
        elif mount is not None:
            origin = self._origin(fact, old_root)
            self._arrived([self._joins.moved_onto(fact, mount, origin, fact.size, fact.is_dir)])
        elif old_root is not None:
            self._lineage.learn(fact.key, fact.old_path, old_root.path, "moved", fact.at_ms)
            if fact.is_dir and fact.path:
                self._lineage.learn_dir(fact.path, fact.old_path, old_root.path, fact.at_ms)
        elif not fact.is_dir and not fact.old_path:
            self._lineage.moved(fact.key, fact.path)
        elif fact.is_dir and fact.path and (known := self._lineage.of(b"", fact.old_path + "/")) is not None:
            self._lineage.learn_dir(fact.path, known.path.rstrip("/"), known.root, fact.at_ms)

    def _on_attributes(self, fact: facts.Attributes) -> Iterator[Event]:
        fact.path = clean_path(fact.path)
        root = self._places.root(fact.path) or self._places.of(fact.path)[0]
        if root is not None:
            if (fact.links or 0) > 1:
                self._lineage.learn(fact.key, fact.path, root.path, "linked", fact.at_ms)
            if fact.pid:
                self._rights.touched(root.path, self._people.who(fact.pid), fact.pid)
        return iter(())

    def _on_rights(self, fact: facts.Rights) -> Iterator[Event]:
        root = self._places.root(fact.root)
        if root is not None and (drift := self._rights.looked(fact)) is not None:
            yield self._writer.access(drift, root.label)

    # -- media ---------------------------------------------------------------------------------------------------------

    def _on_plugged(self, fact: facts.Plugged) -> Iterator[Event]:
        medium, new, late = self._media.plugged(fact)
        self._places.forget()
        if medium is None:
            return
        yield from self._devices.plugged(fact, medium, new)
        for mount in (*late, *self._media.stacked()):
            yield from self._mount(mount, fact.at_ms)
        yield from self._judging.review(medium, fact.at_ms)

    def _on_unplugged(self, fact: facts.Unplugged) -> Iterator[AnyEvent]:
        medium = self._media.unplugged(fact)
        if medium is None:
            return
        self._arrived(self._joins.medium_gone(medium.id))
        events: list[AnyEvent] = []
        while self._waiting:
            self._judging.left(*self._waiting.popleft(), events)
        yield from events
        yield self._devices.unplugged(medium, fact.at_ms)

    def _on_mounted(self, fact: facts.Mounted) -> Iterator[Event]:
        mount = self._media.mounted(fact)
        self._places.forget()
        for outside, path, root in self._places.shown(fact.reach or fact.mount, fact.lies_on) if fact.lies_on else ():
            self._lineage.show((fact.namespace, fact.mount_id), outside, path, root.path, fact.at_ms)
        if mount is not None and mount.way != "network":
            for each in (mount, *self._media.stacked()):
                yield from self._mount(each, fact.at_ms)
            yield from self._judging.review(mount.medium, fact.at_ms)

    def _mount(self, mount: Mount, at_ms: int) -> Iterator[Event]:
        verdict, story = self._judging.decide(mount.medium, at_ms), self._devices.story(mount.medium)
        yield self._writer.mounted(mount, verdict, self._people.session, at_ms, story)
        yield from self._devices.mounted(mount, at_ms)

    def _on_transferred(self, fact: facts.Transferred) -> Iterable[Event]:
        self._devices.transferred(fact)
        return ()

    def _on_unmounted(self, fact: facts.Unmounted) -> Iterator[Event]:
        mount = self._media.unmounted(fact)
        self._lineage.hide((fact.namespace, fact.mount_id))
        self._places.forget()
        if mount is not None:
            self._arrived(self._joins.mount_gone(mount))
            if mount.way != "network":
                verdict = self._judging.decide(mount.medium, fact.at_ms)
                yield self._writer.unmounted(mount, verdict, self._people.session, fact.at_ms)

    def _on_node_written(self, fact: facts.NodeWritten) -> Iterable[Event]:
        """What is on a device is known to nobody who reads only its file systems: what its writer read may be there."""
        mount = self._media.raw(fact.node)
        if mount is not None:
            key, path = fact.node.encode(), clean_path(fact.path)
            self._joins.created(facts.Created(at_ms=fact.since_ms, pid=fact.pid, key=key, path=path), mount)
            arrival = self._joins.closed(facts.Closed(at_ms=fact.at_ms, pid=fact.pid, key=key, path=path), mount, None)
            self._arrived((arrival,))
        return ()

    # -- ways out that are no mounts -----------------------------------------------------------------------------------

    def _on_way_held(self, fact: facts.WayHeld) -> Iterable[Event]:
        if not fact.device or fact.way == "print" or fact.device in self._media.present:
            self._departed(self._ways.held(fact))
            self._devices.used(fact)
        return ()

    def _on_way_closed(self, fact: facts.WayClosed) -> Iterable[Event]:
        self._departed(self._ways.closed(fact))
        return ()

    def _on_way_used(self, fact: facts.WayUsed) -> Iterable[Event]:
        self._departed(self._ways.used(fact))
        return ()

    def _on_register(self, fact: facts.Register) -> Iterator[Event]:
        held = self._register.version
        if self._register.replace(fact):
            self._dirty = True
            yield from self._review_all(fact.at_ms)
        else:
            # Once signed, but older than what we decided by: a copy of last month's, put in its place while we were stopped.
            detail = {"held": held, "sent": fact.version}
            yield self._writer.tampered(facts.Tampered(at_ms=fact.at_ms, what="register_rollback", detail=detail))

    def _on_register_confirmed(self, fact: facts.RegisterConfirmed) -> Iterable[Event]:
        self._register.confirmed(fact.at_ms)
        return ()

    def _review_all(self, at_ms: int) -> Iterator[Event]:
        for medium in list(self._media.present.values()):
            yield from self._judging.review(medium, at_ms)

    def _on_unlocked(self, fact: facts.Unlocked) -> Iterator[Event]:
        self._register.unlock(fact)
        self._dirty = True
        yield from self._refusals.unlocked(fact)
        yield from self._review_all(fact.at_ms)

    # -- the agent itself ----------------------------------------------------------------------------------------------

    def _on_started(self, fact: facts.Started) -> Iterator[Event]:
        self._devices.started(fact)
        detail: dict[str, Any] = {"boot_id": fact.boot_id, "mode": fact.mode, "previous": fact.previous}
        yield self._writer.life("agent.started", fact.at_ms, {key: value for key, value in detail.items() if value})
        yield self._config_event(fact.at_ms, fact.config_digest, fact.mode)

    def _config_event(self, at_ms: int, digest: str, mode: str) -> Event:
        return self._writer.life("agent.config", at_ms, {"config_digest": digest, "mode": mode})

    def _on_clock(self, fact: facts.Clock) -> Iterator[Event]:
        if fact.offset_ms is not None:
            self._writer.offset_ms = fact.offset_ms
        if fact.jump_ms > 0:  # back: reads of what is the future now join for longer, which loses nothing
            self._joins.reads.clock_set(fact.jump_ms, fact.at_ms)
            self._inbound.clock_set(fact.jump_ms, fact.at_ms)
        if fact.jump_ms or fact.suspended_ms:
            yield self._writer.clock(fact)

    def _on_tick(self, fact: facts.Tick) -> Iterator[Event]:
        self._departed(self._ways.due(fact.at_ms))
        yield from self._refusals.due(fact.at_ms)
        yield from self._devices.due(fact.at_ms)
        self._register.passed(fact.at_ms)
        for summary in self._history.due(fact.at_ms):
            yield self._told(summary)
        if (lost := self._joins.forgotten(fact.at_ms, bool(self._media.mounts))) is not None:
            yield self._writer.gap(lost)
        if not 0 <= fact.at_ms - self._swept_ms < _SWEEP_MS:
            self._swept_ms = fact.at_ms
            for pid in self._people.sweep(fact.at_ms):
                self._joins.forget(pid)
                self._ways.forget(pid)
                self._inbound.forget(pid)
            self._came(self._inbound.sweep(fact.at_ms))
            self._lineage.sweep(fact.at_ms)
            self._staging.sweep(fact.at_ms)
            if (lost := self._forgotten(fact.at_ms)) is not None:
                yield self._writer.gap(lost)
            if (lost := self._inbound.lost(fact.at_ms)) is not None:
                yield self._writer.gap(lost)
            self._limits.sweep(fact.at_ms)
            for medium in list(self._media.present.values()):
                yield from self._judging.review(medium, fact.at_ms)

    def _on_stopping(self, fact: facts.Stopping) -> Iterator[AnyEvent]:
        self._came(self._inbound.everything())
        settled = self._joins.everything()
        self._arrived(each for each in settled if isinstance(each, Arrival))
        for each in (*self._staging.unanswered(), *settled):
            if isinstance(each, Written) and (copy := self._staging.at_once(each)) is not None:
                yield from self._staged(copy)
        self._departed(self._ways.everything(fact.at_ms))
        for summary in self._history.everything():
            yield self._told(summary)

    # -- from arrivals to events and findings --------------------------------------------------------------------------

    def _arrived(self, arrivals: Iterable[Settled | None]) -> None:
        for arrival in arrivals:
            if isinstance(arrival, Arrival):
                if not arrival.left and not arrival.mount.mount:
                    continue  # a device that was formatted, partitioned, checked
                self._waiting.extend((arrival, left) for left in self._staging.spread(arrival.left) or (None,))
            elif arrival is not None:
                self._staging.consider(arrival)

    def _came(self, brought: Iterable[Brought]) -> None:
        self._waiting.extend((each, None) for each in brought)
        if self._inbound.wanted:
            self.wanted += self._inbound.wanted
            self._inbound.wanted.clear()

    def _departed(self, departures: Iterable[Departure]) -> None:
        for departure in departures:
            self._waiting.extend((departure, left) for left in self._staging.spread(departure.left))

    def _forgotten(self, now_ms: int) -> facts.Lost | None:
        """What of staged copies was given up for room since this was last told."""
        count, since_ms = self._lineage.dropped + self._staging.unasked, self._untold_since_ms or now_ms
        self._lineage.dropped = self._staging.unasked = 0
        self._untold_since_ms = now_ms
        lost = facts.Lost(at_ms=now_ms, reason="lineage_full", since_ms=since_ms, until_ms=now_ms, count=count)
        return lost if count else None

    def _noted(self, root: ProtectedDir, fact: facts.FileFact, what: str, path: str = "") -> Iterable[Event]:
        full = self._history.add(self._people.who(fact.pid), root.path, path or fact.path, what, fact.at_ms)
        return (self._told(full),) if full is not None else ()

    def _told(self, summary: history.Summary) -> Event:
        root = self._places.root(summary.whose.root)
        return self._writer.history(summary, root.label if root is not None else summary.whose.root, self._now_ms)

    def _is_protected(self, file: facts.OpenFile) -> bool:
        """Whether a file that a process holds is a protected one, wherever it lies now."""
        known = self._lineage.of(file.key, file.path) or self._lineage.staged(file.key)
        return known is not None or self._places.is_protected(file.path)

    def _is_on_medium(self, file: facts.OpenFile) -> bool:
        """Whether a file that a process holds lies on a medium."""
        return self._places.of(file.path)[1] is not None

    def _known_as(self, file: facts.OpenFile) -> Known | None:
        """What a file that a process holds is a copy of, or was before it was moved out or linked."""
        if self._lineage.empty:
            return None
        if (copy := self._lineage.staged(file.key)) is not None:
            return copy.path, copy.sources[0].path, copy.sources[0].root
        origin = self._lineage.of(file.key, file.path)
        return None if origin is None else (file.path, origin.path, origin.root)

    def _origin(self, fact: facts.FileFact, old_root: ProtectedDir | None) -> Read | None:
        """The protected file that was renamed or linked onto a medium, as if it had been read."""
        size = getattr(fact, "size", None)
        if old_root is not None:
            return read_of(fact.old_path, old_root.path, size, fact.at_ms)  # type: ignore[attr-defined]
        if (copy := self._lineage.staged(fact.key)) is not None:
            return read_elsewhere(copy.path, copy.sources[0].path, copy.sources[0].root, size or copy.size, fact.at_ms)
        origin = self._lineage.of(fact.key, getattr(fact, "old_path", ""))
        return None if origin is None else read_of(origin.path, origin.root, size, fact.at_ms)

    # -- for the daemon ------------------------------------------------------------------------------------------------

    def reconfigure(self, config: CoreConfig) -> None:
        """Take another configuration (SIGHUP); counters and tables stay."""
        self._limits.limits = config.limits
        self._lineage.keep_ms = config.keep_copies_ms
        self._judging.require_approval, self._judging.record_names = config.require_approval, config.record_names
        self._judging.ways_severity, self._ways.off = config.ways_severity, config.ways_off
        self._media.shares = "network" not in config.ways_off
        self._devices.first_use = config.first_use
        self._writer.name(config.record_names, (root.path for root in config.protect))
        self._places.protect(config.protect)
        self._refusals.policy, self._refusals.protect = config.enforce, config.protect
        self._rights.forget({root.path for root in config.protect})

    def stops(self, now_ms: int) -> list[Stop]:
        """Which media must be stopped now, and how far: all of them, each time."""
        return self._refusals.stops(now_ms)

    @property
    def keys_present(self) -> list[str]:
        """The keys of all media that are plugged in."""
        return [medium.key for medium in self._media.present.values()]

    @property
    def unlocks_used(self) -> dict[str, int]:
        """Break-glass codes that were used here, and until when each held."""
        return self._register.unlocks_used

    @property
    def known_ms(self) -> int:
        """A time that is surely past: the collector confirmed the register then. 0: it never did."""
        return self._register.confirmed_ms

    def watches(self) -> list[MountWatch]:
        """The mounts of media that must be marked now."""
        return list(self._media.watches())

    def compare(self) -> list[Ask]:
        """Files to be compared with protected ones now, each to be told as a Compared fact; then `unlike` is empty."""
        asked = list(self.unlike)
        self.unlike.clear()
        return asked

    def trace(self) -> list[Trace]:
        """Files that may have come from media, each to be told as a Traced fact; then `untraced` is empty."""
        asked = list(self.untraced)
        self.untraced.clear()
        return asked

    def doubt(self) -> list[Doubt]:
        """Files on media to be compared now, each to be told as a Compared fact; then `doubtful` is empty."""
        doubtful = list(self.doubtful)
        self.doubtful.clear()
        return doubtful

    def mark(self) -> list[tuple[bytes, str]]:
        """Key and path of staged copies to be watched from now on; then `unmarked` is empty."""
        unmarked = list(self.unmarked)
        self.unmarked.clear()
        return unmarked

    def stirred(self) -> list[str]:
        """Protected directories in which rights were changed since this was last asked."""
        stirred = list(self._rights.stirred)
        self._rights.stirred.clear()
        return stirred

    def copies(self) -> list[tuple[bytes, str]]:
        """Key and path of all staged copies that must be watched."""
        return self._lineage.copies()

    def ask(self) -> list[str]:
        """Paths of opened files that must be looked up now, each to be told as a Sized fact; then `wanted` is empty."""
        wanted = list(self.wanted)
        self.wanted.clear()
        return wanted

    @property
    def due_ms(self) -> int | None:
        """When `feed` has something to tell even if nothing happens until then (a Tick will do); None: not known."""
        if self._waiting:
            return self._now_ms
        due_ms, also_ms = self._joins.due_ms, self._inbound.due_ms
        return due_ms if also_ms is None else also_ms if due_ms is None else min(due_ms, also_ms)

    @property
    def untold_since_ms(self) -> int | None:
        """When the oldest of the copies arrived that are known, but were too many to be told yet; None: all are told."""
        return self._waiting[0][0].at_ms if self._waiting else None

    @property
    def state_changed(self) -> bool:
        """Whether `state` is worth keeping now."""
        changed = self._dirty or any(room.changed for room in self._rooms)
        return changed and not 0 <= self._now_ms - self._kept_ms < self._keep_every_ms

    def state(self) -> bytes:
        """What must outlive a restart: register, limit counters, lineage, findings made for media that are plugged in."""
        self._dirty = False
        for room in self._rooms:
            room.changed = False
        self._kept_ms = self._now_ms
        kept = msgspec.msgpack.encode(_State(*(room.to_bytes() for room in self._rooms)))
        self._keep_every_ms = min(_KEEP_MS, len(kept) // _KEEP_BYTES_A_MS)
        return kept

    def restore(self, data: bytes | None) -> None:
        """Take back what `state` gave. What can't be read is said in an `agent.gap` with the next fact."""
        if not data:
            return
        try:
            kept = msgspec.msgpack.decode(data, type=_State)
            for room, part in zip(self._rooms, msgspec.structs.astuple(kept), strict=True):
                room.from_bytes(part)
        except msgspec.MsgspecError:
            self._state_lost = True

    def media_now(self, now_ms: int) -> list[dict[str, Any]]:
        """One row a mount of each medium present (one with an empty mount if it has none), each with its decision."""
        rows = []
        for medium in self._media.present.values():
            verdict = self._register.decide(medium.key, now_ms)
            about = {"key": medium.key, "name": medium.name, "serial": medium.serial, "kind": medium.kind, "bus": medium.bus}
            about |= {"decision": verdict.decision, "reason": verdict.reason, "approval": verdict.approval}
            about |= self._devices.about(medium)
            mounts = self._media.of(medium)
            places = [{"mount": each.mount, "fs": each.fs, "read_only": each.read_only} for each in mounts]
            for place in places or [{"mount": "", "fs": "", "read_only": medium.read_only}]:
                rows.append({**about, **place, "simulated": medium.simulated, "stopped": self._refusals.held(medium)})
        return rows

    def counts(self) -> dict[str, int]:
        """Events by code, and how much is remembered, for `status`."""
        kept = {"processes": len(self._people), "reads": len(self._joins.reads), "waiting": len(self._waiting)}
        kept |= {"ways": len(self._ways), "copies": len(self._lineage), "devices": len(self._devices)}
        return dict(self._counts) | kept
