"""A bundle's lines checked in shares, one for each processor, and what the shares found put together again.

Owns: reading the members of a ZIP as lines and hashes, which batches are whose, the processes, and joining their subtrees,
times and first complaints into one answer, the same as a single walk would give. Must not know: where keys are from, words,
exit codes.
"""

import multiprocessing
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import IO, Any

import msgspec
from msgspec import Struct

from agent.contract import wire
from server_stub import bundle
from server_stub.bundle import Bad, Edge, Entry, Keys, Manifest, Place, Times, Walk

CHUNK = 1 << 20
MAX_LINE = 16 * wire.MAX_EVENT_BYTES
"""A line that is longer is no event, and must not fill memory."""
SHARE_LINES = 50_000
"""A process more is worth its start from so many lines on."""
INFLATE = 0.35
"""What reading a line costs, against checking it: every share reads all that is before it."""


class Killed(Exception):
    """A share's process ended without a word."""


class Found(Struct, kw_only=True):
    """What one share's process sends back."""

    bad: tuple[Any, ...] | None = None
    start: int = 0
    end: int = 0
    parts: list[tuple[int, bytes]] = []
    roots: dict[int, list[tuple[int, bytes]]] = {}
    times: dict[tuple[str, int], Times] = {}
    events: int = 0
    lines: int = 0


class Lines:
    """The lines of the events, in lists; those of other shares are only counted."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.rest, self.held, self.at = file, b"", list[bytes](), 0

    def skip(self, count: int) -> int:
        """Pass over `count` lines; how many of them are digests."""
        folded = 0
        while count:
            chunk = self.rest + self.file.read(CHUNK)
            end = chunk.rfind(b"\n") + 1
            if not end:
                raise Bad("unreadable", None, 0, "the events end too early")
            if (n := chunk.count(b"\n", 0, end)) > count:
                lines = chunk[:end].split(b"\n")
                self.held, self.at = lines[count:-1], 0
                chunk, end, self.rest = b"\n".join([*lines[:count], b""]), -1, chunk[end:]
                n = count
            else:
                self.rest = chunk[end:]
            folded += (b"\n" + (chunk if end < 0 else chunk[:end])).count(b'\n{"seq":')
            count -= n
        return folded

    def take(self, count: int) -> list[bytes]:
        """The next `count` lines, or what is left."""
        while len(self.held) - self.at < count:
            chunk = self.file.read(CHUNK)
            lines = (self.rest + chunk).split(b"\n")
            if len(lines[-1]) > MAX_LINE:
                raise Bad("unreadable", None, 0, f'"{bundle.EVENTS}" holds a line that no event can be')
            self.rest = lines.pop() if chunk else b""
            if not chunk and lines and not lines[-1]:
                lines.pop()
            self.held, self.at = self.held[self.at :] + lines, 0
            if not chunk:
                break
        got = self.held[self.at : self.at + count]
        self.at += len(got)
        return got

    def __iter__(self) -> Iterator[bytes]:
        """All that are left."""
        while lines := self.take(1000):
            yield from lines


def _hashes(file: IO[bytes], name: str) -> Iterator[bytes]:
    while len(node := file.read(32)) == 32:
        yield node
    raise Bad("unreadable", None, 0, f'"{name}" ends too early')


def entries_of(file: IO[bytes]) -> Iterator[Entry]:
    """The batches, in order. Raises Bad for a line that is none."""
    decode = msgspec.json.Decoder(Entry).decode
    for line in file:
        try:
            yield decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise Bad("unreadable", None, 0, f'"{bundle.BATCHES}" can\'t be read: {error}') from None


def _share(path: str, keys: Keys, whole: bool, span: tuple[int, int], marks: Sequence[int], size: int) -> Found:
    """Check the batches that begin at lines `span[0]`..`span[1]`-1 (from 0); the last share sees to the ends, too."""
    walk = Walk(keys, whole, [mark for mark in marks if mark > 0])
    try:
        with zipfile.ZipFile(path) as file, ExitStack() as opened:
            names = (bundle.EVENTS, bundle.LEAVES, bundle.GAPS, bundle.BATCHES)
            events, leaf_file, gap_file, batches = (opened.enter_context(file.open(name)) for name in names)
            lines, entries = Lines(events), entries_of(batches)
            leaves, gaps = _hashes(leaf_file, bundle.LEAVES), _hashes(gap_file, bundle.GAPS)
            entry = next(entries, None)
            while entry is not None and walk.lines < span[0]:
                for _ in bundle.blocks(walk.size, entry.pos):
                    next(gaps)
                walk.pass_over(entry)
                entry = next(entries, None)
            for _ in range(lines.skip(walk.lines)):
                next(leaves)
            walk.begin()
            walk.marks = [mark for mark in walk.marks if mark > walk.size]
            start = walk.size
            while entry is not None and walk.lines < span[1]:
                count = min(max(entry.last - entry.taken + 1, 0), wire.MAX_EVENTS)
                walk.check(entry, lines.take(count), leaves, gaps)
                entry = next(entries, None)
            if entry is None:
                _ends(walk, lines, gaps, size)
    except Bad as bad:
        return Found(bad=(bad.kind, bad.place, bad.line, bad.why, bad.found))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError) as error:
        return Found(bad=("unreadable", None, 0, f"the file is damaged: {error}", None))
    assert walk.edge is not None
    done = walk.edge
    return Found(
        start=start, end=done.size, parts=done.parts, roots=walk.roots, times=walk.times, events=walk.events, lines=walk.lines
    )


def _ends(walk: Walk, lines: Lines, gaps: Iterator[bytes], size: int) -> None:
    if more := lines.take(1):
        place = bundle.place_of(more[0], Place("", 0, 0), walk.own)
        raise Bad("inserted", place, walk.lines + 1, "no signed batch has an event here", place)
    if walk.whole and walk.size != size:
        raise Bad("removed", None, walk.lines + 1, f"the log had {size} events, {walk.size} are here")
    walk.gap(walk.size, size, gaps)


def _work(pipe: Connection, *args: Any) -> None:
    pipe.send(_share(*args))
    pipe.close()


def _spans(lines: int) -> list[tuple[int, int]]:
    """Shares of about equal time, one for each processor where that pays."""
    count = max(1, min(len(os.sched_getaffinity(0)), 16, lines // SHARE_LINES))
    low, high = 0.0, 1.0 + INFLATE
    for _ in range(40):
        middle = (low + high) / 2
        starts = [0.0]
        for _ in range(count):
            starts.append(starts[-1] + max(0.0, middle - INFLATE * starts[-1]) / (1 + INFLATE))
        low, high = (middle, high) if starts[-1] < 1 else (low, middle)
    cuts = [int(start * lines) for start in starts[:count]]
    return list(zip(cuts, [*cuts[1:], lines + 1], strict=True))


def run(path: str, keys: Keys, manifest: Manifest, marks: Sequence[int]) -> list[Found]:
    """Every share's findings, in order; the first in this process."""
    context = multiprocessing.get_context("spawn")
    first, *others = _spans(manifest.lines)
    whole = not manifest.filter
    running = []
    for span in others:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, path, keys, whole, span, marks, manifest.size), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    found = [_share(path, keys, whole, first, marks, manifest.size)]
    for process, ours in running:
        try:
            found.append(ours.recv())
        except EOFError:
            raise Killed("a process that checked a part of the bundle was killed; is there memory enough?") from None
        finally:
            process.join()
    return found


def joined(found: list[Found], marks: Sequence[int]) -> tuple[Edge, dict[int, bytes]]:
    """The whole log's edge, and its root at each mark. Raises the first Bad."""
    edge, roots, highs = Edge(), dict[int, bytes](), dict[tuple[str, int], int]()
    for share in found:
        for name, times in share.times.items():
            limit = highs.get(name, 0) - bundle.BACK_MS
            for time, seq, line in times.lows:
                if time < limit:
                    raise Bad("back-dated", Place(*name, seq), line, "it is older than what stands before it")
            highs[name] = times.high if times.reset else max(highs.get(name, 0), times.high)
        if share.bad is not None:
            raise Bad(*share.bad)
        for mark, parts in share.roots.items():
            then = Edge()
            for level, node in [*edge.parts, *parts]:
                then.push(level, node)
            roots[mark] = then.root()
        for level, node in share.parts:
            edge.push(level, node)
    if edge.size in marks:
        roots[edge.size] = edge.root()
    return edge, roots
