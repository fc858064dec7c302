"""The months that PostgreSQL keeps apart: partitions of `events`, made ahead, and exchanged for what retention leaves of them.

Owns: names and bounds of partitions (a month of UTC each, by `received_at` in ms), and erasing a month that is over in two
steps: `fold` writes what stays of it beside it, which may take long and holds up nobody; `swap` puts that in its place and
drops the month's file, within the writer's transaction. Bytes that stand for an erased event are those of `wire.folded_line`.
Must not know: who erases, or when.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg.sql import SQL, Identifier, Literal

FOLD_LOCK = 0x53454B4903
"""Advisory: whoever folds months."""
PREFIX, FOLDED = "events_", "folded_"
_KEPT = "code IS NULL OR pos IN (SELECT pos FROM latest)"
"""What stays as it is: events that are digests already, and each agent's newest status."""
_FOLD = (
    "INSERT INTO {new} (pos, chain, seq, time, received_at, severity, hash, raw)"  # noqa: S608 - constants
    " SELECT pos, chain, seq, 0, received_at, 0, hash,"
    " convert_to('{{\"seq\":' || seq || ',\"digest\":\"' || encode(sha256(raw), 'hex') || '\"}}', 'UTF8')"
    " FROM {old} WHERE NOT (" + _KEPT + ")"
)


class Month(NamedTuple):
    """A month of UTC."""

    year: int
    month: int

    @property
    def name(self) -> str:
        """Of its partition, without the prefix."""
        return f"{self.year:04}_{self.month:02}"

    def next(self) -> "Month":
        """The one after it."""
        return Month(self.year + self.month // 12, self.month % 12 + 1)

    def start_ms(self) -> int:
        """Its first millisecond."""
        return int(datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()) * 1000


def month_of(at_ms: int) -> Month:
    """The month of a time."""
    at = datetime.fromtimestamp(at_ms // 1000, UTC)
    return Month(at.year, at.month)


def _make(db: Connection[Any], name: str) -> None:
    db.execute(SQL("CREATE TABLE {} (LIKE events)").format(Identifier(name)))


def _attach(db: Connection[Any], month: Month, name: str) -> None:
    """ATTACH, not PARTITION OF: that would wait for everybody who reads."""
    text = "ALTER TABLE events ATTACH PARTITION {} FOR VALUES FROM ({}) TO ({})"
    bounds = Literal(month.start_ms()), Literal(month.next().start_ms())
    db.execute(SQL(text).format(Identifier(name), *bounds))


def ensure(db: Connection[Any], month: Month) -> None:
    """Have a partition for this month and for the next one."""
    for each in (month, month.next()):
        name = PREFIX + each.name
        if db.execute("SELECT to_regclass(%s)", (name,)).fetchall()[0][0] is None:
            _make(db, name)
            _attach(db, each, name)


def _over(db: Connection[Any], prefix: str, before_ms: int) -> list[Month]:
    """Months that have a table of this prefix and ended before, oldest first."""
    sql = (
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ %s"
        " AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'events'::regclass) ORDER BY relname"
    )
    names = [row[0].removeprefix(prefix) for row in db.execute(sql, (f"^{prefix}[0-9]{{4}}_[0-9]{{2}}$",)).fetchall()]
    months = [Month(*map(int, name.split("_"))) for name in names]
    return [month for month in months if month.next().start_ms() <= before_ms]


def fold(db: Connection[Any], before_ms: int) -> None:
    """Write beside each month that is over before `before_ms`, and holds content, what shall stay of it."""
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (FOLD_LOCK,))
        for month in _over(db, PREFIX, before_ms):
            old, new = Identifier(PREFIX + month.name), Identifier(FOLDED + month.name)
            content = SQL("SELECT 1 FROM {} WHERE NOT ({}) LIMIT 1").format(old, SQL(_KEPT))
            if not db.execute(content).fetchall():
                continue
            db.execute(SQL("DROP TABLE IF EXISTS {}").format(new))
            _make(db, FOLDED + month.name)
            db.execute(SQL("INSERT INTO {} SELECT * FROM {} WHERE {}").format(new, old, SQL(_KEPT)))
            db.execute(SQL(_FOLD).format(new=new, old=old))


def swap(db: Connection[Any], before_ms: int) -> tuple[int, int, int]:
    """Put what `fold` wrote in the place of those months; how many events were erased, and their first and last position."""
    count, first, last = 0, 0, 0
    for month in _over(db, FOLDED, before_ms):
        name = PREFIX + month.name
        old, new = Identifier(name), Identifier(FOLDED + month.name)
        gone = SQL("FROM {} AS o JOIN {} AS n USING (pos) WHERE o.code IS NOT NULL AND n.code IS NULL").format(old, new)
        # A page of the log that was written since is not in the folded one (a clock that was set back): that month waits.
        missing = SQL("SELECT 1 FROM {} WHERE pos NOT IN (SELECT pos FROM {}) LIMIT 1").format(old, new)
        if db.execute(missing).fetchall():
            db.execute(SQL("DROP TABLE {}").format(new))
            continue
        found = db.execute(SQL("SELECT count(*), min(pos), max(pos) ") + gone).fetchall()[0]
        db.execute(SQL("INSERT INTO erased SELECT pos, sha256('\\x00'::bytea || o.raw) ") + gone)
        db.execute(SQL("ALTER TABLE events DETACH PARTITION {}").format(old))
        db.execute(SQL("DROP TABLE {}").format(old))
        db.execute(SQL("ALTER TABLE {} RENAME TO {}").format(new, old))
        _attach(db, month, name)
        if found[0]:
            count, first, last = count + found[0], first or found[1], found[2]
    return count, first, last
