"""The store over PostgreSQL, for several collectors at once: connections, the schema's version, and what everybody reads.

Owns: making the schema, and bringing it up to date, under a lock that all collectors share; the connections of those who
read (one a thread); hearing that another collector has committed (LISTEN). How the database is reached is in `pglink`, what
writes in `pgsession`. Must not know what the rows mean.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any

import psycopg
from psycopg import Connection

from server_stub import query, tree
from server_stub.store import StoreError, pgmonths
from server_stub.store.pglink import connect, given, shown, told, translated
from server_stub.store.pgsession import CHANNEL, PgSession

VERSION = 1
"""Of the layout, kept in the table `layout`; raised whenever `postgres.sql` changes, with a step in `STEPS`."""
STEPS: dict[int, str] = {}
"""What brings layout N to N + 1, as SQL."""
SCHEMA_LOCK, SITE_LOCK = 0x53454B4901, 0x53454B4902
"""Advisory locks: whoever makes the schema; whoever uses the store (shared), or must be alone with it."""
MOVING = "moving from"
"""In `meta`: this store is being filled by `migrate`, and is not whole yet."""
LISTEN_S = 1.0
"""Without a word for so long, the log's size is asked for: a notification may have been lost with a connection."""


def _uid(uid: str) -> bytes:
    key = query.uid_key(uid)
    return key if isinstance(key, bytes) else key.encode()


def _as_latin(text: str) -> str:
    """The same bytes, each as one character: any byte is one in LATIN1, so an event that is not UTF-8 breaks no search."""
    return text.encode().decode("latin-1")


DIALECT = query.Dialect(
    like="COLLATE \"C\" ILIKE ? ESCAPE '\\'",
    raw_like="convert_from(raw, 'LATIN1') COLLATE \"C\" ILIKE ? ESCAPE '\\'",
    raw_has="position(? IN raw) > 0",
    day="to_char(to_timestamp(\"time\" / 1000), 'YYYY-MM-DD')",
    like_needle=_as_latin,
    has_needle=str.encode,
    uid=_uid,
)


def set_aside(url: str, at_ms: int) -> str:
    """Rename what is in the database, with no collector on it, so that a backup can take its place; the schema's name now."""
    store, aside = PostgresStore(url, alone=True, moving=True), f"before_restore_{at_ms}"
    try:
        with told(url), store.connection() as db, db.transaction():
            db.execute(f"ALTER SCHEMA public RENAME TO {aside}")
            db.execute("CREATE SCHEMA public")
    finally:
        store.close()
    return aside


class PostgresStore:
    """Opens the database, makes the schema if it is new."""

    dialect = DIALECT
    shared = True

    def __init__(self, url: str, alone: bool = False, moving: bool = False) -> None:
        """`alone`: while no collector uses it, and none may begin to; `moving`: it may be half filled. Raises StoreError."""
        self.url, self._served = url, not (alone or moving)
        self._local = threading.local()
        self._open: list[Connection[Any]] = []
        self._lock = threading.Lock()
        self._session: PgSession | None = None
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None
        with told(url):
            self._site = connect(url, "site")
            try:
                self._prepare()
                which = "pg_try_advisory_lock" if alone else "pg_try_advisory_lock_shared"
                if not self._site.execute(f"SELECT {which}(%s)", (SITE_LOCK,)).fetchall()[0][0]:
                    who = "collectors work on it; stop them first" if alone else "somebody must be alone with it; wait for that"
                    raise StoreError(f"{shown(url)}: {who}")
                if not moving and self._site.execute("SELECT 1 FROM meta WHERE name = %s", (MOVING,)).fetchall():
                    raise StoreError(f"{shown(url)}: is only half filled; run `sekisho-collector migrate` to its end")
            except BaseException:
                self._site.close()
                raise

    def _prepare(self) -> None:
        db = self._site
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", (SCHEMA_LOCK,))
            db.execute("CREATE TABLE IF NOT EXISTS layout (version INTEGER NOT NULL)")
            rows = db.execute("SELECT version FROM layout").fetchall()
            if not rows:
                db.execute(resources.files("server_stub.store").joinpath("postgres.sql").read_bytes())
                db.execute("INSERT INTO layout VALUES (%s)", (VERSION,))
                return
            version = int(rows[0][0])
            if version > VERSION:
                raise StoreError(
                    f"{shown(self.url)}: made by a newer version of the collector (layout {version}); update this one"
                )
            for step in range(version, VERSION):
                db.execute(STEPS[step].encode())
                db.execute("UPDATE layout SET version = %s", (step + 1,))

    def session(self) -> PgSession:
        """See `Store`. A log whose newest events are gone is not gone on with. Raises StoreError."""
        if self._session is None:
            if self._served:
                tree.frontier_of(self.rows("SELECT size FROM tip")[0][0], self.subtree)
            self._session = PgSession(self.url)
        return self._session

    def _reader(self) -> Connection[Any]:
        db: Connection[Any] | None = getattr(self._local, "db", None)
        if db is None or db.closed:
            db = self._local.db = connect(self.url, "reader")
            with self._lock:
                self._open = [each for each in self._open if not each.closed] + [db]
        return db

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection[Any]]:
        """This thread's connection, for work that is no collector's."""
        yield self._reader()

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `Store`. A connection that was lost while nobody used it is made anew."""
        with told(self.url):
            try:
                return self._rows(sql, values)
            except psycopg.OperationalError:
                if not self._local.db.closed:
                    raise
            return self._rows(sql, values)

    def _rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._reader().cursor(binary=True) as cursor:
            cursor.execute(translated(sql).encode(), given(values))
            return cursor.fetchall() if cursor.description else []

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
            raise StoreError(f"{shown(self.url)}: hashes of the tree are missing at level {kept}; restore from a backup")
        while len(hashes) > 1:
            hashes = [tree.node_hash(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
        return bytes(hashes[0])

    def listen(self, heard: Callable[[int], None]) -> None:
        """See `Store`."""
        self._listener = threading.Thread(target=self._listen, args=(heard,), name="listen", daemon=True)
        self._listener.start()

    def _listen(self, heard: Callable[[int], None]) -> None:
        while not self._closing.is_set():
            try:
                with connect(self.url, "listener") as db:
                    db.execute(f"LISTEN {CHANNEL}")
                    while not self._closing.is_set():
                        heard(int(db.execute("SELECT size FROM tip").fetchall()[0][0]))
                        for word in db.notifies(timeout=LISTEN_S):
                            heard(int(word.payload))
                            if self._closing.is_set():
                                break
            except (psycopg.Error, StoreError):
                # The database is away: whoever reads or writes is told so; here there is nobody to tell.
                self._closing.wait(LISTEN_S / 2)

    def fold_months(self, before_ms: int) -> None:
        """See `Store`."""
        with told(self.url):
            pgmonths.fold(self._reader(), before_ms)

    def settle(self) -> None:
        """See `Store`: rows that were overwritten are taken from their pages. A month that is over goes as a file."""
        with told(self.url):
            self._reader().execute("VACUUM events")

    def checked(self) -> int:
        """The log's size, after its events were counted and their tree found as it was kept. Raises StoreError."""
        size, roots = self.rows("SELECT size, roots FROM tip")[0]
        edge = tree.frontier_of(size, self.subtree)
        found = self.rows("SELECT count(*), coalesce(max(pos), 0) FROM events")[0]
        if found != (size, size) or b"".join(edge.roots) != roots:
            raise StoreError(f"{shown(self.url)}: events of its log are missing, or not as they were; take another backup")
        return int(size)

    def size_bytes(self) -> int:
        """See `Store`."""
        return int(self.rows("SELECT pg_database_size(current_database())")[0][0])

    def close(self) -> None:
        """See `Store`."""
        self._closing.set()
        if self._listener is not None:
            self._listener.join()
        with self._lock:
            for db in [*self._open, self._site]:
                db.close()
            self._open.clear()
        self._local = threading.local()
        if self._session is not None:
            self._session.close()
            self._session = None
