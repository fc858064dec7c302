"""Erasing content that is older than a site may keep it, so that all proofs stay: digests and leaves remain, words go.

Owns: which events go (by when they were received: a wrong clock must neither keep nor erase them), what stays in
their place, and the record that counts them. Erased pages are overwritten (SQLite's secure_delete); names that nothing
uses any more go, too. A store that keeps months apart (PostgreSQL) drops those that are over as a whole.
Must not know: who asked, HTTP.
"""

from typing import NamedTuple

from agent.contract import chain, wire
from server_stub import acts, tree
from server_stub.commit import Writer

PORTION = 2_000
"""Events erased in one commit: agents wait no longer than that."""


class Erased(NamedTuple):
    """One portion: how many events, between which positions of the log."""

    events: int
    first: int
    last: int


def portion(writer: Writer, before_ms: int, after: int) -> Erased:
    """Inside the writer: erase the next events beyond position `after` that were received before `before_ms`."""
    session = writer.session
    session.overwriting()
    rows = session.execute(
        "SELECT pos, seq, raw FROM events WHERE pos > ? AND received_at < ? AND code IS NOT NULL"
        " AND pos NOT IN (SELECT pos FROM latest) ORDER BY pos LIMIT ?",
        (after, before_ms, PORTION),
    )
    for pos, seq, raw in rows:
        session.execute("INSERT INTO erased VALUES (?, ?)", (pos, tree.leaf_hash(raw)))
        line = wire.folded_line(seq, chain.digest(raw))
        session.execute(
            "UPDATE events SET raw = ?, uid = NULL, time = 0, severity = 0, code = NULL, machine = NULL, host = NULL,"
            ' "user" = NULL, medium = NULL, label = NULL, way = NULL, program = NULL, bytes = NULL WHERE pos = ?',
            (line, pos),
        )
    return Erased(len(rows), rows[0][0] if rows else 0, rows[-1][0] if rows else 0)


def months(writer: Writer, before_ms: int) -> Erased:
    """Inside the writer: erase at once the months that are over, where the store keeps months apart."""
    return Erased(*writer.session.erase_months(before_ms))


def finish(writer: Writer, before_ms: int, found: Erased, by: acts.By) -> None:
    """Inside the writer: drop names that nothing uses, and put the whole run on record."""
    writer.session.drop_names(before_ms)
    acts.erased(writer, by, before_ms, found.events, found.first, found.last)
