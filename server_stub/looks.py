"""Who looked at personal data: each look is on record before it is answered, and one person's repeats are counted.

Owns: the window (one `record.viewed` a person, filter and ten minutes), the counts of the windows that are open, and their
survival of restarts. The first look is told at once; if others followed in its window, a second event at its end counts them.
Must not know: HTTP, roles, what was asked for beyond its filter.
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from server_stub import acts
from server_stub.commit import Writer
from server_stub.store import Store

WINDOW_MS = 600_000


class Look(Struct):
    """One open window: since when (ms), how many looks this collector saw in it, and of how many of those the store knows."""

    since: int
    by: acts.By
    operation: str
    filter: dict[str, str]
    count: int = 1
    kept: int = 1


Due = tuple[tuple[str, str], Look, int]
"""A window's name, the window, and how many looks it had when this was asked: more may come meanwhile."""


class Looks:
    """The open windows. For one event loop; `begin` and `keep` run inside the writer."""

    def __init__(self, store: Store) -> None:
        self.open: dict[tuple[str, str], Look] = {}
        for person, what, since, by in store.rows("SELECT person, what, since, by FROM looks"):
            operation, given = msgspec.json.decode(what, type=tuple[str, dict[str, str]])
            who = msgspec.json.decode(by, type=acts.By)
            self.open[person, what] = Look(since, who, operation, given)

    def again(self, by: acts.By, operation: str, given: Mapping[str, str], now_ms: int) -> bool:
        """Whether this look falls into an open window; it is then counted."""
        look = self.open.get(self._name(by, operation, given))
        if look is None or not 0 <= now_ms - look.since < WINDOW_MS:
            return False
        look.count += 1
        return True

    def _name(self, by: acts.By, operation: str, given: Mapping[str, str]) -> tuple[str, str]:
        return by.name, msgspec.json.encode((operation, dict(sorted(given.items())))).decode()

    def begin(self, writer: Writer, by: acts.By, operation: str, given: Mapping[str, str]) -> Look:
        """Inside the writer: tell a look, and open its window there. `opened` follows once that is durable."""
        look = Look(writer.now(), by, operation, dict(given))
        person, what = self._name(by, operation, given)
        held = writer.session.execute("SELECT since FROM looks WHERE person = ? AND what = ?", (person, what))
        if held and 0 <= look.since - held[0][0] < WINDOW_MS:
            # Another collector over this store opened the window: this look is one of its repeats.
            writer.session.execute("UPDATE looks SET count = count + 1 WHERE person = ? AND what = ?", (person, what))
            look.since = held[0][0]
            return look
        acts.viewed(writer, by, operation, look.filter, count=1, since=look.since)
        writer.session.execute("DELETE FROM looks WHERE person = ? AND what = ?", (person, what))
        values = (person, what, look.since, 1, msgspec.json.encode(by).decode())
        writer.session.execute("INSERT INTO looks VALUES (?, ?, ?, ?, ?)", values)
        return look

    def opened(self, look: Look) -> None:
        """Its window is open."""
        self.open[self._name(look.by, look.operation, look.filter)] = look

    def due(self, now_ms: int) -> list[Due]:
        """The windows that are over, or hold looks that the store does not know of."""
        return [
            (name, look, look.count)
            for name, look in self.open.items()
            if look.count > look.kept or not 0 <= now_ms - look.since < WINDOW_MS
        ]

    def keep(self, writer: Writer, due: list[Due], now_ms: int) -> list[tuple[str, str]]:
        """Inside the writer: keep the counts, and close what is over; the names of those.

        The store adds up what several collectors saw in one window; whoever closes it tells the sum, who comes later its rest.
        """
        closed = []
        for (person, what), look, count in due:
            which, more = (person, what, look.since), count - look.kept
            if 0 <= now_ms - look.since < WINDOW_MS:
                add = "UPDATE looks SET count = count + ? WHERE person = ? AND what = ? AND since = ?"
                writer.session.execute(add, (more, *which))
                continue
            gone = "DELETE FROM looks WHERE person = ? AND what = ? AND since = ? RETURNING count"
            held = writer.session.execute(gone, which)
            if repeats := (held[0][0] - 1 if held else 0) + more:
                acts.viewed(writer, look.by, look.operation, look.filter, count=repeats, since=look.since)
            closed.append((person, what))
        return closed
