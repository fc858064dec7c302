"""What happened to protected files, told as one summary per person, program, directory and window: noise kept low.

Question: who read, changed or deleted what, without an event for each? Owns: the counts of the running window, and which
files are named: each (200 at most, then counted only) for a login user, none for services. Must not know events' shape.
From `pipeline` (what is done inside protected directories) to `ocsf` (`file.history`).
"""

from typing import NamedTuple

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
    """Counts of one `Whose` from `since_ms` to `until_ms`; `names` are paths below the directory, `entry` its last process."""

    __slots__ = ("counts", "entry", "names", "since_ms", "unnamed", "until_ms", "whose")

    def __init__(self, whose: Whose, entry: Entry | None, at_ms: int) -> None:
        self.whose, self.entry = whose, entry
        self.since_ms = self.until_ms = at_ms
        self.counts = {READ: 0, WRITE: 0, DELETE: 0, RENAME: 0}
        self.names: dict[str, None] = {}
        self.unnamed = 0


class History:
    """`add` counts; `due` hands out what is complete."""

    def __init__(self) -> None:
        self._running: dict[Whose, Summary] = {}

    def add(self, entry: Entry | None, root: str, rel: str, what: str, at_ms: int) -> Summary | None:
        """One operation on the protected file `rel` below `root`. Returns a summary only if room had to be made for this."""
        login_uid = entry.login_uid if entry is not None else None
        whose = Whose(login_uid, entry.process.exe if entry is not None else "", root)
        known = self._running.get(whose)
        pushed_out = None
        if known is None:
            if len(self._running) >= _MOST_KEYS:
                pushed_out = self._running.pop(next(iter(self._running)))
            known = self._running[whose] = Summary(whose, entry, at_ms)
        known.counts[what] += 1
        known.until_ms = max(known.until_ms, at_ms)
        known.entry = entry
        if login_uid is not None and rel not in known.names:
            if len(known.names) < _MOST_NAMES:
                known.names[rel] = None
            else:
                known.unnamed += 1
        return pushed_out

    def due(self, now_ms: int) -> list[Summary]:
        """Summaries whose window is over (or began in a future that the clock took back)."""
        ripe = [
            each for each in self._running.values() if now_ms - each.since_ms >= WINDOW_MS or now_ms < each.since_ms - WINDOW_MS
        ]
        for each in ripe:
            del self._running[each.whose]
        return ripe

    def everything(self) -> list[Summary]:
        """All that is running: the agent stops."""
        all_of_it = list(self._running.values())
        self._running.clear()
        return all_of_it
