"""What goes when the spool's room is short, in which order, and how it is counted. All within the caller's transaction.

Once the file is too big, in this order: the oldest acknowledged contents (their digests stay, so that a collector restored from
a backup can still be given a whole chain), the digests of those beyond a bound, then contents not yet acknowledged, lowest
severity and oldest first. Findings and `agent.gap` never go. What went unacknowledged becomes a row in `lost`, in the
transaction that let it go; it leaves that table only with the `agent.gap` event that tells of it, so a crash in between can't
make a loss silent. Must not know: how events are sealed, threads, errors.
"""

import sqlite3
from typing import Any

from agent import packs
from agent.spoolfile import FOLDED, HELD, PAGE, REFUSED

LINK_BYTES = 128
"""What a link row takes on disk, about: only used to turn a share of the room into a number of rows."""
EVENT_BYTES = 256
"""What an event takes at least, about: in a pack."""


def used(db: sqlite3.Connection) -> int:
    """Bytes of the file's pages in use; free pages are used again before the file grows."""
    (pages,), (free,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count"))
    return int(pages - free) * PAGE


def make(db: sqlite3.Connection, max_bytes: int, acked: int, last: int) -> bool:
    """Cut and fold until the file fits `max_bytes`; what is up to seq `acked` may be cut uncounted. False if it can't be."""
    room = max_bytes - max_bytes // 8  # the rest is for the -wal and for the next append
    if used(db) <= room:
        return True
    goal = room - max_bytes // 20  # a twentieth at a time, so that not every append has to
    spare = max_bytes // 16 // LINK_BYTES
    while (over := used(db) - goal) > 0:
        few = max(16, over // 1024)  # by their size outside packs; of a pack, all go together
        if not (_cut_links(db, acked, last, few, spare) or cut_contents(db, acked, few) or _cut_links(db, acked, last, few, 0)):
            break
    if used(db) > goal:
        db.execute("CREATE TEMP TABLE IF NOT EXISTS going (seq INTEGER PRIMARY KEY)")
        db.execute("DELETE FROM going")
        while (over := used(db) - goal) > 0:
            (held,) = db.execute("SELECT count(*) FROM link WHERE gone = 0 AND keep = 0").fetchone()
            if not _fold(db, max(16, min(over // EVENT_BYTES, held // 8))):  # an eighth at a time: events may be large
                break
        count(db, "spool_full", "seq IN (SELECT seq FROM going) AND gone = ?", (HELD,), FOLDED)
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    if pages * PAGE > max_bytes:
        db.execute("PRAGMA incremental_vacuum").fetchall()  # the file itself shrinks, too
    return used(db) <= room


def cut_contents(db: sqlite3.Connection, acked: int, few: int) -> bool:
    """The oldest acknowledged contents go; their digests stay."""
    seqs = packs.drop_oldest(db, acked, few)
    db.executemany("UPDATE link SET gone = 1 WHERE seq = ? AND gone = 0", zip(seqs))
    return bool(seqs)


def _cut_links(db: sqlite3.Connection, acked: int, last: int, few: int, spare: int) -> bool:
    """The oldest acknowledged digests without content go, but for `spare` of them; the chain then starts behind them."""
    ((base,),) = db.execute("SELECT value FROM meta WHERE key = 'base_seq'")
    (held,) = db.execute("SELECT min(seq) FROM content").fetchone()
    end = min(min(acked, held - 1 if held else last) - spare, base + few)
    if end <= base:
        return False
    db.execute(
        "UPDATE meta SET value = (SELECT hash FROM link WHERE seq = ?) WHERE key = 'base_hash'",
        (end,),
    )
    db.execute("UPDATE meta SET value = ? WHERE key = 'base_seq'", (end,))
    db.execute("DELETE FROM link WHERE seq <= ?", (end,))
    return True


def _fold(db: sqlite3.Connection, few: int) -> bool:
    """The lowest severities, oldest first, lose their content; they are noted in `going`."""
    query = """SELECT seq FROM link WHERE keep = 0 AND gone IN (?, ?) AND seq NOT IN (SELECT seq FROM going)
               ORDER BY severity, seq LIMIT ?"""
    seqs = db.execute(query, (HELD, REFUSED, few)).fetchall()
    db.executemany("INSERT INTO going VALUES (?)", seqs)
    packs.drop(db, (seq for (seq,) in seqs))
    return bool(seqs)


def count(db: sqlite3.Connection, reason: str, where: str, values: tuple[Any, ...], gone: int) -> int:
    """Make one loss of the links `where`, mark them `gone`, and return how many they are."""
    query = f"SELECT min(time), max(time), count(*), min(seq), max(seq) FROM link WHERE {where}"  # noqa: S608 - ours
    row = db.execute(query, values).fetchone()
    if row[2]:
        db.execute("INSERT INTO lost (reason, since, until, count, first, last) VALUES (?, ?, ?, ?, ?, ?)", (reason, *row))
        db.execute(f"UPDATE link SET gone = ? WHERE {where}", (gone, *values))  # noqa: S608
    return int(row[2])
