"""Where a spool lives: opening its file or beginning one, one writer only, and what to do when the file is not what it was.

Owns: the connection and its lock, the epoch, the files put aside (`spool.db.corrupt-…`, `.rolled_back-…`, `.foreign-…`), and
noticing that the file was damaged, rolled back, removed or replaced, before or while we write. Nothing is ever deleted: it is
put aside and told. Must not know: what is appended or sent (`spool.py`).
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from agent.contract import chain
from agent.contract.chain import NotWhole
from agent.core.facts import Fact, Lost, Tampered
from agent.identity import Identity
from agent.spoolfile import APPLICATION_ID, FORMAT, NAME, PAGE, SCHEMA, SpoolError, passing, spoken, walk

RESERVE = "spool.reserve"
"""A file as large as the -wal may be. On a full disk it makes way, so that the log can still be moved into the spool."""
LOOK_BACK = 256
"""Events whose links are checked at every start; `verify` checks all."""


def wall_ms() -> int:
    """Now, ms since 1970 UTC."""
    return time.time_ns() // 1_000_000


class SpoolHome:
    """The file, open. `epoch` names its chain; `previous` the former one's head {epoch, seq, hash} if this one is new."""

    def __init__(self, path: Path, identity: Identity, max_bytes: int, tell: Callable[[Fact], None]) -> None:
        self.path, self.agent, self.max_bytes = path, identity.agent, max_bytes
        self.epoch = 0
        self.previous: dict[str, Any] = {}
        self._identity, self._tell = identity, tell
        self._lock = threading.RLock()
        self._seq, self._hash, self._acked = 0, b"", 0
        self._format = FORMAT
        self._told: set[tuple[object, ...]] = set()
        self._hushed = False
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
    ) -> Self:
        """Open the spool in `state_dir`, or begin one with a new epoch, later than any before.

        A file that is damaged, rolled back (head.json knows more than it) or another agent's is kept beside under a telling
        name and told as `Tampered`. Losses that were not told in a former run are told again. Raises SpoolError.
        """
        self = cls(Path(state_dir, NAME), identity, max_bytes, tell)
        try:
            if cloned := identity.tampered(now_ms):
                tell(cloned)
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

    def check_alive(self) -> str | None:
        """None while the file on disk is the one we write; else a stable code. Cheap: two stat(2) and one row.

        spool_missing, spool_replaced (another inode): told once, as the file is written anew at once from the one still open,
        so that no event is lost. spool_altered (its end is not where we left it), spool_corrupt, spool_unusable: told while it
        is so.
        """
        with self._lock:
            found = self._look()
            self._reserve()
            if found in ("spool_missing", "spool_replaced"):
                try:
                    with self._speaking():
                        self._mend(wall_ms())
                except SpoolError:
                    return found  # no room for it now: it is told, and tried again next time
            return found

    def _look(self) -> str | None:
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
            found = end_of(self._db)
        except sqlite3.Error as error:
            return "spool_unusable" if passing(error) else "spool_corrupt"
        except SpoolError as error:
            return error.code
        return None if found == (self._seq, self._hash) else "spool_altered"

    def _mend(self, now_ms: int) -> None:
        """Write the file anew from the deleted one, which lives on while it is open; an intruder is put aside."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the whole state directory may have been removed
        spare = self._make_file("mend")
        with contextlib.closing(sqlite3.connect(spare)) as copy:
            self._open_db().backup(copy)
        # Closed before the new file gets its name: at the last close SQLite unlinks `-wal` and `-shm` by name.
        self._put_aside("foreign", now_ms)
        spare.rename(self.path)
        self._sync_directory()
        self._connect()

    def _make_file(self, word: str) -> Path:
        """An empty file beside the spool, for its owner alone."""
        spare = self.path.with_name(f".{NAME}.{word}")
        spare.unlink(missing_ok=True)
        os.close(os.open(spare, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return spare

    def _open(self, now_ms: int) -> None:
        why = ""
        if self.path.exists():
            try:
                why = self._load()
            except sqlite3.Error as error:
                if passing(error):
                    raise
                why = "spool_corrupt"
            except (TypeError, ValueError):  # the sqlite3 module can't decode it, or it is of another type than ours
                why = "spool_corrupt"
        elif self._identity.acknowledged():
            why = "spool_missing"
        if self.path.exists() and not why:
            self._tell_losses(self._open_db())
        else:
            self._begin_anew(why, now_ms)

    def _begin_anew(self, why: str, now_ms: int) -> None:
        """Put what is there aside, say so, and begin a new epoch that names the last head known. `why` "": the first start."""
        known, lost = self._identity.acknowledged(), []
        epoch, seq, digest = self.epoch, self._seq, self._hash
        if epoch and digest:
            self.previous = {"epoch": epoch, "seq": seq, "hash": digest.hex()}
        if known and (known.epoch, known.seq) > (epoch, seq):
            self.previous = {"epoch": known.epoch, "seq": known.seq, "hash": known.hash}
        state = None
        if self._db is not None and why != "spool_foreign":
            with contextlib.suppress(sqlite3.Error, ValueError):
                state = read_meta(self._db, "state")
        kept_as = self._put_aside(why.removeprefix("spool_"), epoch or now_ms) if self.path.exists() else ""
        if why:
            self._tell(Tampered(at_ms=now_ms, what=why, detail={"kept_as": kept_as, "epoch": epoch, "last_seq": seq}))
        if why in ("spool_corrupt", "spool_missing"):
            # Nobody can know how many were there and not sent.
            first = known.seq + 1 if known and known.epoch >= epoch else None
            lost = [Lost(at_ms=now_ms, reason=why, since_ms=known.at_ms if known else now_ms, until_ms=now_ms, first_seq=first)]
        floor = max([known.epoch if known else 0, epoch, *self._numbers_aside()])
        self._create(max(now_ms, floor + 1), state, lost)
        self._tell_losses(self._open_db())

    def _load(self) -> str:
        """Read an existing spool; "" if it is whole as far as was looked, else why it can't be continued."""
        try:
            self._connect()
        except SpoolError:
            return "spool_corrupt"
        db = self._open_db()
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            return "spool_corrupt"
        (self._format,) = db.execute("PRAGMA user_version").fetchone()
        if self._format > FORMAT:
            raise SpoolError("spool_newer", f"{self.path}: is of a newer sekisho-agent; install that one again", retry=False)
        if read_meta(db, "agent") != self.agent:
            return "spool_foreign"
        base, prev = base_of(db)
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
            self.previous = msgspec.json.decode(read_meta(db, "previous"))
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
        spare = self._make_file("new")
        with contextlib.closing(sqlite3.connect(spare, isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size = {PAGE}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            db.executescript("BEGIN;" + SCHEMA)
            write_meta(db, "agent", self.agent)
            write_meta(db, "epoch", epoch)
            write_meta(db, "base_seq", 0)
            write_meta(db, "base_hash", chain.genesis(self.agent, epoch))
            write_meta(db, "acked", 0)
            write_meta(db, "previous", msgspec.json.encode(self.previous))
            if state is not None:
                write_meta(db, "state", state)
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
        frames = self._log_bytes() // PAGE
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
            self.epoch, self._acked = int(read_meta(self._db, "epoch")), int(read_meta(self._db, "acked"))
            self._seq, self._hash = end_of(self._db)
        self._reserve()
        self._inodes = {}
        for name in (str(self.path), f"{self.path}-wal"):
            with contextlib.suppress(FileNotFoundError):
                seen = os.stat(name)  # noqa: PTH116
                self._inodes[name] = (seen.st_dev, seen.st_ino)

    def _log_bytes(self) -> int:
        """How large the -wal may be, about."""
        return max(16, min(1000, self.max_bytes // 16 // PAGE)) * PAGE

    def _reserve(self) -> None:
        """Take the reserve, if it is not there and there is room for it."""
        path = self.path.with_name(RESERVE)
        if path.exists():
            return
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._log_bytes())
            finally:
                os.close(fd)
        except OSError:  # tried again with the next look at the spool; what a full disk means is told by what can't be written
            path.unlink(missing_ok=True)

    def _spend_reserve(self) -> None:
        self.path.with_name(RESERVE).unlink(missing_ok=True)

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
        except UnicodeDecodeError:
            raise SpoolError("spool_corrupt", f"{self.path}: is damaged; it is put aside", retry=False) from None
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
        base = base_of(db)
        if seq == base[0]:
            return base[1]
        row = db.execute("SELECT CAST(hash AS BLOB) FROM link WHERE seq = ?", (seq,)).fetchone()
        return bytes(row[0]) if row else None

    def _tell_losses(self, db: sqlite3.Connection) -> None:
        """Hand out losses that were not handed out in this run. SQLite gives the id of a row that went to a later one."""
        if self._hushed:
            return
        rows = db.execute("SELECT id, reason, since, until, count, first, last FROM lost ORDER BY id").fetchall()
        self._told.intersection_update(rows)
        for row in rows:
            if row not in self._told:
                self._told.add(row)
                _, reason, since, until, count, first, last = row
                lost = Lost(at_ms=wall_ms(), reason=reason, since_ms=since, until_ms=until, count=count)
                lost.first_seq, lost.last_seq = first, last
                self._tell(lost)


def losses(db: sqlite3.Connection) -> list[Lost]:
    """Those no event tells of yet."""
    found = []
    for reason, since, until, count, first, last in db.execute(
        "SELECT reason, since, until, count, first, last FROM lost ORDER BY id"
    ):
        lost = Lost(at_ms=wall_ms(), reason=reason, since_ms=since, until_ms=until, count=count)
        lost.first_seq, lost.last_seq = first, last
        found.append(lost)
    return found


def read_meta(db: sqlite3.Connection, key: str) -> Any:
    """One value of the table `meta`, None if it is not there."""
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row[0] if row else None


def write_meta(db: sqlite3.Connection, key: str, value: object) -> None:
    """Set one value of the table `meta`."""
    db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))


def base_of(db: sqlite3.Connection) -> tuple[int, bytes]:
    """(seq, hash) just before the first link held."""
    seq, digest = read_meta(db, "base_seq"), read_meta(db, "base_hash")
    if not isinstance(seq, int) or not isinstance(digest, bytes):
        raise SpoolError("spool_corrupt", "the spool does not know where its chain starts; restart the agent", retry=False)
    return seq, digest


def end_of(db: sqlite3.Connection) -> tuple[int, bytes]:
    """(seq, hash) of the newest link."""
    row = db.execute("SELECT seq, CAST(hash AS BLOB) FROM link ORDER BY seq DESC LIMIT 1").fetchone()
    return (int(row[0]), bytes(row[1])) if row else base_of(db)
