"""pid → who: process, parents, and the login user behind it; and how sure that is.

Question: by whose hand? Owns: the process table (a value fed with ProcSeen and ProcGone, bounded, forgetting the dead after a
while), kinship between processes (ancestors, descendants, shared pipes), the person at the active session, and the masking
of secrets in argv. Must not know files, media or /proc. The login uid is the kernel's (`/proc/PID/loginuid`), which su and
sudo keep.
A pid alone names nobody: an entry lives from one `start` to the next, and file facts may come after the process ended.
"""

from collections.abc import Iterator
from itertools import islice

from msgspec import structs

from agent.contract.codes import Attribution
from agent.core.facts import OpenFile, Process, ProcGone, ProcSeen, Session
from agent.core.masks import masked
from agent.core.media import clean

NO_LOGIN = 0xFFFF_FFFF
"""(uid_t) -1: the kernel's word for "no login uid" (proc(5))."""
_MOST = 8_192
_KEPT_DEAD_MS = 60_000
_MAX_PIPES, _MAX_KIN, _MAX_ANCESTORS, _CROWD = 64, 32, 12, 12
_NEAR_GENERATIONS = 3
_MOST_SEARCHED = 4_096
_OLD_PIPE_MS = 1_000
_OVERLAP_MS = 2_000


class Entry:
    """One process in one life. `encoded` is room for whoever writes it as JSON, emptied when the process changed."""

    __slots__ = ("encoded", "files", "first_ms", "gone_ms", "pipes", "process", "seen_ms")

    def __init__(self, process: Process, at_ms: int) -> None:
        self.process = process
        self.first_ms = self.seen_ms = at_ms
        self.gone_ms: int | None = None
        self.pipes: dict[int, int] = dict.fromkeys(process.pipes[:_MAX_PIPES], at_ms)
        self.files: list[OpenFile] = process.files
        self.encoded: object = None

    @property
    def login_uid(self) -> int | None:
        """The login uid, None if the kernel has none for this process."""
        uid = self.process.loginuid
        return None if uid is None or uid == NO_LOGIN or uid < 0 else uid

    @property
    def attribution(self) -> Attribution:
        """How the process was known."""
        return "exact" if self.process.known == "exact" else "cached"


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
    )


def clean_exe(exe: str) -> str:
    """The path of a program, without what the kernel appends once the file was replaced."""
    return clean(exe.removesuffix(" (deleted)"))


class People:
    """The process table. `who(pid)` answers for the living and, for a minute, for the dead."""

    def __init__(self) -> None:
        self._table: dict[int, Entry] = {}
        self._holders: dict[int, set[int]] = {}
        self._born: dict[int, dict[int, None]] = {}
        """Descendants of a pid, in the order in which they were first told"""
        self.session = Session(at_ms=0)

    def seen(self, fact: ProcSeen) -> bool:
        """Take in what is known of a process now. True if the pid began a new life, so that all that was tied to it ends."""
        process, at_ms = _cleaned(fact.process), fact.at_ms
        known = self._table.pop(process.pid, None)
        reborn = known is not None and known.process.start != process.start and 0 not in (known.process.start, process.start)
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
        for pipe in entry.pipes:
            self._holders.setdefault(pipe, set()).add(process.pid)
        while len(self._table) > _MOST:
            self._drop(self._table.pop(next(iter(self._table))))
        return reborn

    def sit_down(self, fact: Session) -> None:
        """Who sits at the active local session from now on."""
        self.session = structs.replace(fact, user=clean(fact.user), session=clean(fact.session))

    def gone(self, fact: ProcGone) -> None:
        """A process ended; what its last facts tell may still be on the way."""
        entry = self._table.get(fact.pid)
        if entry is not None and (fact.start in (0, entry.process.start) or entry.process.start == 0):
            entry.gone_ms = fact.at_ms

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
                if known is not None and start and known.process.start not in (0, start):
                    return
                seen.add(parent)
                yield parent
                entry = known

    def kin(self, pid: int) -> list[int]:
        """Other processes that can have handed their data to `pid`: who shares a pipe, and its ancestors (rsync's sender, a
        shell that opened the file)."""
        return list(dict.fromkeys((*self.piped(pid), *self.ancestors(pid))))

    def piped(self, pid: int) -> list[int]:
        """Who shares a pipe with `pid`, over any number of stages. One that everybody in a session inherited links nobody."""
        linked: dict[int, None] = {}
        todo = [pid]
        while todo and len(linked) < _MAX_KIN:
            here = todo.pop()
            for pipe, since_ms in (self._table[here].pipes if here in self._table else {}).items():
                holders = self._holders.get(pipe, set())
                if (
                    len(holders) < 2
                    or len(holders) > _CROWD
                    or self._inherited(pipe, here, since_ms)
                    or self._outlived(holders)
                ):
                    continue
                for other in holders - {pid} - linked.keys():
                    if self._overlap(here, other):
                        linked[other] = None
                        todo.append(other)
        return list(linked)

    def descendants(self, pid: int, since_ms: int, most: int = _MOST_SEARCHED) -> Iterator[Entry]:
        """Processes below `pid` that were first told at `since_ms` or later, the last ones first."""
        start = self._table[pid].process.start if pid in self._table else 0
        for other in islice(reversed(self._born.get(pid, ())), most):
            entry = self._table[other]
            if entry.first_ms < since_ms:
                return
            if all(parent.pid != pid or not start or parent.start in (0, start) for parent in entry.process.parents):
                yield entry

    def beside(self, pid: int, since_ms: int) -> Iterator[Entry]:
        """Who may have fed a pipe of `pid` whose other end nobody told: processes of the same parent (or of a subshell of it)
        that lived meanwhile, with such a pipe too (a stage between them opens no file), or that no look caught in time."""
        entry = self._table.get(pid)
        if entry is None or not self._open_ended(entry):
            return
        parent = next(self.ancestors(pid), 0)
        for other in self.descendants(parent, since_ms) if parent else ():
            near = [each.pid for each in other.process.parents[:_NEAR_GENERATIONS]] or [other.process.ppid]
            alive = other.gone_ms is None or other.gone_ms >= entry.first_ms
            below = other is not entry and parent in near and pid not in near
            if alive and below and (not other.pipes or self._open_ended(other)):
                yield other

    def _open_ended(self, entry: Entry) -> bool:
        """Whether it holds a pipe of its own that nobody else was seen to hold."""
        pid = entry.process.pid
        return any(
            len(self._holders.get(pipe, ())) < 2 and not self._inherited(pipe, pid, since_ms)
            for pipe, since_ms in entry.pipes.items()
        )

    def _inherited(self, pipe: int, pid: int, since_ms: int) -> bool:
        """Whether an ancestor was seen to hold this pipe well before `pid` was seen at all: then it is not a pipeline's own."""
        for parent in self.ancestors(pid):
            entry = self._table.get(parent)
            held_ms = entry.pipes.get(pipe) if entry else None
            if held_ms is not None and since_ms - held_ms >= _OLD_PIPE_MS:
                return True
        return False

    def _outlived(self, holders: set[int]) -> bool:
        """Whether a pipe was given to a process after another of the same parent that held it had ended: it is the parent's."""
        if len(holders) < 3:
            return False
        ended: dict[int, int] = {}
        entries = [self._table[holder] for holder in holders if holder in self._table]
        for each in entries:
            if each.gone_ms is not None and each.process.ppid:
                ended[each.process.ppid] = min(each.gone_ms, ended.get(each.process.ppid, each.gone_ms))
        return any(each.first_ms > ended.get(each.process.ppid, each.first_ms) for each in entries)

    def _overlap(self, one: int, other: int) -> bool:
        first, second = self._table.get(one), self._table.get(other)
        if first is None or second is None:
            return False
        return not (
            (first.gone_ms is not None and second.first_ms - first.gone_ms > _OVERLAP_MS)
            or (second.gone_ms is not None and first.first_ms - second.gone_ms > _OVERLAP_MS)
        )

    @staticmethod
    def _merge(entry: Entry, process: Process, at_ms: int) -> None:
        """A later look at the same life; a look at a dead one brings less and must not take away what was known."""
        before = entry.process
        entry.seen_ms = at_ms
        if entry.gone_ms is not None and process.known == "exact":
            entry.gone_ms = None
        for pipe in process.pipes[:_MAX_PIPES]:
            if len(entry.pipes) < _MAX_PIPES:
                entry.pipes.setdefault(pipe, at_ms)
        entry.files = process.files or entry.files
        if process.exe:
            kept = structs.replace(process, known="exact" if before.known == "exact" else process.known)
        else:
            kept = structs.replace(before, uid=before.uid if process.uid is None else process.uid)
        for name in ("start", "ppid", "loginuid", "login_user", "user", "session", "tty", "remote", "argv", "parents"):
            if getattr(kept, name) in (0, None, "", []) and getattr(process, name) not in (0, None, "", []):
                setattr(kept, name, getattr(process, name))
            elif getattr(kept, name) in (0, None, "", []):
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
        for pipe in entry.pipes:
            holders = self._holders.get(pipe)
            if holders is not None:
                holders.discard(entry.process.pid)
                if not holders:
                    del self._holders[pipe]
