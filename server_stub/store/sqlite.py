"""The store over SQLite: one file, WAL, synchronous=FULL, so a commit is on the disk when it returns.

Owns: the connections (one that writes, one for each thread that reads), the pragmas, the schema's version, and turning
SQLite's errors into `StoreError`. Must not know what the rows mean.
"""

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from server_stub import tree
from server_stub.intake import Known, Row
from server_stub.store import StoreError

VERSION = 1
_COLUMNS = ", ".join(("pos", "received_at", *Row._fields))
_INSERT = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join('?' * (2 + len(Row._fields)))})"  # noqa: S608 - constants


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = "disk is full" in str(error)
        advice = "make room on its disk" if full else "see that its disk is sound and writable"
        raise StoreError(f"{path}: {error}; {advice}") from error


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=256)
    db.execute("PRAGMA busy_timeout = 30000")
    db.execute("PRAGMA cache_size = -32768")
    return db


class SqliteSession:
    """The connection that writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _told(path):
            self.db = _connect(path)
            self.db.execute("PRAGMA synchronous = FULL")
            self.db.execute("PRAGMA wal_autocheckpoint = 4000")

    def begin(self) -> None:
        """See `Session`."""
        with _told(self.path):
            self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """See `Session`."""
        with _told(self.path):
            self.db.execute("COMMIT")

    def rollback(self) -> None:
        """See `Session`. SQLite may have rolled back by itself already (a full disk): then there is nothing to drop."""
        with _told(self.path):
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def add(self, first_pos: int, rows: Sequence[Row], received_at: int) -> None:
        """See `Session`."""
        with _told(self.path):
            self.db.executemany(_INSERT, [(pos, received_at, *row) for pos, row in enumerate(rows, first_pos)])

    def add_nodes(self, nodes: Iterable[tuple[int, int, bytes]]) -> None:
        """See `Session`."""
        with _told(self.path):
            self.db.executemany("INSERT INTO nodes (level, n, hash) VALUES (?, ?, ?)", nodes)

    def known(self, agent: str, epoch: int) -> Known | None:
        """See `Session`."""
        rows = self.execute("SELECT last, hash, tree_size FROM chains WHERE agent = ? AND epoch = ?", (agent, epoch))
        return Known(*rows[0]) if rows else None

    def held(self, agent: str, epoch: int, seq: int) -> tuple[int, bytes] | None:
        """See `Session`."""
        rows = self.execute("SELECT pos, hash FROM events WHERE agent = ? AND epoch = ? AND seq = ?", (agent, epoch, seq))
        return (rows[0][0], rows[0][1]) if rows else None

    def set_known(self, agent: str, epoch: int, known: Known) -> None:
        """See `Session`."""
        self.execute("INSERT OR REPLACE INTO chains VALUES (?, ?, ?, ?, ?)", (agent, epoch, *known))

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `Session`."""
        with _told(self.path):
            return self.db.execute(sql, values).fetchall()


class SqliteStore:
    """Opens the file, makes the schema if it is new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._session: SqliteSession | None = None
        with _told(path):
            db = self._reader()
            db.execute("PRAGMA page_size = 8192")
            db.execute("PRAGMA journal_mode = WAL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                schema = resources.files("server_stub.store").joinpath("schema.sql").read_text("utf-8")
                db.executescript(f"BEGIN IMMEDIATE;\n{schema}\nPRAGMA user_version = {VERSION};\nCOMMIT;")
            elif version != VERSION:
                raise StoreError(f"{path}: made by another version of the collector (layout {version}); use that version")

    def _reader(self) -> sqlite3.Connection:
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = _connect(self.path)
            with self._lock:
                self._open.append(db)
        return db

    def session(self) -> SqliteSession:
        """See `Store`."""
        if self._session is None:
            self._session = SqliteSession(self.path)
        return self._session

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `Store`."""
        with _told(self.path):
            return self._reader().execute(sql, values).fetchall()

    def subtree(self, level: int, index: int) -> bytes:
        """See `Store`: from the kept level below, at most 256 hashes."""
        kept = level - level % tree.TILE
        first, count = index << (level - kept), 1 << (level - kept)
        if kept:
            sql, values = "SELECT hash FROM nodes WHERE level = ? AND n >= ? AND n < ? ORDER BY n", (kept, first, first + count)
            hashes = [row[0] for row in self.rows(sql, values)]
        else:
            sql = "SELECT leaf FROM events WHERE pos > ? AND pos <= ? ORDER BY pos"
            hashes = [row[0] for row in self.rows(sql, (first, first + count))]
        if len(hashes) != count:
            raise StoreError(f"{self.path}: hashes of the tree are missing at level {kept}; restore the store from a backup")
        while len(hashes) > 1:
            hashes = [tree.node_hash(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
        return bytes(hashes[0])

    def size_bytes(self) -> int:
        """See `Store`."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def close(self) -> None:
        """See `Store`."""
        with self._lock:
            for db in self._open:
                db.close()
            self._open.clear()
        self._local = threading.local()
        if self._session is not None:
            self._session.db.close()
            self._session = None
