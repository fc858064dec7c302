"""pid → who: process, parents, and the login user behind it; and how sure that is.

Question: by whose hand? Owns: the process table (a value fed with ProcSeen and ProcGone, bounded, forgetting the dead after a
while), kinship by descent (ancestors, descendants; what pipes say is in `channels`), the person at the active session, and
the masking of secrets in argv. Must not know files, media or /proc. The login uid is the kernel's (`/proc/PID/loginuid`),
which su and sudo keep.
A pid alone names nobody: an entry lives from one `start` to the next, and file facts may come after the process ended.
"""

from collections.abc import Iterator
from itertools import islice

from msgspec import structs

from agent.core.channels import Channels
from agent.core.entry import NO_LOGIN, Entry
from agent.core.facts import Process, ProcGone, ProcSeen, Session
from agent.core.masks import masked
from agent.core.media import clean

__all__ = ["NO_LOGIN", "Entry", "People", "clean_exe"]

_MOST = 8_192
_KEPT_DEAD_MS = 60_000
_MAX_ANCESTORS = 12
_NEAR_GENERATIONS = 3
_KEPT = (
    *("start", "began_ms", "ppid", "loginuid", "login_user", "user", "session", "tty", "remote"),
    *("unit", "container", "image", "argv", "parents"),
)
_BEFORE_MS = 10_000
"""A pipe keeps what a stage wrote that ended before the shell came to fork the next one"""
_MOST_SEARCHED = 4_096
_BESIDE = 64


def _cleaned(process: Process) -> Process:
    return structs.replace(
        process,
        exe=clean_exe(process.exe),
        argv=masked(process.argv),
        user=clean(process.user),
        login_user=clean(process.login_user),
        session=clean(process.session),
        tty=clean(process.tty),
        remote=clean(process.remote),
        unit=clean(process.unit),
        container=clean(process.container),
        image=clean(process.image),
    )


def _another_life(start: int, other: int) -> bool:
    """Whether two start times of a pid are of two processes. By the proc connector it is a tick later at times; 0: unknown."""
    return 0 not in (start, other) and abs(start - other) > 1


def clean_exe(exe: str) -> str:
    """The path of a program, without what the kernel appends once the file was replaced."""
    return clean(exe.removesuffix(" (deleted)"))


class People:
    """The process table. `who(pid)` answers for the living and, for a minute, for the dead."""

    def __init__(self) -> None:
        self._table: dict[int, Entry] = {}
        self._channels = Channels(self.who, self.ancestors)
        self._born: dict[int, dict[int, None]] = {}
        """Descendants of a pid, in the order in which they were first told"""
        self.session = Session(at_ms=0)

    def seen(self, fact: ProcSeen) -> bool:
        """Take in what is known of a process now. True if the pid began a new life, so that all that was tied to it ends."""
        process, at_ms = _cleaned(fact.process), fact.at_ms
        known = self._table.pop(process.pid, None)
        reborn = known is not None and _another_life(known.process.start, process.start)
        if known is None or reborn:
            if known is not None:
                self._drop(known)
            entry = Entry(process, at_ms)
            self._bear(entry)
        else:
            entry, parents = known, known.process.parents
            self._merge(entry, process, at_ms)
            if entry.process.parents != parents:
                self._bear(entry)
        self._table[process.pid] = entry
        self._channels.held(entry)
        while len(self._table) > _MOST:
            self._drop(self._table.pop(next(iter(self._table))))
        return reborn

    def sit_down(self, fact: Session) -> None:
        """Who sits at the active local session from now on."""
        self.session = structs.replace(fact, user=clean(fact.user), session=clean(fact.session))

    def gone(self, fact: ProcGone) -> None:
        """A process ended; what its last facts tell may still be on the way."""
        entry = self._table.get(fact.pid)
        if entry is not None and not _another_life(fact.start, entry.process.start):
            entry.gone_ms = fact.at_ms if fact.ended_ms is None else fact.ended_ms

    def who(self, pid: int) -> Entry | None:
        """The entry of a pid, None if nothing was told of it."""
        return self._table.get(pid)

    def sweep(self, now_ms: int) -> list[int]:
        """Forget who ended more than a minute ago; the pids forgotten."""
        old = [
            pid for pid, entry in self._table.items() if entry.gone_ms is not None and now_ms - entry.gone_ms > _KEPT_DEAD_MS
        ]
        for pid in old:
            self._drop(self._table.pop(pid))
        return old

    def __len__(self) -> int:
        """How many processes are remembered."""
        return len(self._table)

    def ancestors(self, pid: int) -> Iterator[int]:
        """Parents of a process, nearest first, without init; a pid that was reused since is not followed."""
        entry, seen = self._table.get(pid), {pid}
        while entry is not None and len(seen) <= _MAX_ANCESTORS:
            told = [(parent.pid, parent.start) for parent in entry.process.parents] or [(entry.process.ppid, 0)]
            entry = None
            for parent, start in told:
                if parent <= 1 or parent in seen:
                    return
                known = self._table.get(parent)
                if known is not None and _another_life(start, known.process.start):
                    return
                seen.add(parent)
                yield parent
                entry = known

    def kin(self, pid: int) -> list[int]:
        """Other processes that can have handed their data to `pid`: who shares a pipe, and its ancestors (rsync's sender, a
        shell that opened the file)."""
        return list(dict.fromkeys((*self.piped(pid), *self.ancestors(pid))))

    def piped(self, pid: int) -> list[int]:
        """Who can have fed `pid` by a pipe, a named pipe or a socket, over any number of stages."""
        return self._channels.upstream(pid)

    def descendants(self, pid: int, since_ms: int, most: int = _MOST_SEARCHED) -> Iterator[Entry]:
        """Processes below `pid` that were first told at `since_ms` or later, the last ones first."""
        start = self._table[pid].process.start if pid in self._table else 0
        for other in islice(reversed(self._born.get(pid, ())), most):
            entry = self._table[other]
            if entry.first_ms < since_ms:
                return
            if all(parent.pid != pid or not _another_life(start, parent.start) for parent in entry.process.parents):
                yield entry

    def beside(self, pid: int, since_ms: int) -> Iterator[Entry]:
        """Who may have fed a pipe of `pid`, or of a stage before it, whose other end nobody told: processes of the same parent
        (or of a subshell of it) that lived meanwhile, with such a pipe too, or that no look caught alive."""
        for head in (pid, *self.piped(pid)):
            entry = self._table.get(head)
            parent = next(self.ancestors(head), 0)
            unfed = self._channels.unfed(head)
            if entry is None or not parent or not (unfed or (head == pid and entry.became_another)):
                continue
            by_name = self._channels.unfed_by_name(head)
            ended_ms = entry.born_ms - (_BEFORE_MS if unfed else 0)
            earliest_ms = min(since_ms, entry.born_ms - _BEFORE_MS)
            for other in self._around(parent, head):
                if other.first_ms < earliest_ms:
                    continue
                near = [each.pid for each in other.process.parents[:_NEAR_GENERATIONS]] or [other.process.ppid]
                alive = other.gone_ms is None or other.gone_ms >= ended_ms
                late = by_name and abs(other.born_ms - entry.born_ms) <= _BEFORE_MS
                below = other is not entry and parent in near and pid not in near
                if alive and below and (late or other.blind or self._channels.unheard(other.process.pid)):
                    yield other

    def _around(self, parent: int, pid: int) -> Iterator[Entry]:
        """Processes below `parent` that were first told next to `pid`: a shell may have begun thousands."""
        born = list(self._born.get(parent, ()))
        at = born.index(pid) if pid in self._born.get(parent, ()) else len(born)
        start = self._table[parent].process.start if parent in self._table else 0
        for other in born[max(0, at - _BESIDE) : at + _BESIDE]:
            entry = self._table[other]
            if all(each.pid != parent or not _another_life(start, each.start) for each in entry.process.parents):
                yield entry

    @staticmethod
    def _merge(entry: Entry, process: Process, at_ms: int) -> None:
        """A later look at the same life; a look at a dead one brings less and must not take away what was known."""
        before = entry.process
        entry.seen_ms = at_ms
        if process.ended_ms is not None:
            entry.gone_ms = process.ended_ms
        elif entry.gone_ms is not None and process.known == "exact":
            entry.gone_ms = None
        entry.hold(process, at_ms)
        entry.files = process.files or entry.files
        if process.exe:
            kept = structs.replace(process, known="exact" if before.known == "exact" else process.known)
            if process.known != "exact":
                kept.blind = process.blind or before.blind
        else:
            kept = structs.replace(before, uid=before.uid if process.uid is None else process.uid)
        for name in _KEPT:
            if getattr(kept, name) in (0, None, "", []) and getattr(process, name) not in (0, None, "", []):
                setattr(kept, name, getattr(process, name))
            elif getattr(kept, name) in (0, None, "", []) and not (name == "argv" and kept.exe != before.exe):
                setattr(kept, name, getattr(before, name))
        if process.loginuid not in (None, NO_LOGIN):
            kept.loginuid, kept.login_user = process.loginuid, process.login_user or kept.login_user
        if kept != before:
            entry.process, entry.encoded = kept, None

    def _bear(self, entry: Entry) -> None:
        process = entry.process
        for parent in [each.pid for each in process.parents] or [process.ppid]:
            if parent > 1:
                self._born.setdefault(parent, {}).setdefault(process.pid)

    def _drop(self, entry: Entry) -> None:
        process = entry.process
        for parent in {process.ppid, *(each.pid for each in process.parents)}:
            born = self._born.get(parent)
            if born is not None:
                born.pop(process.pid, None)
                if not born:
                    del self._born[parent]
        self._channels.dropped(entry)
