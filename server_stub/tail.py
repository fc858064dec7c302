"""From a cursor to frames: what a live reader gets, in order, without a silent gap.

Owns: the Server-Sent Events form (`id:` is the cursor, the `pos` of an event), where a reader begins, and gap frames:
for events of which only the digest is here, for a cursor beyond the log (it was restored from a backup), and for
events passed over because the reader asked not to be kept further behind than `max_behind`. A slow reader costs the
collector only its cursor, never a buffer: what it has not taken yet is read from the store when it comes for it.
Must not know HTTP; the store, the filter and the bell are handed in.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from server_stub import query
from server_stub.query import Filter

KEEP_ALIVE_S = 15.0
PAGE = 500
"""Events read at once."""
SPAN = 50_000
"""Positions looked through at once, so that a rare filter does not hold a thread for long."""


class Gap(Struct, omit_defaults=True):
    """Data of `event: gap`: why events are missing here, how many (if known), whose (if of one agent)."""

    reason: str
    count: int | None = None
    agent: str | None = None


class Bell:
    """Wakes all who wait in one event loop. Take `next()` before looking, then wait for it: no ring is missed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """What the next ring sets."""
        return self._event

    def ring(self) -> None:
        """Wake everyone who holds the current event."""
        rung, self._event = self._event, asyncio.Event()
        rung.set()

    @staticmethod
    async def wait(event: asyncio.Event, timeout_s: float) -> bool:
        """Whether it rang in time."""
        try:
            await asyncio.wait_for(event.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


def event_frame(pos: int, raw: bytes) -> bytes:
    """One event: its exact bytes as data. They hold no line break: NDJSON brought them."""
    return b"id: %d\ndata: %s\n\n" % (pos, raw)


def cursor_frame(pos: int) -> bytes:
    """Moves a reader's Last-Event-ID and dispatches nothing (HTML, 9.2.6: an empty data buffer); keeps the line alive."""
    return b": \nid: %d\n\n" % pos


def gap_frame(pos: int, gap: Gap) -> bytes:
    """Something was skipped before `pos`, or at it."""
    return b"event: gap\nid: %d\ndata: %s\n\n" % (pos, msgspec.json.encode(gap))


def frames(rows: list[tuple[Any, ...]]) -> Iterator[bytes]:
    """Frames of rows `(pos, raw, folded, agent)`; neighbouring folded events of one agent are one gap."""
    missing: tuple[int, str, int] | None = None
    for pos, raw, folded, agent in rows:
        if missing and not (folded and missing[1] == agent):
            yield gap_frame(missing[0], Gap("folded", missing[2], missing[1]))
            missing = None
        if folded:
            missing = (pos, agent, missing[2] + 1 if missing else 1)
        else:
            yield event_frame(pos, raw)
    if missing:
        yield gap_frame(missing[0], Gap("folded", missing[2], missing[1]))


Read = Callable[[str, list[Any]], Any]
"""`await read(sql, values)` → rows, in a thread."""


async def follow(
    wanted: Filter,
    *,
    read: Read,
    size: Callable[[], int],
    bell: Bell,
    stopping: Callable[[], bool],
    cursor: int | None = None,
    last: int = 0,
    begin: int | None = None,
    max_behind: int | None = None,
    dialect: query.Dialect = query.SQLITE,
) -> AsyncIterator[bytes]:
    """Frames for one reader until `stopping`. From `cursor` on if it has one, else its `last` events before `begin` (default:
    the log's size) and what comes."""
    if cursor is None:
        cursor = size() if begin is None else begin
        if last:
            sql, values = query.sql(wanted, after=None, descending=True, limit=last, upto=cursor, dialect=dialect)
            for pos, raw in reversed(await read(sql, values)):
                yield event_frame(pos, raw)
    elif cursor > size():
        yield gap_frame(size(), Gap("the log is shorter than this cursor: it was restored from an older state"))
        cursor = size()
    yield cursor_frame(cursor)
    clock = asyncio.get_running_loop().time
    spoken_at = clock()
    while not stopping():
        if clock() - spoken_at >= KEEP_ALIVE_S:
            # Nothing for this reader, however much came for others: it must hear that the line is alive, and how far it is.
            yield cursor_frame(cursor)
            spoken_at = clock()
        rung = bell.next()
        newest = size()
        if max_behind is not None and newest - cursor > max_behind:
            yield gap_frame(newest, Gap("behind", newest - cursor))
            cursor = newest
        if cursor == newest:
            await Bell.wait(rung, KEEP_ALIVE_S - (clock() - spoken_at))
            continue
        upto = min(newest, cursor + SPAN)
        sql, values = query.tail(wanted, after=cursor, upto=upto, limit=PAGE, dialect=dialect)
        rows = await read(sql, values)
        if rows:
            yield b"".join(frames(rows))
            spoken_at = clock()
        cursor = rows[-1][0] if len(rows) == PAGE else upto
