"""What happened to protected files, told as one summary per person, program, directory and window: noise kept low.

Question: who read, changed or deleted what, without an event for each? Owns: the counts of the running window, and which
files are named: each (200 at most, then counted only) for a login user, none for services. Must not know events' shape.
From `pipeline` (what is done inside protected directories) to `ocsf` (`file.history`).
"""

from typing import NamedTuple

from agent.core.facts import Process
from agent.core.people import Entry

WINDOW_MS = 600_000
_MOST_NAMES = 200
_MOST_KEYS = 1_000
READ, WRITE, DELETE, RENAME = "reads", "writes", "deletes", "renames"


class Whose(NamedTuple):
    """Whom a summary is about: login uid (None: a service), program, and protected directory."""

    login_uid: int | None
    exe: str
    root: str


class Summary:
    """Counts of one `Whose` from `since_ms` to `until_ms`; `names` are whole paths, `entry` its last process."""

    __slots__ = ("counts", "entry", "names", "since_ms", "unnamed", "until_ms", "whose")

    def __init__(self, whose: Whose, entry: Entry | None, at_ms: int) -> None:
        self.whose, self.entry = whose, entry
        self.since_ms = self.until_ms = at_ms
        self.counts = {READ: 0, WRITE: 0, DELETE: 0, RENAME: 0}
        self.names: dict[str, None] = {}
        self.unnamed = 0

    def name(self, path: str) -> None:
        """Name a file, while there is room for names."""
        if len(self.names) < _MOST_NAMES:
            self.names[path] = None
        elif path not in self.names:
            self.unnamed += 1


class History:
    """`add` counts; `due` hands out what is complete."""

    def __init__(self) -> None:
        self._running: dict[Whose, Summary] = {}
        self._latest: tuple[Process | None, str, Summary | None] = (None, "", None)

    def add(self, entry: Entry | None, root: str, path: str, what: str, at_ms: int) -> Summary | None:
        """One operation on the protected file `path` below `root`. Returns a summary only if room had to be made for this."""
        process, at, latest = self._latest
        if entry is not None and entry.process is process and at == root and latest is not None:
            latest.counts[what] += 1
            latest.until_ms = max(latest.until_ms, at_ms)
            latest.entry = entry
            if latest.whose.login_uid is not None:
                latest.name(path)
            return None
        login_uid = entry.login_uid if entry is not None else None
        whose = Whose(login_uid, entry.process.exe if entry is not None else "", root)
        known = self._running.get(whose)
        pushed_out = None
        if known is None:
            if len(self._running) >= _MOST_KEYS:
                self._latest = (None, "", None)
                pushed_out = self._running.pop(next(iter(self._running)))
            known = self._running[whose] = Summary(whose, entry, at_ms)
        known.counts[what] += 1
        known.until_ms = max(known.until_ms, at_ms)
        known.entry = entry
        if login_uid is not None:
            known.name(path)
        self._latest = (entry.process if entry is not None else None, root, known)
        return pushed_out

    def due(self, now_ms: int) -> list[Summary]:
        """Summaries whose window is over (or began in a future that the clock took back)."""
        ripe = [
            each for each in self._running.values() if now_ms - each.since_ms >= WINDOW_MS or now_ms < each.since_ms - WINDOW_MS
        ]
        self._latest = (None, "", None)
        for each in ripe:
            del self._running[each.whose]
        return ripe

    def everything(self) -> list[Summary]:
        """All that is running: the agent stops."""
        self._latest = (None, "", None)
        all_of_it = list(self._running.values())
        self._running.clear()
        return all_of_it
