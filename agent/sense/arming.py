"""Finished writes elsewhere on the machine, watched only while somebody may be copying protected files: *staging*.

Owns: a third notification group, which carries FAN_CLOSE_WRITE marks on the system's own file systems while armed and none
otherwise; when it is armed and for how long; and the early filter: of all that is written meanwhile, only what is closed by
those whom `interest.py` lets through is resolved to a path. Arming itself is done by the small process that holds the first
opener (`tripwire.py`), disarming by it too, so that no open falls between. Where nobody can be held, or holding is off, the
marks stand. Must not know what a copy is.

The group tells file handles only (no names: half the kernel's work), and is read every READ_MS rather than at each event:
a wake is paid by whoever writes. While armed, a build, `cp -r` and tar beside it are 0-3 % slower (docs/staging.md).
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from agent.contract.event import path_bytes, path_text
from agent.core.facts import Closed, Compared, Coverage, Fact, Lost
from agent.sense import SensorError, kernel
from agent.sense.fanotify_events import heads, names
from agent.sense.interest import Interest
from agent.sense.likeness import compare
from agent.sense.looking import lstat
from agent.sense.marks import Marks, key_of
from agent.sense.paths import Paths

READ_MS = 50
_SETTLE_MS = 1_000
"""Between "hold the next one" and the end of the watch: what was opened in between has been read from the queue by then."""
_READ_BYTES = 1 << 18
_READS = 16
_DIRS_A_MESSAGE = 100
_DIRS_A_STEP = 2_000
_FLUSH = kernel.FAN_MARK_FLUSH | kernel.FAN_MARK_FILESYSTEM

OnPid = Callable[[int], None]
Question = tuple[bytes, str, list[tuple[str, int | None]], int]
"""(key, path last known, [(path of a source, its size)], bytes of all sources): `core.staging.Ask`"""


class Holding(Protocol):
    """What of the process that holds opens is needed here."""

    starts: int
    tripwire_said: list[tuple[Any, ...]]

    def lay_tripwire(self, writes: int) -> None:
        """Begin."""

    def tripwire(self, order: str, paths: list[bytes] | None = None) -> bool:
        """Give an order."""


class Arming:
    """`read` for each opener of protected files; `take` and `facts` at each turn, `step` once a second.

    `parent` answers with the parent of a pid; `own`: directories whose files are nobody's copies; without a `holder` the
    marks stand. `armed` tells whether writes are watched now, `wants_copies` that all copies must be marked anew (whoever
    does it sets it back), `ignore` are pids whose writes are nobody's business.
    """

    def __init__(
        self, marks: Marks, paths: Paths, holder: Holding | None, parent: Callable[[int], int], own: list[str]
    ) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_FID
        try:
            self._group = kernel.fanotify_init(flags | kernel.FAN_UNLIMITED_QUEUE | kernel.FAN_UNLIMITED_MARKS)
        except OSError as error:
            raise SensorError(f"fanotify: {error.strerror}") from None
        self._marks, self._paths, self._holder = marks, paths, holder
        self.ignore = {os.getpid()}
        self._interest = Interest(parent)
        self._own = [os.fsencode(each).rstrip(b"/") + b"/" for each in own]
        self._systems: dict[bytes, bytes] = {}
        self._refused: dict[bytes, str] = {}
        self._trees: list[bytes] = []
        self._pending: list[tuple[bytes, bool]] = []
        self._walk: Iterator[None] | None = None
        self._starts = self._trips = self._read_ms = self._unmarked = 0
        self._set_ms: int | None = None
        self.armed, self.wants_copies = False, True
        marks.on_mark = self._marked
        if self._holder is not None:
            self._holder.lay_tripwire(self._group)

    # -- what is watched ----------------------------------------------------------------------------------------------

    def watch(self, systems: list[bytes]) -> None:
        """The mount points of all file systems on which a copy would be one elsewhere; one each, local and writable."""
        wanted: dict[bytes, bytes] = {}
        tops: dict[bytes, list[bytes]] = {}
        self._refused = {path: why for path, why in self._refused.items() if path in systems}
        for path in systems:
            try:
                system = kernel.fsid(path)
                if system in wanted:
                    continue
                if system in self._systems and path == self._systems[system]:
                    wanted[system] = path
                    for top, paths in self._marks.tops.items():
                        if path in paths:
                            tops.setdefault(top, []).append(path)
                    continue
                told_as = kernel.mark_whole(self._group, kernel.FAN_MARK_ADD, kernel.FAN_CLOSE_WRITE, path)
            except OSError as error:
                self._refused[path] = error.strerror or str(error)
                continue
            wanted[system] = path
            if told_as != system:
                tops.setdefault(told_as, []).append(path)
            if not self.armed and self._holder is not None:
                self._disarm_at_once(path)
        if wanted == self._systems:
            return
        self._systems = wanted
        self._marks.systems, self._marks.tops = dict(wanted), tops
        self._tell("systems", list(wanted.values()))
        if self._holder is None:
            self._arm()

    def _disarm_at_once(self, path: bytes) -> None:
        """It was only tried whether the mark can be had."""
        try:
            kernel.mark_whole(self._group, kernel.FAN_MARK_REMOVE, kernel.FAN_CLOSE_WRITE, path)
        except OSError:
            return  # unmounted since, or armed and disarmed in between

    def _marked(self, path: bytes, gone: bool) -> None:
        """A directory or file of protected content was marked by the file sensor: it is to trip as well."""
        if self._pending and self._pending[-1][1] != gone:
            self._flush()
        self._pending.append((path, gone))
        if len(self._pending) >= _DIRS_A_MESSAGE:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            order = "unmark" if pending[0][1] else "mark"
            if not self._tell(order, [path for path, _ in pending]) and self._holder is not None and not pending[0][1]:
                self._unmarked += len(pending)

    def _tell(self, order: str, paths: list[bytes] | None = None) -> bool:
        return self._holder is not None and self._holder.tripwire(order, paths)

    # -- armed and disarmed -------------------------------------------------------------------------------------------

    def read(self, pid: int, now_ms: int) -> None:
        """A process opened something protected. Usually it was held at that, and we are armed."""
        self._interest.read(pid, now_ms)
        self._set_ms = None
        if not self.armed:
            self._arm()

    def step(self, now_ms: int) -> None:
        """Once a second: mark anew what a restarted holder does not know, end the watch when nobody is left."""
        self._flush()
        self._hear()
        holder = self._holder
        if holder is None:
            return
        if holder.starts != self._starts:
            self._begin(holder)
        trees = [root.path for root in self._marks.roots.values() if not root.medium]
        if trees != self._trees and self._tell("trees", trees):
            self._trees = trees
        if self._walk is not None:
            for _ in range(_DIRS_A_STEP):
                if next(self._walk, self) is self:
                    self._walk = None
                    break
            self._flush()
        elif self._unmarked:
            self._unmarked, self._walk = 0, self._marks.again()
        elif self.armed and not self._interest.left(now_ms):
            if self._set_ms is None or now_ms < self._set_ms:
                if self._tell("set"):
                    self._set_ms = now_ms
            elif now_ms - self._set_ms >= _SETTLE_MS and self._tell("disarm"):
                self._set_ms = None

    def _begin(self, holder: Holding) -> None:
        """The small process is new and knows nothing: until it does, the watch stands."""
        self._starts = holder.starts
        self._arm()
        self._set_ms = None
        self._trees = []
        self._tell("systems", list(self._systems.values()))
        self._walk = self._marks.again()
        self.wants_copies = True

    def _arm(self) -> None:
        self.armed = True
        for path in self._systems.values():
            try:
                kernel.mark_whole(self._group, kernel.FAN_MARK_ADD, kernel.FAN_CLOSE_WRITE, path)
            except OSError as error:
                self._refused[path] = error.strerror or str(error)

    def _hear(self) -> None:
        if self._holder is None:
            return
        said, self._holder.tripwire_said = self._holder.tripwire_said, []
        for each in said:
            self._trips = each[1]
            self.armed = each[0] == "tripped"
            if self.armed:
                self._set_ms = None

    # -- what was written ---------------------------------------------------------------------------------------------

    def take(self) -> list[bytes]:
        """What the kernel has to tell by now. Take it before opens are read, give it to `facts` after."""
        self._hear()
        if not self.armed:
            return []
        buffers = []
        for _ in range(_READS):
            try:
                buffers.append(os.read(self._group, _READ_BYTES))
            except BlockingIOError:
                break
        return buffers

    def facts(self, buffers: list[bytes], now_ms: int, on_pid: OnPid) -> Iterator[Fact]:
        """Closed for each file that somebody of interest finished elsewhere, by its present path."""
        since_ms, self._read_ms = self._read_ms or now_ms, now_ms
        concerns, ignore = self._interest.concerns, self.ignore
        wanted: dict[tuple[int, bytes], None] = {}
        for buffer in buffers:
            for mask, _, pid, start, end in heads(buffer):
                if mask & kernel.FAN_Q_OVERFLOW:
                    yield Lost(at_ms=now_ms, reason="staging_overflow", since_ms=since_ms, until_ms=now_ms)
                elif pid not in ignore and concerns(pid):
                    at = (pid, names(buffer, start, end).target)
                    wanted.pop(at, None)
                    wanted[at] = None
        for pid in dict.fromkeys(pid for pid, _ in wanted):
            on_pid(pid)
        for pid, key in wanted:
            yield from self._closed(pid, key, now_ms)

    def _closed(self, pid: int, key: bytes, now_ms: int) -> Iterator[Fact]:
        looked = self._paths.look(key) if key else None
        if looked is None or looked[1] is None or not looked[1].st_nlink:
            if key:  # removed by now; who took it further may have been seen with it in hand
                yield Closed(at_ms=now_ms, pid=pid, key=key, path="")
            return
        raw, seen = looked
        if not raw or not stat.S_ISREG(seen.st_mode):
            return
        if raw.startswith(tuple(self._own)) or self._marks.root_of(raw) is not None:
            return  # ours, or told by the mark that lies there
        if key[:8] in self._marks.tops:
            key = key_of(raw)  # as it is told where it is opened
        born_ms = kernel.birth_ms(raw)
        yield Closed(at_ms=now_ms, pid=pid, key=key, path=path_text(raw), size=seen.st_size, born_ms=born_ms)

    def where(self, key: bytes) -> tuple[bytes, os.stat_result] | None:
        """Where a file that was told lies now, by its key; None if it is gone."""
        looked = self._paths.look(key)
        if looked is None or looked[1] is None or not looked[1].st_nlink or not looked[0]:
            return None
        return looked

    def look(self, asked: Sequence[Question], now_ms: int) -> Iterator[Fact]:
        """Compared for each question."""
        for key, path, sources, total in asked:
            raw = path_bytes(path)
            seen = lstat(raw)
            if seen is None or key_of(raw) != key:  # renamed or gone; this way costs three times as much
                raw, seen = self._paths.look(key) or (b"", None)
            if seen is None or not seen.st_nlink or not raw:
                yield Compared(at_ms=now_ms, key=key, path=path, size=0, alike="gone")
                continue
            alike = compare(raw, [(path_bytes(each), size) for each, size in sources], total)
            yield Compared(at_ms=now_ms, key=key, path=path_text(raw), size=seen.st_size, alike=alike)

    # -- a sensor's rest ----------------------------------------------------------------------------------------------

    def coverage(self, now_ms: int) -> Coverage:
        """Whether copies made elsewhere are seen, and where not."""
        why = [f"{path_text(path)}: writes can't be watched ({said})" for path, said in sorted(self._refused.items())]
        blind = ["staging_elsewhere"] if why else []
        if not self._systems:
            why.append("no file system could be watched")
            blind = ["staging_elsewhere"]
        how = "standing" if self._holder is None else "armed while protected files are read"
        counts = f"{len(self._systems)} file systems, {how}"
        return Coverage(
            at_ms=now_ms,
            sensor="staging",
            ok=bool(self._systems),
            sees=["copies_elsewhere"] if self._systems else [],
            blind=blind,
            why="; ".join([counts, *why]),
        )

    def close(self) -> None:
        """Closing the group drops its marks."""
        if self._group >= 0:
            os.close(self._group)
            self._group = -1
