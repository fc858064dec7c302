"""Moving a site's store from SQLite to PostgreSQL: the same log, to the byte, under the same keys and name.

Owns: what is copied, in which order, and how a run that was cut short goes on. The log itself (events, heads, the tree over
them) goes over while the collector still works, a portion a transaction; then the collector must be stopped, the rest of the
log and all that changes follow, and the old store says that it was moved: no collector ever writes two logs under one key.
Agents keep what has no receipt, and send it once the collector is back. Until the end the new store takes no collector.
The tree's root is computed anew from the bytes as they go over, and must come out as that of the old store.
Must not know: HTTP, chains.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from psycopg import Connection, Cursor

from server_stub import tree
from server_stub.store import StoreError, pgmonths
from server_stub.store.pglink import given, shown, told
from server_stub.store.postgres import MOVING, PostgresStore
from server_stub.store.sqlite import MOVED, SqliteStore

PORTION = 5_000
_TYPES = ("int8", "int4", "int8", "bytea", "int8", "int8", "int2", *("int4",) * 8, "int8", "bytea", "bytea")
_EVENTS = (
    'pos, chain, seq, uid, "time", received_at, severity, code, machine, host, "user", medium, label, way, program, bytes,'
    " hash, raw"
)
_HEADS = "pos, chain, first, taken, last, sent_at, sig"
WHOLE = {
    "names": "id, text",
    "chains": "id, agent, epoch, last, hash, tree_size",
    "erased": "pos, leaf",
    "signers": "n, key, size, rotation",
    "witnessed": "origin, size, root, at",
    "cosigned": "size, line, note",
    "looks": "person, what, since, count, by",
    "serials": "medium, serial",
    "agents": "agent, key, name, enrolled_at, enrolled_by, last_seen, silent",
    "latest": "agent, code, pos",
    "tokens": "id, hash, role, note, created_at, until, uses, used",
    "approvals": "key, entry",
    "meta": "name, value",
}
"""Tables that are copied as a whole, once nothing changes any more: their columns."""


class Progress(NamedTuple):
    """How far the log is over: events copied, of how many."""

    done: int
    size: int


def _new(url: str, origin: str) -> PostgresStore:
    """The store to fill: an empty one, or one that an earlier run began to fill from the same log. Raises StoreError."""
    store = PostgresStore(url, alone=True, moving=True)
    rows = store.rows("SELECT value FROM meta WHERE name = ?", (MOVING,))
    if rows and rows[0][0] == origin:
        return store
    try:
        if rows or store.rows("SELECT 1 FROM signers UNION ALL SELECT 1 FROM events LIMIT 1"):
            raise StoreError(f"{shown(url)}: holds another log already; name an empty database")
        store.rows("INSERT INTO meta VALUES (?, ?)", (MOVING, origin))
    except BaseException:
        store.close()
        raise
    return store


class Move:
    """From `source` to `url`. Use: `copy` while the collector works, `finish` once it is stopped. Raises StoreError."""

    def __init__(self, source: Path, url: str) -> None:
        self.url = url
        self.old = SqliteStore(source, moved=True)
        keys = self.old.rows("SELECT key FROM signers ORDER BY n LIMIT 1")
        if not keys:
            raise StoreError(f"{source}: holds no log yet; set the new database and start the collector")
        self.new = _new(url, bytes(keys[0][0]).hex())

    def close(self) -> None:
        """Give back both stores."""
        self.old.close()
        self.new.close()

    @contextmanager
    def _transaction(self) -> Iterator[Connection[Any]]:
        with told(self.url), self.new.connection() as db, db.transaction():
            yield db

    def copy(self) -> Iterator[Progress]:
        """Copy what the log has more than the new store, portion by portion, each durable when it is told."""
        while True:
            size = int(self.old.rows("SELECT coalesce(max(pos), 0) FROM events")[0][0])
            with self._transaction() as db:
                done, roots = db.execute("SELECT size, roots FROM tip").fetchall()[0]
                if done == size:
                    return
                edge = tree.Frontier(done, [roots[at : at + 32] for at in range(0, len(roots), 32)])
                self._portion(db, edge, min(size, done + PORTION))
                db.execute("UPDATE tip SET size = %s, roots = %s", (edge.size, b"".join(edge.roots)))
            yield Progress(edge.size, size)

    def _portion(self, db: Connection[Any], edge: tree.Frontier, upto: int) -> None:
        sql = f"SELECT {_EVENTS}, leaf FROM events LEFT JOIN erased USING (pos) WHERE pos > ? AND pos <= ? ORDER BY pos"  # noqa: S608
        rows = self.old.rows(sql, (edge.size, upto))
        if [row[0] for row in rows] != list(range(edge.size + 1, upto + 1)):
            raise StoreError(f"{self.old.path}: events after {edge.size} are missing; restore the store from a backup first")
        for month in {pgmonths.month_of(row[5]) for row in rows}:
            pgmonths.ensure(db, month)
        first, nodes = edge.size, list[tuple[int, int, bytes]]()
        with db.cursor() as cursor, cursor.copy(f"COPY events ({_EVENTS}) FROM STDIN (FORMAT BINARY)") as out:
            out.set_types(_TYPES)
            for *row, leaf in rows:
                nodes += edge.add(leaf or tree.leaf_hash(row[-1]))
                out.write_row([cell.encode() if isinstance(cell, str) else cell for cell in row])
        with db.cursor() as cursor:
            _fill(cursor, "nodes (level, n, hash)", nodes)
            heads = f"SELECT {_HEADS} FROM heads WHERE pos > ? AND pos <= ?"  # noqa: S608 - constants
            _fill(cursor, f"heads ({_HEADS})", self.old.rows(heads, (first, upto)))

    def finish(self, now_ms: int) -> int:
        """With nobody writing the old store: the rest of the log, and everything else. The log's size."""
        for _ in self.copy():
            pass
        size = int(self.old.rows("SELECT coalesce(max(pos), 0) FROM events")[0][0])
        root = tree.root_at(size, self.old.subtree)
        with self._transaction() as db:
            copied, roots = db.execute("SELECT size, roots FROM tip").fetchall()[0]
            edge = tree.Frontier(copied, [roots[at : at + 32] for at in range(0, len(roots), 32)])
            if (copied, edge.root()) != (size, root):
                raise StoreError(f"{self.old.path}: its events do not give the tree it kept: it was altered, or is damaged")
            self._erased_since(db)
            for table, columns in WHOLE.items():
                self._whole(db, table, columns)
            db.execute("UPDATE names SET seen = %s", (pgmonths.month_of(now_ms).start_ms(),))
            for table in ("names", "chains"):
                last = f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), greatest(max(id), 1)) FROM {table}"  # noqa: S608
                db.execute(last.encode())
            db.execute("DELETE FROM meta WHERE name = %s", (MOVING,))
            # Before this transaction ends: a collector that is started on the old store now refuses it, come what may.
            self._mark_moved()
        return size

    def _whole(self, db: Connection[Any], table: str, columns: str) -> None:
        keep = " WHERE name <> %s" if table == "meta" else ""
        db.execute(f"DELETE FROM {table}{keep}".encode(), (MOVING,) if keep else ())  # noqa: S608 - constants
        rows = self.old.rows(f"SELECT {columns} FROM {table}")  # noqa: S608 - constants
        with db.cursor() as cursor:
            _fill(cursor, f"{table} ({columns})", [given(row) for row in rows if row[0] != MOVED])

    def _erased_since(self, db: Connection[Any]) -> None:
        """Content that retention erased in the old store after it had been copied."""
        kept = {pos for (pos,) in db.execute("SELECT pos FROM events WHERE code IS NULL").fetchall()}
        gone = [row for row in self.old.rows("SELECT pos, raw FROM events JOIN erased USING (pos)") if row[0] not in kept]
        sql = (
            'UPDATE events SET raw = %s, uid = NULL, "time" = 0, severity = 0, code = NULL, machine = NULL, host = NULL,'
            ' "user" = NULL, medium = NULL, label = NULL, way = NULL, program = NULL, bytes = NULL WHERE pos = %s'
        )
        with db.cursor() as cursor:
            cursor.executemany(sql, [(raw, pos) for pos, raw in gone])

    def _mark_moved(self) -> None:
        try:
            with closing(sqlite3.connect(self.old.path, timeout=30)) as file, file:
                file.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (MOVED, shown(self.url)))
        except sqlite3.Error as error:
            raise StoreError(f"{self.old.path}: can't be marked as moved ({error}); see that its disk is sound") from error


def _fill(cursor: Cursor[Any], table: str, rows: list[Any]) -> None:
    with cursor.copy(f"COPY {table} FROM STDIN".encode()) as out:
        for row in rows:
            out.write_row(row)
