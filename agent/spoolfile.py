"""The spool's file: its schema, its errors, and all that another process may do with it: read, and verify.

Owns: the layout of `spool.db`, what SQLite's errors mean to us, and the walk along a chain on disk. Must not know how events
get in (`spool.py`) or what goes when room is short (`room.py`). Readers open it read-only, beside a running agent, in one
snapshot.

    link(seq, time, severity, keep, code, gone, digest, hash)      the chain, one row an event
    content(seq, bytes)                                             the exact bytes, while they are here (`packs.py`)
    lost(id, reason, since, until, count, first, last)              losses no `agent.gap` event tells of yet
    meta(key, value)                                                agent, epoch, where the chain starts, newest head and
    receipt gone: 0 held, 1 cut after a receipt, 2 folded and counted, 3 refused by the collector and counted (sent as its
    digest)
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
from msgspec import Struct

from agent import identity, packs
from agent.contract import chain
from agent.contract.chain import NotWhole
from agent.contract.wire import Head, Receipt

NAME = "spool.db"
HELD, CUT, FOLDED, REFUSED = range(4)
APPLICATION_ID = 0x53454B49  # "SEKI": file(1) and `open` tell a spool from another SQLite file by it
FORMAT = 2
"""1: no packs. The same reader reads both."""
PAGE = 4096
SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE link (seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, severity INTEGER NOT NULL, keep INTEGER NOT NULL,
                   code TEXT NOT NULL, gone INTEGER NOT NULL DEFAULT 0, digest BLOB NOT NULL, hash BLOB NOT NULL);
CREATE TABLE content (seq INTEGER PRIMARY KEY, bytes BLOB NOT NULL);
CREATE TABLE lost (id INTEGER PRIMARY KEY, reason TEXT NOT NULL, since INTEGER NOT NULL, until INTEGER NOT NULL,
                   count INTEGER, first INTEGER, last INTEGER);
"""

# Cast, as an intruder's UPDATE may leave text where bytes were.
_LINKS = "SELECT seq, gone, CAST(digest AS BLOB), CAST(hash AS BLOB) FROM link WHERE seq > ? ORDER BY seq"
_NO_MORE = (1 << 63, b"")

# Result codes after which the same call may work later: the disk is full, failing or read-only, or another process writes.
_RETRY = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
}


class SpoolError(Exception):
    """The spool can't do it; nothing was half-written. `code` is stable; `retry`: the same call may work later."""

    def __init__(self, code: str, sentence: str, *, retry: bool) -> None:
        super().__init__(sentence)
        self.code, self.retry = code, retry


class Whole(Struct, frozen=True):
    """What `verify` found whole: links `first`..`last` of an epoch, how many of them are digests only.

    `vouched` is the newest seq that a checked signature (of a batch head or a receipt) names; 0 if there was none.
    """

    agent: str
    epoch: int
    first: int
    last: int
    digests: int
    vouched: int


class _Stamp(Struct):
    seq: int = 0
    epoch: int = 0
    prev: str = ""


class _Unmapped(Struct):
    sekisho: _Stamp


class _Metadata(Struct):
    sequence: int = 0


class _Linked(Struct):
    unmapped: _Unmapped
    metadata: _Metadata


_linked = msgspec.json.Decoder(_Linked)


def primary(error: sqlite3.Error) -> int:
    """SQLite's primary result code (https://sqlite.org/rescode.html), 0 if it has none."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def passing(error: sqlite3.Error) -> bool:
    """Whether the same call may work later."""
    return primary(error) in _RETRY


def spoken(error: sqlite3.Error, path: Path) -> SpoolError:
    """SQLite's error as ours."""
    code = primary(error)
    if code == sqlite3.SQLITE_FULL:
        return SpoolError(
            "disk_full", f"{path}: the disk is full; free some space, events wait in memory meanwhile", retry=True
        )
    if code == sqlite3.SQLITE_READONLY:
        return SpoolError("disk_read_only", f"{path}: the file system is read-only; mend the disk and remount it", retry=True)
    if code in _RETRY:
        return SpoolError("disk_failing", f"{path}: can't be used now ({error}); look at the disk", retry=True)
    return SpoolError("spool_corrupt", f"{path}: is damaged ({error}); restart the agent, it keeps it aside", retry=False)


def rows(db: sqlite3.Connection, after: int) -> Iterator[tuple[int, int, bytes, bytes, bytes | None]]:
    """(seq, gone, digest, hash, exact bytes if they are here) of each link after seq `after`."""
    contents = packs.read(db, after)
    at, data = next(contents, _NO_MORE)
    for seq, gone, digest, link in db.execute(_LINKS, (after,)):
        while at < seq:
            at, data = next(contents, _NO_MORE)
        yield seq, gone, digest, link, data if at == seq else None


def _stray(db: sqlite3.Connection) -> int | None:
    """The first content that no link belongs to."""
    links = (int(seq) for (seq,) in db.execute("SELECT seq FROM link ORDER BY seq"))
    link = next(links, _NO_MORE[0])
    for seq, _ in packs.read(db):
        while link < seq:
            link = next(links, _NO_MORE[0])
        if link != seq:
            return seq
    return None


def walk(db: sqlite3.Connection, epoch: int, base: int, prev: bytes) -> tuple[int, int]:
    """Follow the chain from (`base`, `prev`) to its end: (last seq, how many are digests only). Raises NotWhole."""
    digests = 0
    for seq, gone, digest, link, data in rows(db, base):
        if seq != base + 1:
            raise NotWhole(f"event {base + 1} is missing", base + 1)
        if data is not None:
            if chain.digest(data) != digest:
                raise NotWhole(f"event {seq} was altered", seq)
            _fits(data, seq, epoch, prev)
        elif gone == HELD:
            raise NotWhole(f"the content of event {seq} was removed", seq)
        else:
            digests += 1
        prev = chain.link(prev, digest)
        if prev != link:
            raise NotWhole(f"event {seq} does not follow the one before it", seq)
        base = seq
    return base, digests


def _fits(data: bytes, seq: int, epoch: int, prev: bytes) -> None:
    """The event itself must say where it stands, or it was moved here from elsewhere."""
    try:
        event = _linked.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise NotWhole(f"event {seq} can't be read", seq) from None
    stamp = event.unmapped.sekisho
    if (stamp.seq, event.metadata.sequence, stamp.epoch, stamp.prev) != (seq, seq, epoch, prev.hex()):
        raise NotWhole(f"event {seq} says it stands elsewhere in the chain", seq)


@contextlib.contextmanager
def _reading(state_dir: str | Path) -> Iterator[sqlite3.Connection]:
    path = Path(state_dir, NAME)
    if not path.exists():
        raise SpoolError("spool_missing", f"{path}: there is no spool; has the agent ever run here?", retry=False)
    try:
        with contextlib.closing(connect_read_only(path)) as db:
            if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                raise SpoolError("spool_corrupt", f"{path}: is not a spool; see what replaced it", retry=False)
            db.execute("BEGIN")  # one snapshot, while the agent goes on writing
            yield db
    except sqlite3.Error as error:
        raise spoken(error, path) from None
    except (TypeError, ValueError) as error:
        # A flipped bit in the schema or a value: the sqlite3 module can't decode it, or it is of another type than ours.
        raise SpoolError(
            "spool_corrupt", f"{path}: is damaged ({type(error).__name__}); restart the agent", retry=False
        ) from None


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection by which nothing can be changed. Raises sqlite3.Error."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)


def verify(state_dir: str | Path, public_key: bytes | None = None) -> Whole:
    """Check the whole chain in `state_dir`. Raises NotWhole (`seq`: the first bad event), SpoolError, IdentityError.

    Beside the links: with the agent's `public_key` the newest signed batch head must fit, with the pinned collector's key its
    newest receipt, and head.json. So neither can the tail be cut off up to there, nor the chain be made anew without the keys.
    """
    found = identity.load(state_dir) if public_key else None
    pinned = found.pinned() if found else None
    known = found.acknowledged() if found else None
    with _reading(state_dir) as db:
        try:
            meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
            agent, epoch, base, start = meta["agent"], int(meta["epoch"]), int(meta["base_seq"]), bytes(meta["base_hash"])
            acked = int(meta["acked"])
            head = msgspec.json.decode(meta["head"], type=Head) if "head" in meta else None
            receipt = msgspec.json.decode(meta["receipt"], type=Receipt) if "receipt" in meta else None
        except (KeyError, TypeError, ValueError, msgspec.MsgspecError):
            raise NotWhole("the spool's own numbers are damaged") from None
        if base == 0 and start != chain.genesis(agent, epoch):
            raise NotWhole("the start of the chain does not fit the agent and epoch", 1)
        last, digests = walk(db, epoch, base, start)
        stray = _stray(db)
        if stray is not None:
            raise NotWhole(f"event {stray} is there, but its link was removed", stray)
        claims: list[tuple[int, str, str]] = []
        if public_key and head:
            chain.check(chain.head_bytes(head), head.sig, public_key)
            _same_chain("the signed head", (head.agent, head.epoch), (agent, epoch))
            claims.append((head.last, head.hash, "the signed head"))
        if pinned and receipt:
            chain.check_any(chain.receipt_bytes(receipt), receipt.sig, pinned.kept_keys)
            _same_chain("the collector's receipt", (receipt.agent, receipt.epoch), (agent, epoch))
            claims.append((receipt.last, receipt.hash, "the collector's receipt"))
        vouched = max((claim[0] for claim in claims), default=0)
        if known and known.epoch > epoch:
            raise NotWhole("head.json names a later epoch: this spool was replaced by an older one")
        if known and known.epoch == epoch:
            claims.append((known.seq, known.hash, "head.json"))
        for seq, said, who in sorted(claims):
            if seq > last:
                raise NotWhole(f"the tail was cut off: {who} names event {seq}, the spool ends at {last}", last + 1)
            row = (
                (start,) if seq == base else db.execute("SELECT CAST(hash AS BLOB) FROM link WHERE seq = ?", (seq,)).fetchone()
            )
            if row is not None and bytes(row[0]).hex() != said:
                raise NotWhole(f"the chain up to event {seq} is not the one that {who} names", seq)
        if acked > last:
            raise NotWhole(f"the tail was cut off: event {acked} was acknowledged, the spool ends at {last}", last + 1)
        return Whole(agent, epoch, base + 1, last, digests, vouched)


def _same_chain(who: str, said: tuple[str, int], ours: tuple[str, int]) -> None:
    if said != ours:
        raise NotWhole(f"{who} is of another chain")


def last_seq(state_dir: str | Path) -> int:
    """The newest event's seq, 0 if there is none. Raises SpoolError."""
    with _reading(state_dir) as db:
        row = db.execute("SELECT seq FROM link ORDER BY seq DESC LIMIT 1").fetchone()
    return int(row[0]) if row else 0


def read_events(state_dir: str | Path, after: int = 0, count: int = -1) -> Iterator[tuple[int, bytes]]:
    """(seq, exact bytes) of at most `count` events after seq `after`, oldest first. Raises SpoolError.

    Those of which only the digest is left are passed over; an `agent.gap` event counts them.
    """
    while count:
        with _reading(state_dir) as db:
            some = list(islice(packs.read(db, after), min(count, 512) if count > 0 else 512))
        yield from some
        count -= len(some) if count > 0 else 0
        if len(some) < 512:
            return
        after = some[-1][0]
