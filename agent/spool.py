"""The spool: every event, durable before anyone is told of it, until the collector's signed receipt and while it fits.

Owns: appending (sealing and linking happen here, in the one transaction that also keeps the core's counters), what is
acknowledged, the next batch, and noticing that the file was damaged, rolled back, removed or replaced. The file's layout and
its readers are in `spoolfile.py`, what goes when room is short in `room.py`. Must not know: what events mean, HTTP, private
keys.

SQLite with WAL and synchronous=FULL: `append` returns after fsync(2). One connection, one lock: every method may be called from
any thread. Losses are told through `tell` as `Lost` facts, once a run each, until an `agent.gap` event with the very same range
is appended; whoever is told must only queue the fact, for the lock is held.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from agent import room
from agent.contract import chain, codes
from agent.contract.chain import NotWhole
from agent.contract.event import Event, seal
from agent.contract.wire import MAX_BATCH_BYTES, MAX_EVENT_BYTES, MAX_EVENTS, Head, Receipt, folded_line
from agent.core.facts import Fact, Lost, Tampered
from agent.identity import Identity
from agent.spoolfile import (
    APPLICATION_ID,
    CUT,
    FOLDED,
    FORMAT,
    HELD,
    NAME,
    PAGE,
    REFUSED,
    SCHEMA,
    WALK,
    SpoolError,
    Whole,
    last_seq,
    passing,
    read_events,
    spoken,
    verify,
    walk,
)

__all__ = ["Batch", "Spool", "SpoolError", "Whole", "last_seq", "read_events", "verify"]

LOOK_BACK = 256
"""Events whose links are checked at every start; `verify` checks all."""


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


def wall_ms() -> int:
    """Now, ms since 1970 UTC."""
    return time.time_ns() // 1_000_000


class Spool:
    """An open spool. `epoch` names its chain; `previous` the former one's head {epoch, seq, hash} if this one is new."""

    def __init__(self, path: Path, identity: Identity, max_bytes: int, tell: Callable[[Fact], None]) -> None:
        self.path, self.agent, self.max_bytes = path, identity.agent, max_bytes
        self.epoch = 0
        self.previous: dict[str, Any] = {}
        self._identity, self._tell = identity, tell
        self._lock = threading.RLock()
        self._seq, self._hash, self._acked = 0, b"", 0
        self._told: set[int] = set()
        self._inodes: dict[str, tuple[int, int]] = {}
        self._db: sqlite3.Connection | None = None
        self._guard = -1

    @classmethod
    def open(
        cls,
        state_dir: str | Path,
        identity: Identity,
        max_bytes: int,
        now_ms: int,
        tell: Callable[[Fact], None] = lambda _: None,
    ) -> "Spool":
        """Open the spool in `state_dir`, or begin one with a new epoch, later than any before.

        A file that is damaged, rolled back (head.json knows more than it) or another agent's is kept beside under a telling
        name and told as `Tampered`. Losses that were not told in a former run are told again. Raises SpoolError.
        """
        self = cls(Path(state_dir, NAME), identity, max_bytes, tell)
        try:
            with self._speaking():
                self._claim()
                self._open(now_ms)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let go of the file. Twice does no harm."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None
            if self._guard >= 0:
                os.close(self._guard)
                self._guard = -1

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, events: Iterable[Event], state: bytes | None = None) -> list[bytes]:
        """Seal, link and keep `events` in order, and the core's `state` with them. Durable when it returns.

        Returns the exact bytes of each. Raises SpoolError: then nothing of this call was kept, and it may be repeated with the
        same events if `retry`. An `agent.gap` event settles the pending loss it tells of.
        """
        with self._lock, self._transaction() as db:
            seq, prev = self._seq, self._hash
            links: list[tuple[Any, ...]] = []
            sealed: list[bytes] = []
            for event in events:
                seq += 1
                data = seal(event, seq, self.epoch, prev)
                digest = chain.digest(data)
                prev = chain.link(prev, digest)
                code = event.metadata.event_code
                keep = event.class_uid == codes.FINDING or code == "agent.gap"
                links.append((seq, event.time, event.severity_id, keep, code, digest, prev))
                sealed.append(data)
                if code == "agent.gap":
                    self._settle(db, event)
            columns = "seq, time, severity, keep, code, digest, hash"
            db.executemany(f"INSERT INTO link ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", links)  # noqa: S608
            db.executemany("INSERT INTO content VALUES (?, ?)", enumerate(sealed, self._seq + 1))
            if state is not None:
                _put(db, "state", state)
            if not room.make(db, self.max_bytes, self._acked, seq):
                raise SpoolError(
                    "spool_full",
                    f"{self.path}: is full of findings that no collector took; mend the link or raise agent.spool.max_bytes",
                    retry=True,
                )
            db.execute("COMMIT")
            self._seq, self._hash = seq, prev
            self._tell_losses(db)
            return sealed

    def release(self, last: int, receipt: Receipt) -> None:
        """Everything up to `last` is durable at the collector, by its signed `receipt` (checked): it may be cut for room."""
        with self._lock, self._transaction() as db:
            if last > self._seq:
                raise SpoolError("spool_short", f"{self.path}: ends at {self._seq}, before {last}", retry=False)
            _put(db, "acked", max(last, self._acked))
            _put(db, "receipt", msgspec.json.encode(receipt))
            db.execute("COMMIT")
            self._acked = max(last, self._acked)

    def rewind(self, last: int) -> bool:
        """The collector holds only up to `last` after all (it lost data): what follows counts as unacknowledged again.

        Contents of it that were cut meanwhile can only be sent as digests; they become a loss "collector_lost". False, and
        nothing done, if not even the digests are all here: then only `begin_epoch` helps.
        """
        with self._lock, self._transaction() as db:
            if last < _base(db)[0]:
                return False
            room.count(db, "collector_lost", "seq > ? AND gone = 1", (last,), FOLDED)
            _put(db, "acked", min(last, self._acked))
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
            _put(db, "head", msgspec.json.encode(head))
            db.execute("COMMIT")

    def begin_epoch(self, now_ms: int, reason: str, expected: int) -> None:
        """Put this chain aside (kept as a file) and begin a new one; the core's counters move over.

        For a chain the collector can't continue, since it lost more than the spool can fill. What it lacks of the old chain,
        from seq `expected` on, becomes a loss `reason`.
        """
        with self._lock, self._speaking():
            db = self._open_db()
            state = _get(db, "state")
            row = db.execute("SELECT min(time), max(time) FROM link WHERE seq >= ?", (expected,)).fetchone()
            lost = Lost(at_ms=now_ms, reason=reason, since_ms=row[0] or now_ms, until_ms=row[1] or now_ms)
            lost.first_seq, lost.last_seq, lost.count = expected, self._seq, max(0, self._seq - expected + 1)
            self.previous = {"epoch": self.epoch, "seq": self._seq, "hash": self._hash.hex()}
            floor = self.epoch
            self._put_aside(reason, self.epoch)
            self._create(max(now_ms, floor + 1), state, [lost])
            self._tell_losses(self._open_db())

    def mend(self, now_ms: int) -> None:
        """After `check_alive` found the file gone or replaced: write it anew from the one still open; an intruder is put aside.

        A deleted file lives on while it is open, so no event is lost. Raises SpoolError.
        """
        with self._lock, self._speaking():
            spare = self.path.with_name(f".{NAME}.mend")
            spare.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(spare)) as copy:
                self._open_db().backup(copy)
            # Closed before the new file gets its name: at the last close SQLite unlinks `-wal` and `-shm` by name.
            self._put_aside("foreign", now_ms)
            spare.rename(self.path)
            self._sync_directory()
            self._connect()

    # -- reading -------------------------------------------------------------------------------------------------------

    def next_batch(
        self, after: int | None = None, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BATCH_BYTES // 2
    ) -> Batch:
        """Lines after seq `after` (default: the acknowledged one), as many as fit, at least one if there is any.

        What has no content any more, may not be sent or is too large for any collector comes as a `Folded` line (the latter is
        counted as refused, "too_large"). Raises SpoolError, code "spool_short" if the spool does not hold `after`.
        """
        with self._lock, self._speaking():
            db = self._open_db()
            after = self._acked if after is None else after
            prev = self._hash_at(after)
            if prev is None:
                raise SpoolError("spool_short", f"{self.path}: does not hold event {after}", retry=False)
            lines: list[bytes] = []
            size, head, large = 0, prev, []
            rows = WALK
            for seq, gone, digest, link, data in db.execute(rows + " WHERE seq > ? ORDER BY seq LIMIT ?", (after, max_events)):
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
            value: bytes | None = _get(self._open_db(), "state")
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
                "first": _base(db)[0] + 1,
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

    def check_alive(self) -> str | None:
        """None while the file on disk is the one we write; else a stable code.

        spool_missing, spool_replaced (another inode), spool_altered (its end is not where we left it), spool_corrupt,
        spool_unusable. Cheap: two stat(2) and one row.
        """
        with self._lock:
            for name, inode in self._inodes.items():
                try:
                    seen = os.stat(name)  # noqa: PTH116
                except FileNotFoundError:
                    return "spool_missing"
                except OSError:
                    return "spool_unusable"
                if (seen.st_dev, seen.st_ino) != inode:
                    return "spool_replaced"
            if self._db is None:
                return None
            try:
                end = _end(self._db)
            except sqlite3.Error as error:
                return "spool_unusable" if passing(error) else "spool_corrupt"
            return None if end == (self._seq, self._hash) else "spool_altered"

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self, now_ms: int) -> None:
        known = self._identity.acknowledged()
        why, lost = "", []
        if self.path.exists():
            try:
                why = self._load()
            except sqlite3.Error as error:
                if passing(error):
                    raise
                why = "spool_corrupt"
        elif known:
            why = "spool_missing"
        if self.path.exists() and not why:
            self._tell_losses(self._open_db())
            return
        epoch, seq, digest = self.epoch, self._seq, self._hash
        if epoch and digest:
            self.previous = {"epoch": epoch, "seq": seq, "hash": digest.hex()}
        if known and known.epoch >= epoch:
            self.previous = {"epoch": known.epoch, "seq": known.seq, "hash": known.hash}
        kept_as = self._put_aside(why.removeprefix("spool_"), epoch or now_ms) if self.path.exists() else ""
        if why:
            self._tell(Tampered(at_ms=now_ms, what=why, detail={"kept_as": kept_as, "epoch": epoch, "last_seq": seq}))
        if why in ("spool_corrupt", "spool_missing"):
            # Nobody can know how many were there and not sent.
            first = known.seq + 1 if known and known.epoch >= epoch else None
            lost = [Lost(at_ms=now_ms, reason=why, since_ms=known.at_ms if known else now_ms, until_ms=now_ms, first_seq=first)]
        floor = max([known.epoch if known else 0, epoch, *self._numbers_aside()])
        self._create(max(now_ms, floor + 1), None, lost)
        self._tell_losses(self._open_db())

    def _load(self) -> str:
        """Read an existing spool; "" if it is whole as far as was looked, else why it can't be continued."""
        try:
            self._connect()
        except (TypeError, ValueError, SpoolError):
            return "spool_corrupt"
        db = self._open_db()
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            return "spool_corrupt"
        if db.execute("PRAGMA user_version").fetchone()[0] > FORMAT:
            raise SpoolError("spool_newer", f"{self.path}: is of a newer sekisho-agent; install that one again", retry=False)
        if _get(db, "agent") != self.agent:
            return "spool_foreign"
        base, prev = _base(db)
        look = max(base, self._seq - LOOK_BACK)
        try:
            last, _ = walk(db, self.epoch, look, prev if look == base else self._hash_at(look) or b"")
        except NotWhole:
            return "spool_corrupt"
        if last != self._seq or self._acked > self._seq:
            return "spool_corrupt"
        known = self._identity.acknowledged()
        if known and known.epoch >= self.epoch:
            # The collector acknowledged more than is here: this is an older copy, and going on would fork the chain.
            ours = self._hash_at(known.seq)
            if known.epoch > self.epoch or known.seq > self._seq or (ours and ours.hex() != known.hash):
                return "spool_rolled_back"
        if self._seq == 0:
            # Begun, but stopped before the first event could name the former epoch: it still has to be named.
            self.previous = msgspec.json.decode(_get(db, "previous"))
        return ""

    def _claim(self) -> None:
        """One writer only: two would fork the chain. flock(2), on a file of its own as SQLite locks the spool itself."""
        path = self.path.with_name(NAME + ".lock")
        self._guard = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolError(
                "spool_busy", f"{self.path}: another sekisho-agent is using it; stop that one first", retry=False
            ) from None

    def _create(self, epoch: int, state: bytes | None, losses: list[Lost]) -> None:
        """Make an empty spool. It gets its name only when it is whole: a crash before leaves none."""
        spare = self.path.with_name(f".{NAME}.new")
        spare.unlink(missing_ok=True)
        os.close(os.open(spare, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        with contextlib.closing(sqlite3.connect(spare, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {PAGE}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.executescript("BEGIN;" + SCHEMA)
            _put(db, "agent", self.agent)
            _put(db, "epoch", epoch)
            _put(db, "base_seq", 0)
            _put(db, "base_hash", chain.genesis(self.agent, epoch))
            _put(db, "acked", 0)
            _put(db, "previous", msgspec.json.encode(self.previous))
            if state is not None:
                _put(db, "state", state)
            for lost in losses:
                row = (lost.reason, lost.since_ms, lost.until_ms, lost.count, lost.first_seq, lost.last_seq)
                db.execute("INSERT INTO lost (reason, since, until, count, first, last) VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("COMMIT")
        spare.rename(self.path)
        self._sync_directory()
        self._told.clear()
        self._connect()

    def _connect(self) -> None:
        """Open the file and take over its numbers, if it is ours so far."""
        self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        # The -wal is not counted in max_bytes: kept small. Temporary tables in memory: there may be no room on disk for them.
        frames = max(16, min(1000, self.max_bytes // 16 // PAGE))
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "temp_store = MEMORY",
            "cache_size = -1024",
            f"wal_autocheckpoint = {frames}",
            f"journal_size_limit = {frames * PAGE}",
        ):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        if self._db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,):
            self.epoch, self._acked = int(_get(self._db, "epoch")), int(_get(self._db, "acked"))
            self._seq, self._hash = _end(self._db)
        self._inodes = {}
        for name in (str(self.path), f"{self.path}-wal"):
            with contextlib.suppress(FileNotFoundError):
                seen = os.stat(name)  # noqa: PTH116
                self._inodes[name] = (seen.st_dev, seen.st_ino)

    def _put_aside(self, word: str, number: int) -> str:
        """Close; spool.db → spool.db.WORD-NUMBER, with its -wal. The new name, "" if there was no file."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        while self.path.with_name(f"{NAME}.{word}-{number}").exists():
            number += 1
        name = f"{NAME}.{word}-{number}"
        for tail in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(NAME + tail).rename(self.path.with_name(name + tail))
        return name if self.path.with_name(name).exists() else ""

    def _numbers_aside(self) -> Iterator[int]:
        for path in self.path.parent.glob(f"{NAME}.*-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit():
                yield int(number)

    def _sync_directory(self) -> None:
        handle = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _open_db(self) -> sqlite3.Connection:
        if self._db is None:
            raise SpoolError("spool_closed", f"{self.path}: is closed; restart the agent", retry=False)
        return self._db

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise spoken(error, self.path) from None
        except OSError as error:
            raise SpoolError(
                "spool_unusable", f"{self.path}: can't be used ({error.strerror}); mend the disk", retry=True
            ) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The body commits; whatever leaves it otherwise is rolled back."""
        with self._speaking():
            db = self._open_db()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _hash_at(self, seq: int) -> bytes | None:
        db = self._open_db()
        base = _base(db)
        if seq == base[0]:
            return base[1]
        row = db.execute("SELECT CAST(hash AS BLOB) FROM link WHERE seq = ?", (seq,)).fetchone()
        return bytes(row[0]) if row else None

    def _tell_losses(self, db: sqlite3.Connection) -> None:
        """Hand out losses that were not handed out in this run."""
        query = "SELECT id, reason, since, until, count, first, last FROM lost ORDER BY id"
        for row, reason, since, until, count, first, last in db.execute(query).fetchall():
            if row not in self._told:
                self._told.add(row)
                lost = Lost(at_ms=wall_ms(), reason=reason, since_ms=since, until_ms=until, count=count)
                lost.first_seq, lost.last_seq = first, last
                self._tell(lost)

    def _settle(self, db: sqlite3.Connection, event: Event) -> None:
        """An `agent.gap` event tells of a pending loss: from now on the event is its memory."""
        told = event.unmapped.sekisho.lost
        if told is msgspec.UNSET:
            return
        known = [None if value is msgspec.UNSET else value for value in (told.count, told.first_seq, told.last_seq)]
        query = "DELETE FROM lost WHERE reason = ? AND since = ? AND count IS ? AND first IS ? AND last IS ?"
        db.execute(query, (told.reason, told.since, *known))


def _get(db: sqlite3.Connection, key: str) -> Any:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row[0] if row else None


def _put(db: sqlite3.Connection, key: str, value: object) -> None:
    db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))


def _base(db: sqlite3.Connection) -> tuple[int, bytes]:
    """(seq, hash) just before the first link held."""
    seq, digest = _get(db, "base_seq"), _get(db, "base_hash")
    if not isinstance(seq, int) or not isinstance(digest, bytes):
        raise SpoolError("spool_corrupt", "the spool does not know where its chain starts; restart the agent", retry=False)
    return seq, digest


def _end(db: sqlite3.Connection) -> tuple[int, bytes]:
    """(seq, hash) of the newest link."""
    row = db.execute("SELECT seq, CAST(hash AS BLOB) FROM link ORDER BY seq DESC LIMIT 1").fetchone()
    return (int(row[0]), bytes(row[1])) if row else _base(db)
