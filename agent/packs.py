"""Contents of the spool: the exact bytes of events, many in a row packed into one piece.

Owns: the table `content(seq, bytes)`, and reading, cutting and folding single events in it. A row holds either the bytes of
the event `seq` as they are (they begin with `{`), or a pack: zlib over the bytes of `seq`, `seq` + 1, …, one a line; an empty
line is an event whose content went. Only what comes many at once is packed: events of a storm are nearly alike, so that
2,000 bytes become 160, and a page of the file holds 20 of them, not one. A spool of the first layout is one without packs.
Must not know the chain, or why something goes. All within the caller's transaction.
"""

import zlib
from collections.abc import Iterable, Iterator
from sqlite3 import Connection

MOST = 128
"""Events of a pack: zlib's window is 32 KiB, so that more together are hardly smaller, and one that is cut is packed anew."""
_MOST_BYTES = 1 << 20
_FEW = 16
_LEVEL = 1  # 5 µs an event; higher ones take longer and make it 3 % smaller
_ZLIB = b"\x78"
_ROW = "CAST(bytes AS BLOB)"  # an intruder's UPDATE may leave text where bytes were


def write(db: Connection, first: int, events: list[bytes]) -> None:
    """Keep the bytes of events `first`, `first` + 1, …"""
    if len(events) < _FEW:
        db.executemany("INSERT INTO content VALUES (?, ?)", enumerate(events, first))
        return
    for at in range(0, len(events), MOST):
        some = events[at : at + MOST]
        if sum(map(len, some)) > _MOST_BYTES:
            db.executemany("INSERT INTO content VALUES (?, ?)", enumerate(some, first + at))
        else:
            db.execute("INSERT INTO content VALUES (?, ?)", (first + at, _packed(some)))


def read(db: Connection, after: int = 0) -> Iterator[tuple[int, bytes]]:
    """(seq, exact bytes) of the events after seq `after` whose content is here, in order."""
    query = f"SELECT seq, {_ROW} FROM content WHERE seq >= ? ORDER BY seq"  # noqa: S608
    for first, data in db.execute(query, (_row_of(db, after + 1),)):
        for seq, event in enumerate(_events(data), first):
            if seq > after and event:
                after = seq  # also where an intruder's rows overlap
                yield seq, event


def drop_oldest(db: Connection, until: int, few: int) -> list[int]:
    """Drop about `few` of the oldest contents up to seq `until`, of packs all up to there. Returns which."""
    gone: list[int] = []
    query = f"SELECT seq, {_ROW} FROM content WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT 1"  # noqa: S608
    first = 0
    while len(gone) < few and (row := db.execute(query, (first, until)).fetchone()):
        some = [seq for seq, event in enumerate(_events(row[1]), row[0]) if event and seq <= until]
        drop(db, some)
        gone += some
        first = row[0] + 1
    return gone


def drop(db: Connection, seqs: Iterable[int]) -> None:
    """Drop the contents of events `seqs`; of a pack, the others stay."""
    going = sorted(seqs)
    while going:
        first = _row_of(db, going[0])
        row = db.execute(f"SELECT {_ROW} FROM content WHERE seq = ?", (first,)).fetchone()  # noqa: S608
        events = _events(row[0]) if row else []
        here = [seq for seq in going if seq < first + len(events)]
        for seq in here:
            events[seq - first] = b""
        if not any(events):
            db.execute("DELETE FROM content WHERE seq = ?", (first,))
        elif here:
            db.execute("UPDATE content SET bytes = ? WHERE seq = ?", (_packed(events), first))
        going = going[max(1, len(here)) :]


def _row_of(db: Connection, seq: int) -> int:
    """The row that may hold event `seq`: the last that begins no later."""
    (first,) = db.execute("SELECT max(seq) FROM content WHERE seq <= ?", (seq,)).fetchone()
    return seq if first is None else int(first)


def _packed(events: list[bytes]) -> bytes:
    return zlib.compress(b"\n".join(events), _LEVEL)


def _events(data: bytes) -> list[bytes]:
    """The events of a row; one that is damaged or no pack is one event: its digest will tell."""
    if data[:1] != _ZLIB:
        return [data]
    try:
        unpacking = zlib.decompressobj()
        lines = unpacking.decompress(data, _MOST_BYTES + MOST)
    except zlib.error:
        return [data]
    return lines.split(b"\n") if unpacking.eof else [data]
