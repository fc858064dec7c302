"""The spool: every event, durable before anyone is told of it, until the collector's signed receipt and while it fits.

Owns: appending (sealing and linking happen here, in the one transaction that also keeps the core's counters), what is
acknowledged, the next batch, and what is told of losses. Where the file lives and what becomes of a damaged one is in
`spoolhome.py`, its layout and readers in `spoolfile.py`, what goes when room is short in `room.py`. Must not know: what events
mean, HTTP, private keys.

SQLite with WAL and synchronous=FULL: `append` returns after fsync(2). One connection, one lock: every method may be called from
any thread. Losses are told through `tell` as `Lost` facts, once a run each, until an `agent.gap` event with the very same range
is appended; whoever is told must only queue the fact, for the lock is held.
"""

import contextlib
from collections.abc import Iterable
from itertools import chain as chained
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import msgspec
from msgspec import Struct

from agent import packs, room
from agent.contract import chain, codes
from agent.contract.event import Event
from agent.contract.form import AnyEvent
from agent.contract.wire import MAX_EVENT_BYTES, MAX_EVENTS, Head, Receipt, folded_line
from agent.core.facts import Lost
from agent.spoolfile import (
    CUT,
    FOLDED,
    FORMAT,
    HELD,
    REFUSED,
    SpoolError,
    Whole,
    connect_read_only,
    last_seq,
    read_events,
    rows,
    verify,
)
from agent.spoolhome import SpoolHome, base_of, losses, read_meta, wall_ms, write_meta

__all__ = ["Batch", "Spool", "SpoolError", "Whole", "last_seq", "read_events", "verify"]


_MOVED_AT_ONCE = 500
_CUT_AT_ONCE = (16, 32, 64, 128, 256, 512)


_INSERT, _LINK = "INSERT INTO link (seq, time, severity, keep, code, digest, hash) VALUES ", "(?, ?, ?, ?, ?, ?, ?)"
_ROWS = 128
BATCH_BYTES = 1 << 20
"""Of a batch, before it is packed: it is in memory twice while it is sent."""


class Batch(Struct, frozen=True):
    """Lines `first`..`last` of a chain, from hash `prev` to `hash`; empty if `last` = `first` - 1."""

    agent: str
    epoch: int
    first: int
    last: int
    prev: bytes
    hash: bytes
    lines: list[bytes]

    def head(self, sent_at: int) -> Head:
        """The batch head, not signed yet; `sent_at` in ms."""
        return Head(self.agent, self.epoch, self.first, self.last, self.prev.hex(), self.hash.hex(), sent_at)


class Spool(SpoolHome):
    """An open spool; made by `Spool.open(state_dir, identity, max_bytes, now_ms, tell)`."""

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, events: Iterable[AnyEvent], state: bytes | None = None) -> list[bytes]:
        """Seal, link and keep `events` in order, and the core's `state` with them. Durable when it returns.

        Returns the exact bytes of each. Raises SpoolError: then nothing of this call was kept, and it may be repeated with the
        same events if `retry`. An `agent.gap` event settles the pending loss it tells of. If the file turns out to be damaged,
        it is put aside, and the events begin a new epoch.
        """
        events = list(events)
        with self._lock:
            try:
                return self._append(events, state)
            except SpoolError as error:
                if error.code != "spool_corrupt" and not (error.code == "disk_full" and self._make_way()):
                    raise
                damaged = error.code == "spool_corrupt"
            if damaged:
                with self._speaking():
                    self._begin_anew("spool_corrupt", wall_ms())
            return self._append(events, state)

    def _append(self, events: list[AnyEvent], state: bytes | None) -> list[bytes]:
        with self._transaction() as db:
            seq, prev = self._seq, self._hash
            links: list[tuple[Any, ...]] = []
            sealed: list[bytes] = []
            for event in events:
                seq += 1
                data = event.seal(seq, self.epoch, prev)
                digest = chain.digest(data)
                prev = chain.link(prev, digest)
                code = event.code
                keep = event.class_uid == codes.FINDING or code == "agent.gap"
                links.append((seq, event.time, event.severity_id, keep, code, digest, prev))
                sealed.append(data)
                if code == "agent.gap":
                    self._settle(db, event)
            for at in range(0, len(links), _ROWS):  # each statement lets the thread in that senses: not once a row
                some = links[at : at + _ROWS]
                db.execute(_INSERT + ", ".join([_LINK] * len(some)), tuple(chained.from_iterable(some)))
            packs.write(db, self._seq + 1, sealed)
            if self._format < FORMAT:
                db.execute(f"PRAGMA user_version = {FORMAT}")  # only now, as on a full disk a start must not fail
            if state is not None:
                write_meta(db, "state", state)
            if not room.make(db, self.max_bytes, self._acked, seq):
                raise SpoolError(
                    "spool_full",
                    f"{self.path}: is full of findings that no collector took; mend the link or raise agent.spool.max_bytes",
                    retry=True,
                )
            db.execute("COMMIT")
            self._seq, self._hash, self._format = seq, prev, FORMAT
            self._tell_losses(db)
            return sealed

    def _make_way(self) -> bool:
        """The disk is full: what the collector holds gives its pages to what is new. False if nothing could be cut."""
        cut = False
        try:
            for few in _CUT_AT_ONCE:  # little by little, as cutting takes room in the -wal, too
                with self._speaking():
                    db = self._open_db()
                    if db.execute("SELECT 1 FROM content WHERE seq <= ? LIMIT 1", (self._acked,)).fetchone() is None:
                        break
                    self._spend_reserve()
                    db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
                with self._transaction() as db:
                    cut |= room.cut_contents(db, self._acked, few)
                    write_meta(db, "acked", self._acked)
                    db.execute("COMMIT")
        except (SpoolError, OSError):
            return cut
        return cut

    def release(self, last: int, receipt: Receipt) -> None:
        """Everything up to `last` is durable at the collector, by its signed `receipt` (checked): it may be cut for room.

        On a full or read-only disk that is known until a restart only; the collector then gives the same receipt again.
        """
        with self._lock:
            if last > self._seq:
                raise SpoolError("spool_short", f"{self.path}: ends at {self._seq}, before {last}", retry=False)
            try:
                with self._transaction() as db:
                    write_meta(db, "acked", max(last, self._acked))
                    write_meta(db, "receipt", msgspec.json.encode(receipt))
                    db.execute("COMMIT")
            except SpoolError as error:
                if not error.retry:
                    raise
            self._acked = max(last, self._acked)

    def rewind(self, last: int) -> bool:
        """The collector holds only up to `last` after all (it lost data): what follows counts as unacknowledged again.

        Contents of it that were cut meanwhile can only be sent as digests; they become a loss "collector_lost". False, and
        nothing done, if not even the digests are all here: then only `begin_epoch` helps.
        """
        with self._lock, self._transaction() as db:
            if last < base_of(db)[0]:
                return False
            room.count(db, "collector_lost", "seq > ? AND gone = 1", (last,), FOLDED)
            write_meta(db, "acked", min(last, self._acked))
            # The receipt spoke of what the collector no longer holds, but its signature still vouches for our chain: it stays.
            db.execute("COMMIT")
            self._acked = min(last, self._acked)
            self._tell_losses(db)
            return True

    def refuse(self, seq: int, reason: str = "refused") -> None:
        """The collector won't take event `seq`: from now on its digest is sent. Its bytes stay here; a loss counts it."""
        with self._lock, self._transaction() as db:
            room.count(db, reason, "seq = ? AND gone = 0", (seq,), REFUSED)
            db.execute("COMMIT")
            self._tell_losses(db)

    def save_head(self, head: Head) -> None:
        """Keep the newest signed batch head: it vouches for the tail of the chain until a receipt does."""
        with self._lock, self._transaction() as db:
            write_meta(db, "head", msgspec.json.encode(head))
            db.execute("COMMIT")

    def begin_epoch(self, now_ms: int, reason: str, expected: int) -> None:
        """Put this chain aside (kept as a file) and begin a new one; the core's counters move over.

        For a chain the collector can't continue, since it lost more than the spool can fill. What it lacks of the old chain,
        from seq `expected` on, is recorded anew, with the same uid and time, as far as the contents are here; the others become
        a loss `reason`.
        """
        with self._lock, self._speaking():
            db = self._open_db()
            state = read_meta(db, "state")
            row = db.execute("SELECT min(time), max(time) FROM link WHERE seq >= ?", (expected,)).fetchone()
            lost = Lost(at_ms=now_ms, reason=reason, since_ms=row[0] or now_ms, until_ms=row[1] or now_ms)
            lost.first_seq, lost.last_seq, lost.count = expected, self._seq, max(0, self._seq - expected + 1)
            self.previous = {"epoch": self.epoch, "seq": self._seq, "hash": self._hash.hex()}
            floor = self.epoch
            untold = losses(db)
            aside = self._put_aside(reason, self.epoch)
            self._create(max(now_ms, floor + 1), state, [*untold, lost])
            self._hushed = True  # until it is known how many are lost; should we be killed before: all that were to be moved
            try:
                self._move_over(self.path.with_name(aside), expected, state)
            finally:
                self._hushed = False
            self._tell_losses(self._open_db())

    def _move_over(self, aside: Path, expected: int, state: bytes | None) -> None:
        """Record anew what a chain that was put aside holds from seq `expected` on; its loss shrinks by each."""
        with contextlib.closing(connect_read_only(aside)) as old:
            held = (data for *_, data in rows(old, expected - 1) if data is not None)
            while group := [msgspec.json.decode(data, type=Event) for data in islice(held, _MOVED_AT_ONCE)]:
                self._append([*group], state)
                with self._transaction() as db:
                    newest = "id = (SELECT max(id) FROM lost WHERE first = ?)"
                    db.execute(f"UPDATE lost SET count = count - ? WHERE {newest}", (len(group), expected))  # noqa: S608
                    db.execute(f"DELETE FROM lost WHERE count <= 0 AND {newest}", (expected,))  # noqa: S608
                    db.execute("COMMIT")

    # -- reading -------------------------------------------------------------------------------------------------------

    def next_batch(self, after: int | None = None, max_events: int = MAX_EVENTS, max_bytes: int = BATCH_BYTES) -> Batch:
        """Lines after seq `after` (default: the acknowledged one), as many as fit, at least one if there is any.

        What has no content any more, may not be sent or is too large for any collector comes as a `Folded` line (the latter is
        counted as refused, "too_large"). Raises SpoolError: code "spool_short" if the spool does not hold `after`;
        "spool_corrupt" if the file is damaged: it was put aside then, and a new epoch is begun.
        """
        with self._lock:
            try:
                return self._next_batch(after, max_events, max_bytes)
            except SpoolError as error:
                if error.code == "spool_corrupt":
                    with self._speaking():
                        self._begin_anew("spool_corrupt", wall_ms())
                raise

    def _next_batch(self, after: int | None, max_events: int, max_bytes: int) -> Batch:
        with self._speaking():
            db = self._open_db()
            after = self._acked if after is None else after
            prev = self._hash_at(after)
            if prev is None:
                raise SpoolError("spool_short", f"{self.path}: does not hold event {after}", retry=False)
            lines: list[bytes] = []
            size, head, large = 0, prev, []
            for seq, gone, digest, link, data in islice(rows(db, after), max_events):
                line = folded_line(seq, digest) if data is None or gone == REFUSED else data
                if len(line) > MAX_EVENT_BYTES:
                    large.append(seq)
                    line = folded_line(seq, digest)
                size += len(line) + 1
                if lines and size > max_bytes:
                    break
                lines.append(line)
                head = link
            for seq in large:
                self.refuse(seq, "too_large")
            return Batch(self.agent, self.epoch, after + 1, after + len(lines), prev, head, lines)

    def hash_at(self, seq: int) -> bytes | None:
        """hash_seq of the chain, None if the spool does not hold it."""
        with self._lock, self._speaking():
            return self._hash_at(seq)

    def state(self) -> bytes | None:
        """The core's counters as last appended."""
        with self._lock, self._speaking():
            value: bytes | None = read_meta(self._open_db(), "state")
            return value

    def last_code(self) -> str:
        """The event code of the newest event, "" if there is none."""
        with self._lock, self._speaking():
            row = self._open_db().execute("SELECT code FROM link ORDER BY seq DESC LIMIT 1").fetchone()
            return str(row[0]) if row else ""

    @property
    def head(self) -> tuple[int, str]:
        """(seq, hash in hex) of the newest event."""
        with self._lock:
            return self._seq, self._hash.hex()

    @property
    def acknowledged(self) -> int:
        """The newest seq that a receipt covers."""
        return self._acked

    def give_back(self) -> None:
        """Let go of pages of the file that are in memory. Never raises: what is wrong with the file is told by who needs it."""
        with contextlib.suppress(SpoolError), self._lock, self._speaking():
            self._open_db().execute("PRAGMA shrink_memory").fetchall()

    def size(self) -> int:
        """Bytes in use in the file."""
        with self._lock, self._speaking():
            return room.used(self._open_db())

    def stats(self) -> dict[str, Any]:
        """For `status`: how many events are held, of which chain, and what became of the others."""
        with self._lock, self._speaking():
            db = self._open_db()
            counts = dict(db.execute("SELECT gone, count(*) FROM link GROUP BY gone").fetchall())
            return {
                "epoch": self.epoch,
                "first": base_of(db)[0] + 1,
                "last": self._seq,
                "events": counts.get(HELD, 0) + counts.get(REFUSED, 0),
                "acknowledged": self._acked,
                "backlog": self._seq - self._acked,
                "bytes": room.used(db),
                "max_bytes": self.max_bytes,
                "cut": counts.get(CUT, 0),
                "folded": counts.get(FOLDED, 0),
                "refused": counts.get(REFUSED, 0),
                "losses_untold": db.execute("SELECT count(*) FROM lost").fetchone()[0],
            }

    def _settle(self, db: Connection, event: AnyEvent) -> None:
        """An `agent.gap` event tells of a pending loss: from now on the event is its memory."""
        told = event.unmapped.sekisho.lost
        if told is msgspec.UNSET:
            return
        known = [None if value is msgspec.UNSET else value for value in (told.count, told.first_seq, told.last_seq)]
        query = "DELETE FROM lost WHERE reason = ? AND since = ? AND count IS ? AND first IS ? AND last IS ?"
        db.execute(query, (told.reason, told.since, *known))
