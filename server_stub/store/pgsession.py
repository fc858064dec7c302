"""The writer's session over PostgreSQL: one transaction at a time among all collectors, and rows that go in by COPY.

Owns: the sequencer. `begin` takes one advisory lock for the transaction, so whoever holds it gives out the next positions of
the log, and PostgreSQL lets go of it only once that commit is durable and visible: positions have no holes and are seen in
their order, whichever collector gave them out, so a reader may remember the last one. A collector that is killed loses the lock
with its connection. One that is stopped in its transaction is ended by the server (idle_in_transaction_session_timeout), or by
whoever waits for it (`_FENCE`): what it had begun is gone, and its commit can't come later. Also: the numbers of texts and
chains. Must not know what the rows mean.
"""

import base64
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psycopg
from psycopg import Connection

from agent.contract.wire import Head
from server_stub import query
from server_stub.intake import Known, Row
from server_stub.store import StoreError, pgmonths
from server_stub.store.pglink import connect, given, shown, told, translated
from server_stub.tree import Frontier

CHANNEL = "sekisho"
"""Of NOTIFY: each commit says the log's size."""
WRITE_LOCK = 0x53454B4900
MAX_NAMES = 100_000
"""Texts whose numbers are kept in memory, at most."""
MAX_SERIAL = 1_000
LOCK_MS, IDLE_MS, COPY_MS = 1_000, 2_000, 2_500
"""How long the lock is waited for before its holder is looked at; how long a holder may be silent, between statements and
within a COPY. Together below the 5 s in which another collector goes on."""
PATIENCE_S = 20.0
_FENCE = """
SELECT pg_terminate_backend(a.pid) FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.classid = %s AND l.objid = %s
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND a.pid <> pg_backend_pid()
AND a.wait_event_type = 'Client' AND a.state_change < clock_timestamp()
    - CASE WHEN a.state = 'active' THEN %s ELSE %s END * interval '1 millisecond'
"""
_COPY = (
    'COPY events (pos, chain, seq, uid, "time", received_at, severity, code, machine, host, "user", medium, label, way,'
    " program, bytes, hash, raw) FROM STDIN (FORMAT BINARY)"
)
_BEGIN, _END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"
_PLACE, _TIMES = struct.Struct(">hiqiiiq"), struct.Struct(">iqiqih")
_LENGTH, _LONG, _INT = struct.Struct(">i"), struct.Struct(">iq"), struct.Struct(">ii")


class PgSession:
    """The connection that writes; made anew when it was lost."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._held: Connection[Any] | None = None
        self._size = self._wiped = -1
        self._grown: Frontier | None = None
        self._warned = ""
        self._reset()

    def _reset(self) -> None:
        self.forget()
        self._rows: list[bytes] = []
        self._heads: list[tuple[Any, ...]] = []
        self._nodes: list[tuple[int, int, bytes]] = []
        self._ends: dict[int, Known] = {}

    def forget(self) -> None:
        """See `Session`."""
        self._names: dict[str | None, bytes] = {None: _NULL}
        self._chains: dict[tuple[str, int], int] = {}
        self._serials: set[tuple[bytes, str]] = set()
        self._month: pgmonths.Month | None = None

    def _connection(self) -> Connection[Any]:
        if self._held is None or self._held.closed:
            self._held = connect(self.url, "writer")
            self._held.execute(f"SET idle_in_transaction_session_timeout = {IDLE_MS}")
            self._held.execute(f"SET lock_timeout = {LOCK_MS}")
            self._held.add_notice_handler(self._notice)
            self._reset()
        return self._held

    def _notice(self, said: psycopg.errors.Diagnostic) -> None:
        if said.severity_nonlocalized == "WARNING":
            self._warned = said.message_primary or "a warning"

    def begin(self) -> bool:
        """See `Session`. Raises StoreError if another collector keeps the lock for longer than `PATIENCE_S`."""
        until = time.monotonic() + PATIENCE_S
        with told(self.url):
            while not self._locked():
                if time.monotonic() > until:
                    raise StoreError(f"{shown(self.url)}: another collector has been writing for {PATIENCE_S:.0f} s; try again")
            rows = self._connection().execute("SELECT size, wiped FROM tip").fetchall()
        return bool(rows[0] != (self._size, self._wiped))

    def _locked(self) -> bool:
        """Whether the lock was had in time; if not, a holder that is waited for by its server is ended."""
        db = self._connection()
        try:
            db.execute("BEGIN")
        except psycopg.OperationalError:
            if not db.closed:
                raise
            db = self._connection()  # it was lost while nothing was to be done
            db.execute("BEGIN")
        try:
            db.execute("SELECT pg_advisory_xact_lock(%s)", (WRITE_LOCK,))
            return True
        except psycopg.errors.LockNotAvailable:
            db.execute("ROLLBACK")
            db.execute(_FENCE, (WRITE_LOCK >> 32, WRITE_LOCK & 0xFFFFFFFF, COPY_MS, IDLE_MS))
            return False

    def edge(self) -> Frontier:
        """See `Session`."""
        with told(self.url):
            size, roots, wiped = self._connection().execute("SELECT size, roots, wiped FROM tip").fetchall()[0]
        if wiped != self._wiped:
            self.forget()
        self._size, self._wiped = size, wiped
        return Frontier(size, [roots[at : at + 32] for at in range(0, len(roots), 32)])

    def grown(self, edge: Frontier) -> None:
        """See `Session`."""
        self._grown = edge

    def commit(self) -> None:
        """See `Session`."""
        with told(self.url):
            db = self._connection()
            self._flush()
            # Always a row is written: so the commit waits for the standbys, even if all it says is "this is held here already",
            # of events whose own commit was cut short before they had them.
            if self._grown is not None:
                edge = self._grown
                db.execute("UPDATE tip SET size = %s, roots = %s", (edge.size, b"".join(edge.roots)))
                db.execute("SELECT pg_notify(%s, %s)", (CHANNEL, str(edge.size)))
            self._warned = ""
            done = db.execute("COMMIT").statusmessage
        if done != "COMMIT" or self._warned:
            # The wait for a standby was cut short: it is not as durable as was asked, and no receipt is due.
            raise StoreError(f"{shown(self.url)}: the commit is not certain ({self._warned or done}); it will be tried again")
        if self._grown is not None:
            self._size, self._grown = self._grown.size, None

    def rollback(self) -> None:
        """See `Session`."""
        self._reset()
        self._grown = None
        if self._held is not None and not self._held.closed:
            try:
                self._held.execute("ROLLBACK")
            except psycopg.Error:
                self._held.close()  # the server drops what a lost connection had begun

    def close(self) -> None:
        """Give the connection back."""
        if self._held is not None:
            self._held.close()

    def add(self, first_pos: int, rows: Sequence[Row], received_at: int) -> None:
        """See `Session`."""
        with told(self.url):
            month = pgmonths.month_of(received_at)
            if month != self._month or len(self._names) > MAX_NAMES:
                pgmonths.ensure(self._connection(), month)
                # Whoever is not named again in this month shows in `names.seen`.
                self._names, self._month = {None: _NULL}, month
            self._rows += [self._packed(pos, row, received_at) for pos, row in enumerate(rows, first_pos)]

    def _packed(self, pos: int, row: Row, received_at: int) -> bytes:
        """A row as COPY's binary format has it: a count of fields, then each with its length."""
        names = self._names
        texts = (row.code, row.machine, row.host, row.user, row.medium, row.label, row.way, row.program)
        try:
            numbers = [names[text] for text in texts]
        except KeyError:
            numbers = [names[text] if text in names else self._name(text) for text in texts]
        if row.serial is not None and row.medium is not None:
            self._serial(numbers[4], row.serial)
        chain = self._chains.get((row.agent, row.epoch)) or self._chain(row.agent, row.epoch)
        uid = query.uid_key(row.uid) if row.uid is not None else None
        key = uid.encode() if isinstance(uid, str) else uid
        return b"".join(
            (
                _PLACE.pack(18, 8, pos, 4, chain, 8, row.seq),
                _NULL if key is None else _LENGTH.pack(len(key)) + key,
                _TIMES.pack(8, row.time, 8, received_at, 2, row.severity),
                *numbers,
                _NULL if row.bytes is None else _LONG.pack(8, row.bytes),
                b"\0\0\0\x20",
                row.hash,
                _LENGTH.pack(len(row.raw)),
                row.raw,
            )
        )

    def _name(self, text: str | None) -> bytes:
        """The number of a text, as a packed field; given out now if it is new."""
        assert text is not None and self._month is not None
        (kept,), start = given((text,)), self._month.start_ms()
        found = self.execute("SELECT id, seen FROM names WHERE text = ?", (kept,))
        if not found:
            found = self.execute("INSERT INTO names (text, seen) VALUES (?, ?) RETURNING id, seen", (kept, start))
        elif found[0][1] < start:
            self.execute("UPDATE names SET seen = ? WHERE id = ?", (start, found[0][0]))
        self._names[text] = packed = _INT.pack(4, found[0][0])
        return packed

    def _serial(self, medium: bytes, serial: str) -> None:
        (serial,) = given((serial[:MAX_SERIAL],))
        if (medium, serial) in self._serials:
            return
        (number,) = struct.unpack_from(">i", medium, 4)
        if not self.execute("SELECT 1 FROM serials WHERE medium = ? AND serial = ?", (number, serial)):
            self.execute("INSERT INTO serials VALUES (?, ?)", (number, serial))
        self._serials.add((medium, serial))

    def _chain(self, agent: str, epoch: int) -> int:
        """The number of a chain; one that is new ends nowhere until `set_known`."""
        found = self.execute("SELECT id FROM chains WHERE agent = ? AND epoch = ?", (agent, epoch))
        if not found:
            new = "INSERT INTO chains (agent, epoch, last, hash, tree_size) VALUES (?, ?, 0, '', 0) RETURNING id"
            found = self.execute(new, (agent, epoch))
        self._chains[agent, epoch] = number = int(found[0][0])
        return number

    def add_head(self, first_pos: int, head: Head, taken: int) -> None:
        """See `Session`."""
        chain = self._chains.get((head.agent, head.epoch)) or self._chain(head.agent, head.epoch)
        self._heads.append((first_pos, chain, head.first, taken, head.last, head.sent_at, base64.b64decode(head.sig)))

    def add_nodes(self, nodes: Iterable[tuple[int, int, bytes]]) -> None:
        """See `Session`."""
        self._nodes += nodes

    def known(self, agent: str, epoch: int) -> Known | None:
        """See `Session`."""
        if end := self._ends.get(self._chains.get((agent, epoch), 0)):
            return end
        rows = self.execute("SELECT last, hash, tree_size, id FROM chains WHERE agent = ? AND epoch = ?", (agent, epoch))
        if not rows:
            return None
        self._chains[agent, epoch] = rows[0][3]
        return Known(*rows[0][:3])

    def held(self, agent: str, epoch: int, seq: int) -> tuple[int, bytes] | None:
        """See `Session`."""
        sql = "SELECT pos, events.hash FROM events JOIN chains ON id = chain WHERE agent = ? AND epoch = ? AND seq = ?"
        rows = self.execute(sql, (agent, epoch, seq))
        return (rows[0][0], rows[0][1]) if rows else None

    def set_known(self, agent: str, epoch: int, known: Known) -> None:
        """See `Session`."""
        self._ends[self._chains.get((agent, epoch)) or self._chain(agent, epoch)] = known

    def _flush(self) -> None:
        """Send what was gathered."""
        db = self._connection()
        if self._rows:
            with db.cursor() as cursor, cursor.copy(_COPY) as copy:
                copy.write(b"".join((_BEGIN, *self._rows, _END)))
            self._rows = []
        for table, rows in (("heads", self._heads), ("nodes (level, n, hash)", self._nodes)):
            if rows:
                with db.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN") as copy:
                    for row in rows:
                        copy.write_row(row)
                rows.clear()
        if self._ends:
            ends = [list(column) for column in zip(*((number, *known) for number, known in self._ends.items()), strict=True)]
            db.execute(
                "UPDATE chains SET last = v.last, hash = v.hash, tree_size = v.size FROM unnest(%s::int[], %s::bigint[],"
                " %s::bytea[], %s::bigint[]) AS v (id, last, hash, size) WHERE chains.id = v.id",
                ends,
            )
            self._ends = {}

    def overwriting(self) -> None:
        """See `Session`: `PostgresStore.settle` takes old rows from their pages."""

    def erase_months(self, before_ms: int) -> tuple[int, int, int]:
        """See `Session`."""
        with told(self.url):
            self._flush()
            db = self._connection()
            db.execute("SET LOCAL lock_timeout = '30s'")
            return pgmonths.swap(db, before_ms)

    def drop_names(self, before_ms: int) -> None:
        """See `Session`. A month's texts go when the month is over."""
        start = pgmonths.month_of(max(before_ms, 0)).start_ms()
        self.execute("DELETE FROM names WHERE seen < ?", (start,))
        self.execute("DELETE FROM serials WHERE medium NOT IN (SELECT id FROM names)")
        self.execute("UPDATE tip SET wiped = wiped + 1")
        self.forget()

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See `Session`."""
        with told(self.url):
            if (self._rows or self._ends) and any(table in sql for table in ("events", "chains", "heads", "nodes", "tip")):
                self._flush()
            cursor = self._connection().execute(translated(sql).encode(), given(values))
            return cursor.fetchall() if cursor.description else []
