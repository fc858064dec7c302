"""The store over SQLite: one file, WAL, synchronous=FULL, so a commit is on the disk when it returns.

Owns: the connections (one that writes, one for each thread that reads), the pragmas, the schema's version, the numbers
that stand for texts and chains in it, and turning SQLite's errors into `StoreError`. Must not know what the rows mean.
"""

import base64
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from agent.contract.wire import Head
from server_stub import query, tree
from server_stub.intake import Known, Row
from server_stub.store import StoreError

VERSION = 3
"""Of the layout, kept in PRAGMA user_version; raised whenever `schema.sql` changes."""
MAX_NAMES = 100_000
"""Texts whose numbers are kept in memory, at most."""
MOVED = "moved to"
"""In `meta`: this store's log goes on in another; no collector may go on with it here."""
_COLUMNS = (
    *("pos", "chain", "seq", "uid", "time", "received_at", "severity"),
    *("code", "machine", "host", "user", "medium", "label", "way", "program"),
    *("bytes", "hash", "raw"),
)
_INSERT = f"INSERT INTO events ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - constants


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        full = "disk is full" in str(error)
        read_only = "readonly" in str(error)
        advice = "make room on its disk" if full else "mount it writable" if read_only else "see that its disk is sound"
        raise StoreError(f"{path}: {error}; {advice}") from error


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False, cached_statements=256)
    db.execute("PRAGMA busy_timeout = 30000")
    db.execute("PRAGMA cache_size = -32768")
    return db


class SqliteSession:
    """The connection that writes."""

    def __init__(self, path: Path, subtree: tree.Subtree) -> None:
        self.path, self.subtree = path, subtree
        with _told(path):
            self.db = _connect(path)
            self.db.execute("PRAGMA synchronous = FULL")
            self.db.execute("PRAGMA wal_autocheckpoint = 4000")
        self._names: dict[str | None, int | None] = {None: None}
        self._chains: dict[tuple[str, int], int] = {}
        self._serials: set[tuple[int | None, str]] = set()

    def forget(self) -> None:
        """See `Session`."""
        self._names = {None: None}
        self._chains.clear()
        self._serials.clear()

    def begin(self) -> bool:
        """See `Session`. One process holds this store's lock: nobody else writes."""
        with _told(self.path):
            self.db.execute("BEGIN IMMEDIATE")
        return False

    def edge(self) -> tree.Frontier:
        """See `Session`."""
        return tree.frontier_of(self.execute("SELECT coalesce(max(pos), 0) FROM events")[0][0], self.subtree)

    def grown(self, edge: tree.Frontier) -> None:
        """See `Session`: it is read from the events."""

    def commit(self) -> None:
        """See `Session`."""
        with _told(self.path):
            self.db.execute("COMMIT")

    def rollback(self) -> None:
        """See `Session`. SQLite may have rolled back by itself already (a full disk): then there is nothing to drop."""
        # Numbers given out within the transaction are gone with it.
        self.forget()
        with _told(self.path):
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def add(self, first_pos: int, rows: Sequence[Row], received_at: int) -> None:
        """See `Session`."""
        if len(self._names) > MAX_NAMES:
            self._names = {None: None}
        with _told(self.path):
            self.db.executemany(_INSERT, [self._values(pos, row, received_at) for pos, row in enumerate(rows, first_pos)])

    def _values(self, pos: int, row: Row, received_at: int) -> tuple[Any, ...]:
        names = self._names
        texts = (row.code, row.machine, row.host, row.user, row.medium, row.label, row.way, row.program)
        try:
            numbers = [names[text] for text in texts]
        except KeyError:
            numbers = [names[text] if text in names else self._name(text) for text in texts]
        if row.serial is not None and row.medium is not None and (numbers[4], row.serial) not in self._serials:
            self.db.execute("INSERT OR IGNORE INTO serials VALUES (?, ?)", (numbers[4], row.serial))
            self._serials.add((numbers[4], row.serial))
        uid = query.uid_key(row.uid) if row.uid is not None else None
        chain = self._chains.get((row.agent, row.epoch)) or self._chain(row.agent, row.epoch)
        numbered = (pos, chain, row.seq, uid, row.time, received_at, row.severity, *numbers)
        return (*numbered, row.bytes, row.hash, row.raw)

    def _name(self, text: str | None) -> int:
        """The number of a text, given out now if it is new."""
        found = self.db.execute("SELECT id FROM names WHERE text = ?", (text,)).fetchone()
        found = found or self.db.execute("INSERT INTO names (text) VALUES (?) RETURNING id", (text,)).fetchone()
        self._names[text] = number = int(found[0])
        return number

    def _chain(self, agent: str, epoch: int) -> int:
        """The number of a chain; one that is new ends nowhere until `set_known`."""
        new = "INSERT OR IGNORE INTO chains (agent, epoch, last, hash, tree_size) VALUES (?, ?, 0, x'', 0)"
        self.db.execute(new, (agent, epoch))
        found = self.db.execute("SELECT id FROM chains WHERE agent = ? AND epoch = ?", (agent, epoch)).fetchone()
        self._chains[agent, epoch] = number = int(found[0])
        return number

    def add_head(self, first_pos: int, head: Head, taken: int) -> None:
        """See `Session`."""
        values = (
            *(first_pos, self._chains.get((head.agent, head.epoch)) or self._chain(head.agent, head.epoch)),
            *(head.first, taken, head.last, head.sent_at, base64.b64decode(head.sig)),
        )
        with _told(self.path):
            self.db.execute("INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?, ?)", values)

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
        sql = "SELECT pos, events.hash FROM events JOIN chains ON id = chain WHERE agent = ? AND epoch = ? AND seq = ?"
        rows = self.execute(sql, (agent, epoch, seq))
        return (rows[0][0], rows[0][1]) if rows else None

    def set_known(self, agent: str, epoch: int, known: Known) -> None:
        """See `Session`."""
        sql = (
            "INSERT INTO chains (agent, epoch, last, hash, tree_size) VALUES (?, ?, ?, ?, ?) ON CONFLICT (agent, epoch)"
            " DO UPDATE SET last = excluded.last, hash = excluded.hash, tree_size = excluded.tree_size"
        )
        self.execute(sql, (agent, epoch, *known))

    def overwriting(self) -> None:
        """See `Session`."""
        self.execute("PRAGMA secure_delete = ON")

    def erase_months(self, before_ms: int) -> tuple[int, int, int]:
        """See `Session`: one table holds all months."""
        return 0, 0, 0

    def drop_names(self, before_ms: int) -> None:
        """See `Session`."""
        used = " UNION ".join(
            f"SELECT {column} FROM events"  # noqa: S608 - constants
            for column in ("code", "machine", "host", '"user"', "medium", "label", "way", "program")
        )
        self.execute(f"DELETE FROM names WHERE id NOT IN (SELECT * FROM ({used}) WHERE code IS NOT NULL)")  # noqa: S608
        self.execute("DELETE FROM serials WHERE medium NOT IN (SELECT id FROM names)")
        self.forget()

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `Session`."""
        with _told(self.path):
            return self.db.execute(sql, values).fetchall()


class SqliteStore:
    """Opens the file, makes the schema if it is new."""

    dialect = query.SQLITE
    shared = False

    def listen(self, heard: Callable[[int], None]) -> None:
        """See `Store`: there is no other."""

    def __init__(self, path: Path, moved: bool = False) -> None:
        """`moved`: also one whose log goes on elsewhere."""
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
                age, what = ("a newer", "update this one") if version > VERSION else ("an older", "use that one")
                raise StoreError(f"{path}: made by {age} version of the collector (layout {version}, not {VERSION}); {what}")
            elif not moved and (to := db.execute("SELECT value FROM meta WHERE name = ?", (MOVED,)).fetchone()):
                raise StoreError(f'{path}: this log was moved to {to[0]}; set "database" in [collector] to that')

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
            self._session = SqliteSession(self.path, self.subtree)
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
            sql = "SELECT raw, leaf FROM events LEFT JOIN erased USING (pos) WHERE pos > ? AND pos <= ? ORDER BY pos"
            hashes = [leaf or tree.leaf_hash(raw) for raw, leaf in self.rows(sql, (first, first + count))]
        if len(hashes) != count:
            raise StoreError(f"{self.path}: hashes of the tree are missing at level {kept}; restore the store from a backup")
        while len(hashes) > 1:
            hashes = [tree.node_hash(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
        return bytes(hashes[0])

    def fold_months(self, before_ms: int) -> None:
        """See `Store`: one table holds all months."""

    def settle(self) -> None:
        """See `Store`: the log that SQLite keeps beside the file holds the former pages until then."""
        with _told(self.path):
            self._reader().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

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


def copy(source: Path, target: Path) -> None:
    """Copy a store, also one in use, as of one moment (SQLite's online backup). `target` is made, 0600. Raises StoreError."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with _told(source), closing(sqlite3.connect(source, timeout=30)) as db, closing(sqlite3.connect(target)) as made:
        db.backup(made)


def checked(path: Path) -> int:
    """The size of the log in a copy that was found sound, to its last page and hash. Raises StoreError."""
    with _told(path), closing(sqlite3.connect(path)) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            raise StoreError(f"{path}: is no store of this version of the collector (layout {version}, not {VERSION})")
        damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise StoreError(f"{path}: is damaged ({' '.join(damage.split())}); take another backup")
        size, count = db.execute("SELECT coalesce(max(pos), 0), count(*) FROM events").fetchone()
        if size != count:
            raise StoreError(f"{path}: {size - count} events of its log are missing; take another backup")
        return int(size)


def new_epoch(path: Path, epoch: int) -> None:
    """Have the collector's own chain begin anew: after what a backup holds, others may have followed once."""
    with _told(path), closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'epoch'", (str(epoch),))
