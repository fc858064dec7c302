"""Ways out that are no mounts: which protected reads left by a phone's node, a socket, a printer, a Bluetooth peer.

Question: did what this process read leave by the way that it, or its kin, holds open? Owns: the ways that are open or were
just now, the count of bytes of each over time, and which reads these bytes explain, how surely. Must not know sockets, USB,
events or approvals. From `pipeline` (WayHeld, WayClosed, WayUsed, Sized, ticks) to `pipeline` (`Departure`s); reads are
asked of `reads`, kin of `people`. No program's name decides anything: amounts and moments do.

A read while a way is open, or before it was opened, is in question until bytes explain it: those that left after it was
opened, each byte once, reads in their order. It is told as soon as as much left as was read, else when the way closes or
falls quiet. How much more than that may have left depends on whose way it is:
- a *tool's* (opened as the process began: curl, ssh) serves one end; packed content counts from a twentieth on;
- a *new* one of a process that lives long (a mail program) must agree roughly, one that it opens minutes after the read
  (*late*) closely, an *old* one (a browser's, a database's) closely and soon after the read. What leaves anyhow, and is
  more than was read, joins by `time` at most.
A device (a phone by MTP) is a tool that may stall; what was cut short left as far as it came. Where nobody can count, a read by
who holds a device is a copy onto it; of a network it is `time`.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice, takewhile
from typing import Literal, NamedTuple

from agent.contract.codes import Link
from agent.core.facts import Sized, WayClosed, WayHeld, WayUsed
from agent.core.grading import Left
from agent.core.media import clean
from agent.core.people import People
from agent.core.reads import GONE, Read, Reads

_BEFORE_MS = 900_000
"""A file attached now may be sent minutes later, by a connection made for it."""
_TOGETHER_MS = 60_000
_QUIET_MS = 2_000
_LATE_MS, _SLACK_MS = 3_000, 50
"""Reads are told by another sensor than ways, so a little earlier or later."""
_OPENING_MS, _FED_OPENING_MS = 500, 1_000
"""A read told so soon after its way was opened is taken for older than what had left by the first look. One whose bytes another
sends (rsync by ssh) has waited for keys, and may be told late; who sends by himself may well have said something before it."""
_NOBODY_MS = 10_000
_MOST, _LEAST = 0.8, 0.05
_PART = 0.7
"""How sure a join is with a device to which a part of what was read has gone"""
_STALLED_MS = 10_000
"""A device may take its time in the middle of a file, while it writes."""
_SPOKEN, _GREETING = 4_096, 2_048
"""Bytes that protocols add: for a file, and for a connection (names, keys) before anything else is said."""
_CLOSE, _ROUGH = 1.15, 3.0
_ENCODED = (1.3, 1.4)
"""Base64 makes four bytes of three, with line ends a little more."""
_BESIDE = 0.7
"""How sure a join with a sibling is whose pipe nobody saw to its end; only where nobody nearer has read anything"""
_SMALL = 8_192
"""What a connection that was there before sends anyhow, now and then"""
_MOST_READERS, _MOST_UNSEEN = 256, 64
_MOST_WAYS, _MOST_PENDING, _MOST_COUNTS, _MOST_TOLD = 2_048, 50_000, 256, 20_000
_DEVICES = {"mtp": 0.85, "bluetooth": 0.6, "usb": 0.6}
"""Ways to a device that is there for nothing else, with how sure a read by its holder is if nobody can count"""

_LEAST_USES = 4
"""Requests to a device that it takes to send a file: a command, the data, the answer"""
_TOLD_LATE_MS = 1_000
"""A read is told with the time at which the queue was read; by then it may have been sent, and been counted."""

_Kind = Literal["tool", "new", "late", "old"]
_GRADES: dict[_Kind, tuple[float, float, float]] = {
    "tool": (0.95, 0.85, 0.6),
    "new": (0.9, 0.7, 0.0),
    "late": (0.5, 0.0, 0.0),
    "old": (0.8, 0.0, 0.0),
}
"""How sure a join is if what left agrees closely, roughly, or is far more; 0: not at all, or by time"""


class Departure(NamedTuple):
    """Protected bytes left by a way that is no mount. `device` is the `Medium.id` of a device, if the way is one."""

    way: str
    peer: str
    device: str
    at_ms: int
    left: list[Left]


class _Pending(NamedTuple):
    """A read that may have left, who read it, what links it, and how sure that is at best."""

    read: Read
    pid: int
    link: Link
    most: float

    @property
    def from_ms(self) -> int:
        """From when on its bytes can have left."""
        first, last = self.read.since[1], self.read.last_ms
        return (first if last - first <= _TOGETHER_MS else last) - _SLACK_MS

    @property
    def opening_ms(self) -> int:
        """How long after the opening of a way it still counts as its first read."""
        return _FED_OPENING_MS if self.link == "pipeline" else _OPENING_MS


class _Way:
    """One way out. `counts` are (ms, bytes so far), empty if nobody can count; the first `given` bytes are explained."""

    __slots__ = (
        "began_ms",
        "closed_ms",
        "counts",
        "device",
        "direct",
        "feeders",
        "fleeting",
        "given",
        "grown_ms",
        "id",
        "looked",
        "low",
        "peer",
        "pending",
        "pids",
        "seen_ms",
        "since_ms",
        "upto",
        "uses",
        "way",
    )

    def __init__(self, fact: WayHeld) -> None:
        self.id, self.way, self.peer, self.device = fact.id, clean(fact.way), clean(fact.peer), fact.device
        self.since_ms, self.began_ms = fact.since_ms, fact.began_ms
        self.seen_ms = self.grown_ms = fact.at_ms
        self.closed_ms: int | None = None
        self.pids: dict[int, None] = {}
        self.feeders: dict[int, None] = {}
        self.direct = False
        """Whether one of its holders or their near kin has read something"""
        self.uses: deque[tuple[int, int]] = deque(maxlen=_MOST_COUNTS)
        """(ms, requests so far) where only these can be counted"""
        self.upto: dict[int, int] = {}
        """By pid: its reads are in question up to this moment already"""
        self.counts: deque[tuple[int, int]] = deque(maxlen=_MOST_COUNTS)
        self.pending: dict[tuple[int, str], _Pending] = {}
        self.looked: tuple[int, int] | None = None
        """The first look at its count, after which it was known; (ms, bytes)"""
        self.low = True
        """Whether what had left by then counts as having left before a read, where that can't be known"""
        self.fleeting = False
        """Its holder was gone before anybody could look: no program that lives long"""
        self.given = 0
        if fact.since_ms is not None and fact.sent is not None:
            self.counts.append((fact.since_ms, fact.idle_sent))

    def begun(self, at_ms: int | None) -> None:
        """Its first holder began then; who began after the way was opened is another life of that pid."""
        if at_ms is not None and self.since_ms is not None and at_ms <= self.since_ms + _SLACK_MS:
            self.began_ms = at_ms

    def count(self, at_ms: int, sent: int | None) -> None:
        """So many bytes left in all by now."""
        if sent is None or (self.counts and sent <= self.counts[-1][1]):
            return
        self.counts.append((at_ms, sent))
        self.grown_ms = at_ms

    def since(self, each: _Pending) -> int:
        """Bytes that left since a read and explain nothing yet."""
        before, at_ms = self.counts[0][1], each.from_ms
        if self.alone:  # nor later than one count before, as both are told when a machine under load gets round to it
            before_that = [when for when, _ in self.counts if when <= at_ms][-2:-1]
            at_ms = min([at_ms - _TOLD_LATE_MS, *before_that])
        if self.low and self.looked and self.since_ms is not None and self.since_ms + each.opening_ms < at_ms <= self.looked[0]:
            before = self.looked[1]
        for when, sent in self.counts:
            if when > at_ms:
                break
            before = max(sent, before)
        return self.counts[-1][1] - max(before, self.given)

    def spoken_to(self, at_ms: int) -> bool:
        """Whether it was used since a moment as often as it takes to send anything, as far as that can be counted."""
        before = next((uses for when, uses in reversed(self.uses) if when <= at_ms), self.uses[0][1] if self.uses else 0)
        return not self.uses or self.uses[-1][1] - before >= _LEAST_USES

    def fed(self, each: _Pending) -> bool:
        """Whether more bytes left since a read than who sends nothing says: of a pulled device nobody tells requests."""
        return bool(self.counts) and self.since(each) > _SPOKEN + _GREETING

    def settled(self, now_ms: int) -> bool:
        """Whether nothing more is to be expected just now."""
        return self.closed_ms is not None or not 0 <= now_ms - self.grown_ms < (_STALLED_MS if self.alone else _QUIET_MS)

    @property
    def alone(self) -> bool:
        """Whether it leads to a device to which nothing is sent but files and a few commands."""
        return self.way in _DEVICES

    def kind(self, read: Read) -> _Kind:
        """Whose way it is, with respect to a read. A device that is there for nothing else is always a tool."""
        if self.alone:
            return "tool"
        if self.since_ms is None:
            return "old"
        if self.fleeting or (self.began_ms is not None and self.since_ms - self.began_ms <= _TOGETHER_MS):
            return "tool"
        if abs(read.last_ms - self.since_ms) <= _TOGETHER_MS:
            return "new"
        return "late" if read.last_ms < self.since_ms else "old"

    def first_ms(self, now_ms: int) -> int:
        """Reads before this moment are out of question."""
        if self.since_ms is None:
            return now_ms - _TOGETHER_MS
        return max(self.since_ms, now_ms - _BEFORE_MS) - (_BEFORE_MS if self.counts and not self.alone else _LATE_MS)


class Ways:
    """Fed with what is told of ways; `Departure`s come out at once or from `due`. `wanted` takes paths to be looked up."""

    def __init__(self, people: People, reads: Reads, wanted: list[str]) -> None:
        self._people, self._reads, self._wanted = people, reads, wanted
        self._ways: dict[str, _Way] = {}
        self._asked: dict[str, list[_Pending]] = {}
        self._told: dict[tuple[int, str], int] = {}
        self._unseen: list[WayUsed] = []
        self.off: frozenset[str] = frozenset()
        """Kinds of ways of which nothing is to be told (the site's wish)"""

    # -- facts in ------------------------------------------------------------------------------------------------------

    def held(self, fact: WayHeld) -> list[Departure]:
        """A process has a way open."""
        if fact.way in self.off:
            return []
        way, crowded = self._ways.get(fact.id), list[Departure]()
        if way is None:
            way = self._ways[fact.id] = _Way(fact)
            if len(self._ways) > _MOST_WAYS:
                oldest = self._ways.pop(next(iter(self._ways)))
                oldest.closed_ms = oldest.closed_ms or fact.at_ms  # judged by what is known of it by now
                crowded = self._judge(oldest, fact.at_ms)
        way.peer = way.peer or clean(fact.peer)
        if fact.pid not in way.pids:
            entry = self._people.who(fact.pid)
            way.fleeting = not way.pids and (entry is None or entry.process.known != "exact")
            if entry is not None and way.began_ms is None and not way.pids:  # gone before its sensor looked, not unknown
                way.begun(entry.process.began_ms)
            way.pids[fact.pid] = None
        way.feeders |= dict.fromkeys(fact.feeders)
        way.count(fact.at_ms, fact.sent)
        way.closed_ms = None
        if fact.idle_uses is not None and not way.uses:
            way.uses.append((0, fact.idle_uses))
        if fact.uses is not None and (not way.uses or fact.uses > way.uses[-1][1]):
            way.uses.append((fact.at_ms, fact.uses))
        if way.looked is None and fact.sent:
            way.looked = fact.at_ms, fact.sent
        return crowded + self._judge(way, fact.at_ms)

    def closed(self, fact: WayClosed) -> list[Departure]:
        """A way is closed, its count final; if but one of its holders let go of it, it stays open."""
        way = self._ways.get(fact.id)
        if way is None:
            return []
        way.count(fact.at_ms, fact.sent)
        if not fact.pid or not way.pids.keys() - {fact.pid}:
            way.closed_ms = way.closed_ms or fact.at_ms
        return self._judge(way, fact.at_ms)

    def used(self, fact: WayUsed) -> list[Departure]:
        """Bytes left by the hand of nobody who was seen: the only file of such a size that was just read, by time alone."""
        if fact.way in self.off or len(self._unseen) >= _MOST_UNSEEN:
            return []
        for pid, read in self._just_read(fact):
            if read.stat is None:
                self._want(_Pending(read, pid, "time", 1.0))
        self._unseen.append(fact)
        return []

    def sized(self, fact: Sized) -> list[Departure]:
        """A size that was wanted was looked up."""
        waiting = self._asked.pop(fact.path, [])
        for each in waiting:
            self._reads.learn(each.pid, each.read, GONE if fact.size is None else (fact.size, fact.inode))
        if not waiting or self._asked:
            return []
        return [told for way in list(self._ways.values()) if way.pending for told in self._judge(way, fact.at_ms)]

    def due(self, now_ms: int) -> list[Departure]:
        """What is explained by now that time has passed; asked once a second."""
        self._asked.clear()  # what nobody answered by now is not known
        told = [departure for fact in self._unseen for departure in self._by_time(fact)]
        self._unseen.clear()
        for way in list(self._ways.values()):
            told += self._judge(way, now_ms)
            if way.closed_ms is not None and not 0 <= now_ms - way.closed_ms <= _LATE_MS:
                self._ways.pop(way.id, None)
        return told

    def everything(self, now_ms: int) -> list[Departure]:
        """The agent stops: all that is known so far."""
        for way in self._ways.values():
            way.closed_ms = way.closed_ms or now_ms
        return self.due(now_ms)

    def forget(self, pid: int) -> None:
        """A process is over for good."""
        for way in [way for way in self._ways.values() if pid in way.pids]:
            del way.pids[pid]
            if not way.pids:
                del self._ways[way.id]

    def __len__(self) -> int:
        """How many ways are remembered."""
        return len(self._ways)

    # -- which reads are in question -----------------------------------------------------------------------------------

    def _gather(self, way: _Way, now_ms: int) -> None:
        """Reads of its holders and their kin that are new come into question; sizes that nobody looked up are wanted."""
        first_ms = way.first_ms(now_ms)
        for pid, link, most, least_ms in self._hands(way):
            of = self._reads.of(pid)
            if of is None or (most == _BESIDE and (way.direct or not way.settled(now_ms))):
                continue
            upto = max(first_ms, least_ms, way.upto.get(pid, first_ms))
            new = list(takewhile(lambda read, upto=upto: read.last_ms >= upto, reversed(of.fresh)))  # type: ignore[misc]
            way.direct |= bool(new) and most != _BESIDE
            for read in reversed(new):
                at = (pid, read.opened)
                if at in way.pending or self._told.get(at, -1) >= read.last_ms or len(way.pending) >= _MOST_PENDING:
                    continue
                each = way.pending[at] = _Pending(read, pid, link, most)
                if read.stat is None:
                    self._want(each)
            if of.fresh:
                way.upto[pid] = max(next(reversed(of.fresh)).last_ms, way.upto.get(pid, 0))
        for at, each in list(way.pending.items()):
            last_ms = max(each.read.last_ms, way.grown_ms) if way.alone else each.read.last_ms
            soon = way.alone or way.kind(each.read) == "old"
            late = now_ms - last_ms > (_TOGETHER_MS + _QUIET_MS if soon else _BEFORE_MS)
            if late or self._told.get(at, -1) >= each.read.last_ms:
                del way.pending[at]
            if late and way.alone:  # refused: what is sent later is something else
                way.upto[each.pid] = max(each.read.last_ms + 1, way.upto.get(each.pid, 0))

    def _hands(self, way: _Way) -> Iterator[tuple[int, Link, float, int]]:
        """Whose reads can have left by it: (pid, link, how sure at best, not read before). What an ancestor read long before
        it started the holder, it did not hand down."""
        seen: set[int] = set()
        begun_ms = min(each for each in (way.seen_ms, way.since_ms, way.began_ms) if each is not None) - _LATE_MS
        fed = ((feeder, *self._people.piped(feeder)) for feeder in way.feeders)
        served = way.pids if way.since_ms is None and way.looked is None else ()  # accepted by it, gone before a look
        below = (self._people.descendants(pid, way.seen_ms - _TOGETHER_MS, _MOST_READERS) for pid in served)
        groups: tuple[tuple[Iterable[int], Link, float, int], ...] = (
            (way.pids, "process", 1.0, 0),
            (chain.from_iterable(self._people.piped(pid) for pid in way.pids), "pipeline", 0.9, 0),
            (chain.from_iterable(self._people.ancestors(pid) for pid in way.pids), "pipeline", 0.9, begun_ms),
            (chain.from_iterable(fed), "pipeline", 0.8, 0),
            ((entry.process.pid for entries in below for entry in entries), "pipeline", 0.8, 0),
        )
        for pids, link, most, least_ms in groups:
            for pid in pids:
                if pid not in seen:
                    seen.add(pid)
                    yield pid, link, most, least_ms

    def _want(self, each: _Pending) -> None:
        many = self._asked.setdefault(each.read.opened, [])
        if not many:
            self._wanted.append(each.read.opened)
        many.append(each)

    def _just_read(self, fact: WayUsed) -> Iterator[tuple[int, Read]]:
        """Who read what in the seconds before, as far as it is of the user who sent."""
        for pid, of in islice(self._reads.everyone(), _MOST_READERS):
            entry = self._people.who(pid)
            if fact.uid is not None and entry is not None and entry.process.uid not in (None, fact.uid):
                continue
            for read in takewhile(lambda read: fact.at_ms - read.last_ms <= _NOBODY_MS, reversed(of.fresh)):
                if self._told.get((pid, read.opened), -1) < read.last_ms:
                    yield pid, read

    def _by_time(self, fact: WayUsed) -> Iterator[Departure]:
        found: dict[str, Left] = {}
        for pid, read in self._just_read(fact):
            size = read.size or 0
            if size and size <= fact.sent <= size * _CLOSE + _SPOKEN + _GREETING:
                found.setdefault(read.path, Left(read, size, "time", 0.35, pid))
        if len(found) == 1:
            yield Departure(clean(fact.way), clean(fact.peer), "", fact.at_ms, list(found.values()))

    # -- what is explained ---------------------------------------------------------------------------------------------

    def _judge(self, way: _Way, now_ms: int) -> list[Departure]:
        self._gather(way, now_ms)
        if not way.pending or any(each.read.opened in self._asked for each in way.pending.values()):
            return []
        in_order = sorted(way.pending.values(), key=_opened)
        if not way.counts or way.alone:
            in_order = [each for each in in_order if way.spoken_to(each.from_ms - _TOLD_LATE_MS) or way.fed(each)]
        if not in_order:
            return []
        if not way.counts:
            return self._tell(way, in_order, now_ms, self._uncounted(way, in_order))
        kind = way.kind(in_order[0].read)
        settled = way.settled(now_ms)
        if not settled and (kind != "tool" or self._shared(way)):
            return []
        way.low = False
        all_left = way.since(in_order[0])
        way.low = all_left < sum(each.read.size or 0 for each in in_order) or _excess(all_left, in_order) > _CLOSE
        whole = self._whole(way, in_order, settled)
        left = self._graded(way, whole, kind) if whole else self._packed(way, in_order, kind) if settled else []
        return self._tell(way, whole or in_order, now_ms, left)

    def _uncounted(self, way: _Way, in_order: list[_Pending]) -> list[Left]:
        sure = _DEVICES.get(way.way)
        if sure is not None:
            return [_left(each, each.read.size, each.link, sure * each.most) for each in in_order]
        return [_left(each, each.read.size, "time", 0.3) for each in in_order if way.kind(each.read) != "old"]

    def _whole(self, way: _Way, in_order: list[_Pending], settled: bool) -> list[_Pending]:
        """The reads as many bytes of which left as they have: the only one that agrees closely, else in their order."""
        if settled and len(in_order) > 1:
            close = [each for each in in_order if each.read.size and _excess(way.since(each), [each]) <= _CLOSE]
            close = [each for each in close if way.since(each) >= (each.read.size or 0)]
            if len(close) == 1 and way.since(in_order[0]) < sum(each.read.size or 0 for each in in_order) * _MOST:
                return close
        taken, whole = 0, []
        for each in in_order:
            size, there = each.read.size, way.since(each) - taken
            if not size:
                continue
            if there < size * (_MOST if settled else 1.0):
                if not settled:
                    break
                continue
            taken += min(size, there)
            whole.append(each)
        return whole

    def _graded(self, way: _Way, whole: list[_Pending], kind: _Kind) -> list[Left]:
        """How surely these left: by how much more did."""
        there = way.since(whole[0])
        excess = _excess(there, whole)
        close = excess <= _CLOSE or (kind != "old" and _ENCODED[0] <= excess <= _ENCODED[1])
        sure = _GRADES[kind][0 if close else 1 if excess <= _ROUGH else 2]
        need = sum(each.read.size or 0 for each in whole)
        if kind == "old" and need < _SMALL:
            sure = 0.0
        if excess > _ROUGH and (not sure or whole[0].most == _BESIDE):
            return []
        left = []
        for each in whole:
            bytes_left = min(each.read.size or 0, there)
            left.append(_left(each, bytes_left, each.link, sure * each.most) if sure else _left(each, bytes_left, "time", 0.3))
        if way.alone:  # what lies behind it may be of a file whose read is told later
            way.given = way.counts[-1][1] - there + need
        else:
            way.given = way.counts[-1][1] if sure else way.given
        return left

    def _packed(self, way: _Way, in_order: list[_Pending], kind: _Kind) -> list[Left]:
        """Less left than was read, but more than is spoken: packed, or a part of it."""
        there = way.since(in_order[0]) - _GREETING
        need = sum(each.read.size or 0 for each in in_order)
        if kind != "tool" or there <= max(need * _LEAST, 0):
            return []
        if not need:  # gone before anybody could look
            return [_left(each, None, each.link, 0.5 * each.most) for each in in_order]
        way.given = way.counts[-1][1]
        if way.alone:  # what was cut short left as far as it came
            return list(self._cut_short(in_order, there))
        sure = 0.4 + 0.3 * min(there / need, 1.0)
        return [_left(each, each.read.size, each.link, sure * each.most) for each in in_order if each.read.size != 0]

    def _cut_short(self, in_order: list[_Pending], there: int) -> Iterator[Left]:
        for each in in_order:
            part = min(each.read.size or 0, there)
            there -= part
            if part:
                yield _left(each, part, each.link, _PART * each.most)

    def _shared(self, way: _Way) -> bool:
        """Whether another open way of the same process may carry what was read: then it is judged when it falls quiet."""
        return any(
            other is not way and other.closed_ms is None and len(other.counts) > 1 and other.pids.keys() & way.pids.keys()
            for other in self._ways.values()
        )

    def _tell(self, way: _Way, about: list[_Pending], now_ms: int, left: list[Left]) -> list[Departure]:
        if not left:
            return []
        for each in about:
            at = (each.pid, each.read.opened)
            way.pending.pop(at, None)
            self._told.pop(at, None)
            self._told[at] = each.read.last_ms
        while len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]
        return [Departure(way.way, way.peer, way.device, now_ms, left)]


def _opened(each: _Pending) -> tuple[int, int]:
    return each.read.since


def _left(each: _Pending, size: int | None, link: Link, sure: float) -> Left:
    if link == "process" and each.read.via:
        link = "lineage"
    return Left(each.read, size, link, round(sure, 2), each.pid)


def _excess(there: int, reads: list[_Pending]) -> float:
    """By what factor more left than was read, without what protocols add."""
    need = sum(each.read.size or 0 for each in reads)
    return max(there - _GREETING - _SPOKEN * len(reads), 0) / max(need, 1)
