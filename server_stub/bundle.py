"""A bundle's parts and the check of them: are these events those that were signed, all of them, in this order?

Owns: the bundle's format (docs/reference.md, "Bundles"), the walk that checks batch after batch while it recomputes the
chains and the log's tree, and which event is named when something does not fit. Pure: lines and hashes are handed in, so the
same walk serves one process or several, each over its share of the batches. Must not know: ZIP, files, words for people.

Every line stands at a place that a signed head gives it: `(agent, epoch, seq)`. A line that is another event than its place
wants is *misplaced*; whether something was removed, inserted or reordered there takes a look at the other lines (`named`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

from agent.contract import chain, codes, wire
from agent.contract.chain import NotWhole

FORMAT = "sekisho/bundle/v1"
MANIFEST, SIGNATURE, CHECKPOINT, KEYS = "manifest.json", "manifest.sig", "checkpoint", "keys.json"
EVENTS, BATCHES, LEAVES, GAPS, README = "events.ndjson", "batches.ndjson", "leaves", "gaps", "README.txt"
MEMBERS = (EVENTS, BATCHES, LEAVES, GAPS, KEYS, CHECKPOINT, MANIFEST, SIGNATURE, README)
BACK_MS = 86_400_000
"""An event may be so much older than one before it in its chain (work is told when it is over); what is older is back-dated."""
OURS = frozenset(code for code, row in codes.CODES.items() if row.tells.startswith("made by the collector"))
"""Only the collector makes these, and they stand in its own chain, of whatever machine they speak."""
RESETS = ("agent.clock", "agent.started")
"""Events after which a machine's clock may stand elsewhere."""

Kind = Literal["altered", "removed", "inserted", "reordered", "back-dated", "forged", "misplaced", "tree", "unreadable"]


class Entry(Struct, kw_only=True):
    """One line of `batches.ndjson`: a signed head, whose lines from `taken` to `last` stand in the log from leaf `pos` on.

    `start` is the chain's hash before `taken` (`prev`, unless earlier events of the batch were held already).
    """

    pos: int
    agent: str
    epoch: int
    first: int
    taken: int
    last: int
    start: str
    prev: str
    hash: str
    sent_at: int
    sig: str

    def head(self) -> wire.Head:
        """What the agent signed."""
        return wire.Head(self.agent, self.epoch, self.first, self.last, self.prev, self.hash, self.sent_at, self.sig)


class Manifest(Struct, kw_only=True):
    """`manifest.json`. `filter` empty: every line of the log up to `size` is here. `lines` of which `events` in full."""

    format: str
    origin: str
    size: int
    filter: dict[str, str]
    batches: int
    lines: int
    events: int


class Keys(Struct, kw_only=True):
    """`keys.json`: base64 keys as the bundle brings them. `collector`: oldest first, each joined to the next by a rotation."""

    note: str = ""
    collector: list[bytes]
    rotations: list[wire.Rotation] = []
    agents: dict[str, bytes]


class Place(NamedTuple):
    """Where an event belongs."""

    agent: str
    epoch: int
    seq: int


class Bad(Exception):
    """The first thing that does not fit: what `kind`, at which `place`, in which line (from 1; 0: none) of the events."""

    def __init__(self, kind: Kind, place: Place | None, line: int = 0, why: str = "", found: Place | None = None) -> None:
        super().__init__(f"{kind} {place} line {line}: {why}")
        self.kind, self.place, self.line, self.why, self.found = kind, place, line, why, found


class _Metadata(Struct, frozen=True):
    event_code: str = ""
    uid: str = ""


class _Sekisho(Struct, frozen=True):
    seq: int
    epoch: int
    prev: str


class _Unmapped(Struct, frozen=True):
    sekisho: _Sekisho


class _Device(Struct, frozen=True):
    uid: str = ""


class Stamp(Struct, frozen=True):
    """What an event says of its own place."""

    time: int
    metadata: _Metadata
    unmapped: _Unmapped
    device: _Device = _Device()


_stamp = msgspec.json.Decoder(Stamp)
_UNREAD = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    """The largest complete subtrees `(level, index)` that cover leaves `start`..`end`-1, from the left."""
    while start < end:
        level = min((start & -start).bit_length() - 1 if start else 64, (end - start).bit_length() - 1)
        yield level, start >> level
        start += 1 << level


class Edge:
    """Complete subtrees over leaves from `start` on, merged as far as they are siblings."""

    def __init__(self, start: int = 0) -> None:
        self.size = start
        self.parts: list[tuple[int, bytes]] = []

    def push(self, level: int, node: bytes) -> None:
        """The subtree that comes next."""
        parts, index = self.parts, self.size >> level
        self.size += 1 << level
        while index & 1 and parts and parts[-1][0] == level:
            node = hashlib.sha256(b"\1" + parts.pop()[1] + node).digest()
            level, index = level + 1, index >> 1
        parts.append((level, node))

    def root(self) -> bytes:
        """The root, if it began at 0."""
        if not self.parts:
            return hashlib.sha256().digest()
        root = self.parts[-1][1]
        for _, left in reversed(self.parts[:-1]):
            root = hashlib.sha256(b"\1" + left + root).digest()
        return root


class Times(Struct):
    """The times of one chain within one share: its newest; and those that a share before it may show to be too old."""

    high: int = 0
    lows: list[tuple[int, int, int]] = []
    """`(time, seq, line)`, each older than those before it, up to the first change of the clock."""
    reset: bool = False


class Walk:
    """Checks batches in order of the log. `pass_over` those of another share, `check` one's own."""

    def __init__(self, keys: Keys, whole: bool, marks: Sequence[int] = ()) -> None:
        self.whole, self.agents, self.signers = whole, keys.agents, keys.collector
        self.own = chain.agent_id(keys.collector[0])
        self.ends: dict[tuple[str, int], tuple[int, str]] = {}
        self.size = self.lines = self.events = 0
        self.edge: Edge | None = None
        self.times: dict[tuple[str, int], Times] = {}
        self.marks = sorted(marks)
        self.roots: dict[int, list[tuple[int, bytes]]] = {}
        """For each of `marks` that a share reached: its parts then."""

    def pass_over(self, entry: Entry) -> None:
        """A batch that another share checks. Raises Bad."""
        self._possible(entry)
        self.ends[entry.agent, entry.epoch] = (entry.last, entry.hash)
        self.size = entry.pos + entry.last - entry.taken + 1
        self.lines += entry.last - entry.taken + 1

    def _possible(self, entry: Entry) -> None:
        if not 0 < entry.first <= entry.taken <= entry.last < entry.taken + wire.MAX_EVENTS or not 0 <= entry.pos < 1 << 53:
            raise Bad("unreadable", None, self.lines + 1, "a batch with an impossible range")

    def _follows(self, entry: Entry) -> None:
        """Raise Bad unless `entry` continues what came before it, in its chain and in the log."""
        place, line = Place(entry.agent, entry.epoch, entry.taken), self.lines + 1
        self._possible(entry)
        last, link = self.ends.get((entry.agent, entry.epoch), (0, chain.genesis(entry.agent, entry.epoch).hex()))
        if entry.taken <= last:
            raise Bad("inserted", place, line, "two batches hold this event")
        if self.whole and entry.taken > last + 1:
            raise Bad("removed", place._replace(seq=last + 1), line, "the batch that held it is gone")
        if entry.taken == last + 1 and entry.start != link:
            raise Bad("altered", place, line, "its batch follows another event than the one before it here")
        if entry.first == entry.taken and entry.start != entry.prev:
            raise Bad("forged", place, line, "the batch's head and its beginning differ")
        if entry.pos < self.size or (self.whole and entry.pos > self.size):
            raise Bad("reordered" if entry.pos < self.size else "removed", place, line, "the log has another event there")

    def _signed(self, entry: Entry) -> None:
        signed, line = chain.head_bytes(entry.head()), self.lines + 1
        for key in self.signers if entry.agent == self.own else [self.agents.get(entry.agent, b"")]:
            if entry.agent != self.own and chain.agent_id(key) != entry.agent:
                continue
            try:
                chain.check(signed, entry.sig, key)
                return
            except NotWhole:
                continue
        why = "its batch is not signed by the key of its machine"
        raise Bad("forged", Place(entry.agent, entry.epoch, entry.taken), line, why)

    def gap(self, start: int, end: int, gaps: Iterator[bytes]) -> None:
        """Leaves that are not in the bundle: their subtrees' hashes."""
        edge = self.edge
        assert edge is not None
        for level, _ in blocks(start, end):
            edge.push(level, next(gaps))

    def begin(self) -> None:
        """This share begins here: after what was passed over."""
        self.edge = Edge(self.size)

    def check(self, entry: Entry, lines: Sequence[bytes], leaves: Iterator[bytes], gaps: Iterator[bytes]) -> None:
        """Check one batch over its lines. Raises Bad; StopIteration never (`leaves` and `gaps` end with a Bad)."""
        self._follows(entry)
        self.gap(self.size, entry.pos, gaps)
        edge = self.edge
        assert edge is not None
        sha256, push, decode = hashlib.sha256, edge.push, _stamp.decode
        agent, epoch = entry.agent, entry.epoch
        link, number, seq = bytes.fromhex(entry.start), self.lines, entry.taken - 1
        times = None if agent == self.own else self.times.setdefault((agent, epoch), Times(lows=[]))
        mark = self.marks[0] if self.marks else -1
        for line in lines:
            number, seq = number + 1, seq + 1
            if line.startswith(b'{"seq":'):
                folded = wire.folded(line)
                if folded is None or folded.seq != seq:
                    raise Bad("misplaced", Place(agent, epoch, seq), number)
                push(0, next(leaves))
                link = sha256(link + bytes.fromhex(folded.digest)).digest()
            else:
                try:
                    stamp = decode(line)
                except _UNREAD:
                    raise Bad("misplaced", Place(agent, epoch, seq), number) from None
                said = stamp.unmapped.sekisho
                ours = stamp.metadata.event_code in OURS
                if said.seq != seq or said.epoch != epoch or (self.own if ours else stamp.device.uid) != agent:
                    raise Bad("misplaced", Place(agent, epoch, seq), number)
                push(0, sha256(b"\0" + line).digest())
                digest = sha256(line).digest()
                if said.prev != link.hex():
                    raise self._broken(entry, lines, number, seq, said.prev, digest)
                link = sha256(link + digest).digest()
                self.events += 1
                if times is not None:
                    if stamp.metadata.event_code in RESETS:
                        times.high, times.reset = stamp.time, True
                    elif stamp.time < times.high - BACK_MS:
                        raise Bad("back-dated", Place(agent, epoch, seq), number, "it is older than what stands before it")
                    else:
                        times.high = max(times.high, stamp.time)
                        if not times.reset and (not times.lows or stamp.time < times.lows[-1][0]):
                            times.lows.append((stamp.time, seq, number))
            if edge.size == mark:
                self.mark()
                mark = self.marks[0] if self.marks else -1
        if len(lines) != entry.last - entry.taken + 1:
            raise Bad("misplaced", Place(agent, epoch, seq + 1), number + 1)
        if link.hex() != entry.hash:
            self._signed(entry)
            raise Bad("altered", Place(agent, epoch, entry.last), number, "the batch's signed head is of another event")
        self._signed(entry)
        self.ends[agent, epoch] = (entry.last, entry.hash)
        self.size, self.lines = edge.size, number

    def mark(self) -> None:
        """The log has a size here that somebody asked for: keep its parts."""
        assert self.edge is not None
        self.roots[self.marks.pop(0)] = list(self.edge.parts)

    def _broken(self, entry: Entry, lines: Sequence[bytes], number: int, seq: int, prev: str, digest: bytes) -> Bad:
        """Event `seq` follows another hash than its predecessor's: which of the two was altered? What comes after tells."""
        after = entry.hash
        if seq < entry.last and (following := lines[seq + 1 - entry.taken : seq + 2 - entry.taken]):
            try:
                after = _stamp.decode(following[0]).unmapped.sekisho.prev
            except _UNREAD:
                after = ""
        try:
            intact = hashlib.sha256(bytes.fromhex(prev) + digest).digest().hex() == after
        except ValueError:
            intact = False
        back = int(intact and seq > entry.taken)
        why = "what follows it was chained to other bytes" if back else "it names another event before it"
        return Bad("altered", Place(entry.agent, entry.epoch, seq - back), number - back, why)


def place_of(line: bytes, near: Place, own: str) -> Place | None:
    """Where a line says that it belongs (a digest: only its seq); None if it can't be read. `own`: the collector's chain."""
    if (folded := wire.folded(line)) is not None:
        return near._replace(seq=folded.seq)
    try:
        stamp = _stamp.decode(line)
    except _UNREAD:
        return None
    agent = own if stamp.metadata.event_code in OURS else stamp.device.uid
    return Place(agent, stamp.unmapped.sekisho.epoch, stamp.unmapped.sekisho.seq)


def named(bad: Bad, entries: Iterable[Entry], lines: Iterable[bytes], own: str) -> Bad:
    """What happened where a line is misplaced: `entries` and `lines` are all of the bundle's, from the first."""
    if bad.kind != "misplaced" or bad.place is None:
        return bad
    found: Place | None = None
    there = later = False
    for number, line in enumerate(lines, 1):
        if number == bad.line:
            found, there = place_of(line, bad.place, own), True
        elif number > bad.line and not line.startswith(b'{"seq":') and place_of(line, bad.place, own) == bad.place:
            later = True
            break
    wanted_at, found_at, at = 0, 0, 1
    for entry in entries:
        for place in (bad.place, found):
            if place and (place.agent, place.epoch) == (entry.agent, entry.epoch) and entry.taken <= place.seq <= entry.last:
                if place == bad.place:
                    wanted_at = at + place.seq - entry.taken
                else:
                    found_at = at + place.seq - entry.taken
        at += entry.last - entry.taken + 1
    comes_later = found_at > wanted_at
    if later and comes_later:
        return Bad("reordered", bad.place, bad.line, "another event stands in its place", found)
    if later:
        return Bad("inserted", found or bad.place, bad.line, "no signed batch has an event here", found)
    if comes_later or not there:
        why = "another one stands in its place" if there else "the events end before it"
        return Bad("removed", bad.place, bad.line, why, found)
    return Bad("altered", bad.place, bad.line, "the line in its place is another event's, or none", found)
