"""Who has a way out open that is a socket: to another machine, to a print service, to a Bluetooth peer.

Owns: the processes that read protected files lately (`reading`) with the sockets that they, their relatives and whoever they
talk to on this machine hold, seen by looks at short steps while they live; and the sockets that were closed before anybody
could look: the kernel tells their last count (`sockdiag`), and who opened them (`connects`). Must not know what was read, or
how much of it left: `core.ways` joins. Nothing is looked at while nobody reads a protected file, and of 100 readers a
second at most; those beyond are known by their connects alone.

A connection within the machine is no way out; the process at its other end may hold one, and is then told with its `feeders`.
UDP (QUIC) has no byte counts, nor have Bluetooth sockets. A print service spools what it is given: what it wrote meanwhile
(`wchar` of proc(5)) stands for what was printed. Services that are asked for names and time are passed over by their ports.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from typing import NamedTuple

from agent.core.facts import Coverage, Fact, Lost, WayClosed, WayHeld, WayUsed
from agent.sense import procfs
from agent.sense.connects import Connect, Connects
from agent.sense.handles import below, bluetooth_inodes, descriptors, relatives, written
from agent.sense.sockdiag import LISTEN, TCP, End, Namespace, Socket, group, loopback, spoken

_STEPS_MS = (2, 8, 40, 200, 750)
"""Waits between the first looks at a reader; then one a second, and each five seconds once it reads no more"""
_EACH_MS, _SLOW_MS, _ACTIVE_MS, _KEPT_MS = 1_000, 5_000, 60_000, 900_000
_AGAIN_MS = 200
_LONG_MS, _REST, _MOST_REST_MS = 20, 4, 2_000
"""Looks that took long (a server with 20,000 connections: 0.1 s each) are followed by a rest of so many times as long"""
_LOOKS_A_S, _KIN_LOOKS_A_S, _MOST_READERS = 100, 25, 512
_INTEREST_MS, _NOBODY_MS, _LATE_MS, _UNSEEN_MS = 60_000, 10_000, 2_000, 1_000
_SCAN_EVERY_MS = 2_000
_UNUSED_MS = 3 * _SLOW_MS
_YOUNG_MS = 60_000
_LEAST_UNSEEN = 1_024
_MOST_OWNERS, _MOST_ENDED, _MOST_NAMESPACES = 8_192, 256, 16
_ASKING = frozenset({53, 67, 68, 123, 137, 1900, 5353, 5355})
"""UDP ports of names, time and discovery"""
_IPP, _IPP_SOCKET = 631, b"/cups.sock"
_TICKS_A_S = os.sysconf("SC_CLK_TCK")
OnPid = Callable[[int], None]


def _nobody(pid: int) -> None:
    """Whoever wants no look."""


class _Reader:
    """A process that read a protected file. `seen` are the inode numbers of its sockets at the last look."""

    __slots__ = ("began_ms", "looked_ms", "next_ms", "parent", "read_ms", "seen", "step")

    def __init__(self, now_ms: int, parent: int) -> None:
        self.parent = parent
        self.read_ms = self.next_ms = now_ms
        self.step = self.looked_ms = 0
        self.began_ms: int | None = None
        self.seen: set[int] = set()


class _Owner(NamedTuple):
    """Who connected a socket, when, and when that process began."""

    pid: int
    at_ms: int
    began_ms: int | None


class _Told:
    """A way as it was told last, to whom it belongs, and by whose look."""

    __slots__ = ("base", "hands", "reader", "sent", "spooler")

    def __init__(self, reader: int, spooler: int = 0, base: int = 0) -> None:
        self.spooler, self.base = spooler, base
        self.hands: set[tuple[int, ...]] = set()
        self.reader = reader
        self.sent: int | None = -1


class _Table:
    """The sockets of a network namespace at one moment."""

    def __init__(self, namespace: Namespace, inside: bool) -> None:
        sockets = namespace.dump()
        self.by_inode = {each.inode: each for each in sockets if each.inode}
        self.by_ends = {_pair(each): each for each in sockets}
        self.addresses = frozenset(each.here[0] for each in sockets)
        self.unix = {each.inode: each for each in namespace.unix()}
        self.bluetooth = bluetooth_inodes() if inside else frozenset()


class Sockets:
    """A Sensor asked by the clock: `drain` at `due_ms`, and once a second."""

    def __init__(self, now_ms: int) -> None:
        self._readers: dict[int, _Reader] = {}
        self._owners: dict[tuple[End, End], _Owner] = {}
        self._told: dict[str, _Told] = {}
        self._ended: deque[tuple[int, Socket]] = deque(maxlen=_MOST_ENDED)
        self._serving: dict[int, int] = {}
        self._began: dict[int, tuple[int, int | None]] = {}
        self._addresses: set[bytes] = set()
        self._namespaces: dict[int, Namespace] = {}
        self._used_ms: dict[int, int] = {}
        self._scanned: tuple[int, dict[int, int]] = (0, {})
        self._read_ms = self._second = self._looks = self._kin_looks = self._took_ms = self._rest_until_ms = 0
        self._missed_ms = -_KEPT_MS
        self._refused = self._unsigned = ""
        try:
            self._namespaces[0] = Namespace()
            self._addresses = {each.here[0] for each in self._namespaces[0].dump((TCP,))}
        except OSError as error:
            self._refused = error.strerror or str(error)
        self._ours = _namespace_of("self")
        self._connects: Connects | None = None
        try:
            self._connects = Connects()
        except (OSError, ValueError) as error:
            self._unsigned = str(error)

    def fileno(self) -> int:
        """None to poll: sockets come and go all day, and matter only while somebody reads."""
        return -1

    def due_ms(self, now_ms: int) -> int:
        """When `drain` has something to look at next."""
        due_ms = min((reader.next_ms for reader in self._readers.values()), default=now_ms + _SLOW_MS)
        return max(due_ms, self._rest_until_ms) if self._resting(now_ms) else due_ms

    def reading(self, pid: int, parent: int, now_ms: int) -> None:
        """The process opened a protected file; `parent` is its parent, as it may be gone by now (0: not known)."""
        self._read_ms = now_ms
        reader = self._readers.get(pid)
        if reader is None:
            if len(self._readers) >= _MOST_READERS:
                del self._readers[next(iter(self._readers))]
            self._readers[pid] = _Reader(now_ms, parent)
            return
        reader.read_ms = now_ms
        if reader.step > len(_STEPS_MS):
            reader.next_ms = min(reader.next_ms, max(now_ms, reader.looked_ms + _AGAIN_MS))

    def drain(self, now_ms: int, on_pid: OnPid = _nobody) -> Iterator[Fact]:
        """Ways that are held, grew, or were closed. `on_pid` is called for who may be kin of a reader or holds a way."""
        yield from self._take_connects(now_ms)
        for namespace in self._namespaces.values():
            for each in namespace.destroyed():
                self._ended.append((now_ms, each))
            if namespace.lost:
                namespace.lost, self._missed_ms = False, now_ms
                if now_ms - self._read_ms <= _INTEREST_MS:
                    yield Lost(at_ms=now_ms, reason="connects_overflow", since_ms=self._took_ms or now_ms, until_ms=now_ms)
        self._took_ms = now_ms
        self._let_go(now_ms)
        while self._ended and not 0 <= now_ms - self._ended[0][0] <= _LATE_MS:
            self._owners.pop(_pair(self._ended.popleft()[1]), None)
        for _ in range(len(self._ended)):
            at_ms, each = self._ended.popleft()
            facts = list(self._end(each, at_ms, now_ms))
            if facts:
                for fact in facts:
                    if isinstance(fact, WayHeld):
                        on_pid(fact.pid)
                    yield fact
            else:
                self._ended.append((at_ms, each))  # a read may be told yet that makes it matter
        due = [(pid, reader) for pid, reader in self._readers.items() if reader.next_ms <= now_ms]
        if due and not self._resting(now_ms):
            began = time.monotonic()
            yield from self._look(due, now_ms, on_pid)
            took_ms = int((time.monotonic() - began) * 1000)
            if took_ms >= _LONG_MS:
                self._rest_until_ms = now_ms + min(_REST * took_ms, _MOST_REST_MS)

    def _resting(self, now_ms: int) -> bool:
        return 0 < self._rest_until_ms - now_ms <= _MOST_REST_MS

    def coverage(self, now_ms: int) -> Coverage:
        """Whether sockets can be asked for, and who opened them heard."""
        blind = ["network_ways"] if self._refused else ["short_lived_senders"] if self._unsigned else []
        whys = [f"sock_diag: {self._refused}"] if self._refused else []
        whys += [f"who connects is not told by this kernel: {self._unsigned}"] if self._unsigned and not whys else []
        return Coverage(at_ms=now_ms, sensor="sockets", ok=not blind, sees=["network_ways"], blind=blind, why="; ".join(whys))

    def close(self) -> None:
        """Stop listening."""
        for namespace in self._namespaces.values():
            namespace.close()
        self._namespaces.clear()
        if self._connects is not None:
            self._connects.close()
            self._connects = None

    # -- what was told by the kernel -----------------------------------------------------------------------------------

    def _take_connects(self, now_ms: int) -> Iterator[Fact]:
        if self._connects is None:
            return
        for each in self._connects.drain():
            self._own(each, now_ms)
        while len(self._owners) > _MOST_OWNERS:
            del self._owners[next(iter(self._owners))]
        lost, self._connects.lost = self._connects.lost, 0
        if lost and now_ms - self._read_ms <= _INTEREST_MS:  # else it concerned nobody who read
            yield Lost(at_ms=now_ms, reason="connects_overflow", since_ms=self._took_ms or now_ms, until_ms=now_ms, count=lost)

    def _own(self, each: Connect, now_ms: int) -> None:
        if loopback(each.there[0]):
            return
        at_ms = now_ms - max(time.monotonic_ns() - each.at_ns, 0) // 1_000_000
        self._owners.pop((each.here, each.there), None)
        self._owners[each.here, each.there] = _Owner(each.pid, at_ms, self._begun(each.pid, now_ms))

    def _end(self, ended: Socket, at_ms: int, now_ms: int) -> Iterator[Fact]:
        """A socket is gone; nothing if it does not matter as far as is known."""
        if not self._outside(ended):
            return
        told, owner = self._told.pop(ended.id, None), self._owners.get(_pair(ended))
        pid = owner.pid if owner is not None else self._serving.get(ended.here[1], 0)
        matters = told is not None or pid in self._readers or (pid > 0 and now_ms - self._read_ms <= _INTEREST_MS)
        if matters and told is None:
            since_ms, began_ms = owner[1:] if owner is not None else (None, None)
            yield _held(ended._replace(sent=0), pid, (), since_ms, began_ms, now_ms)
        if matters:
            self._owners.pop(_pair(ended), None)
            yield WayClosed(at_ms=now_ms, id=ended.id, sent=ended.sent)
        elif pid or now_ms - at_ms < _UNSEEN_MS:
            return  # who serves at this port may be known in a moment
        elif (ended.sent or 0) >= _LEAST_UNSEEN and now_ms - self._read_ms <= _NOBODY_MS:
            yield WayUsed(at_ms=now_ms, way=_way(ended), id=ended.id, sent=ended.sent or 0, peer=spoken(ended.there))

    def _outside(self, each: Socket, inside: Set[bytes] = frozenset()) -> bool:
        """Whether its other end is on another machine, and it is no question to a service of names."""
        there, port = each.there
        if each.state == LISTEN or not port or loopback(there) or group(there) or there in self._addresses or there in inside:
            return False
        return each.protocol == TCP or port not in _ASKING

    # -- looks ---------------------------------------------------------------------------------------------------------

    def _look(self, due: list[tuple[int, _Reader]], now_ms: int, on_pid: OnPid) -> Iterator[Fact]:
        tables: dict[int, _Table | None] = {}
        for pid, reader in due:
            stat = procfs.stat(pid)
            alive = stat is not None and stat.state != b"Z"
            time_left = self._next(pid, reader, now_ms)
            if not alive and reader.step > len(_STEPS_MS):
                del self._readers[pid]
                yield from self._gone(pid, set(), now_ms, True)
            elif time_left:
                reader.began_ms = _wall_ms(stat.start, now_ms) if stat is not None else None
                yield from self._examine(pid, reader, stat if alive else None, tables, now_ms, on_pid)

    def _next(self, pid: int, reader: _Reader, now_ms: int) -> bool:
        """When to look next; whether there is time for a look now."""
        idle_ms = now_ms - reader.read_ms
        steps = _STEPS_MS[reader.step : reader.step + 1]
        reader.step += 1
        reader.next_ms = now_ms + (steps[0] if steps else _EACH_MS if idle_ms <= _ACTIVE_MS else _SLOW_MS)
        if idle_ms > _KEPT_MS:
            reader.step = 0
            del self._readers[pid]
        if now_ms // 1000 != self._second:
            self._second, self._looks, self._kin_looks = now_ms // 1000, 0, 0
        self._looks += 1
        return self._looks <= _LOOKS_A_S

    def _examine(
        self,
        pid: int,
        reader: _Reader,
        stat: procfs.Stat | None,
        tables: dict[int, _Table | None],
        now_ms: int,
        on_pid: OnPid,
    ) -> Iterator[Fact]:
        """One reader: its sockets, those of its relatives, and of those whom it talks to on this machine."""
        own, pipes = descriptors(pid)
        hands = {pid: own}
        regular = reader.step not in (2, 3, 5)
        if regular and (own or pipes or stat is None) and self._kin_looks < _KIN_LOOKS_A_S:
            self._kin_looks += 1
            for each in relatives(stat) if stat is not None else below(reader.parent):
                hands[each], theirs = descriptors(each)
                self._begun(each, now_ms)
                if theirs and (stat is None or theirs & pipes):
                    on_pid(each)  # while both ends of the pipe are there
        inodes = set().union(*hands.values())
        if not inodes:
            reader.looked_ms, reader.seen = now_ms, inodes
            return
        table = self._table(pid, tables, now_ms)
        if table is None:
            return
        feeders = self._talks_to(pid, hands, table, now_ms)
        present: set[str] = set()
        for each, inodes_held in hands.items():
            for inode in inodes_held:
                found = table.by_inode.get(inode)
                if found is not None and found.state == LISTEN:
                    self._serving[found.here[1]] = each
                elif found is not None and self._outside(found, table.addresses):
                    present.add(found.id)
                    on_pid(each)
                    since_ms, began_ms = self._since(found, each, reader, now_ms)
                    fed = (pid,) if each in feeders else ()
                    yield from self._tell(_held(found, each, fed, since_ms, began_ms, now_ms), pid)
                elif inode in table.bluetooth:
                    fact = WayHeld(at_ms=now_ms, pid=each, way="bluetooth", id=f"bt:{inode}", since_ms=reader.began_ms)
                    present.add(fact.id)
                    yield from self._tell(fact, pid)
        yield from self._printing(pid, reader, hands[pid], table, present, now_ms)
        reader.looked_ms, reader.seen = now_ms, inodes
        yield from self._gone(pid, present, now_ms, False)

    def _table(self, pid: int, tables: dict[int, _Table | None], now_ms: int) -> _Table | None:
        inode = _namespace_of(str(pid))
        at = 0 if inode in (0, self._ours) else inode
        if at not in tables:
            tables[at] = None
            if at not in self._namespaces:
                self._enter(at, pid)
            if at in self._namespaces:
                self._used_ms[at] = now_ms
                table = tables[at] = _Table(self._namespaces[at], at == 0)
                if _of_the_machine(pid):  # else anybody could name any address his own, in a namespace of his
                    self._addresses |= table.addresses
        return tables[at]

    def _enter(self, at: int, pid: int) -> None:
        """Ask in another namespace; of too many, in place of the one that was looked at longest ago."""
        if len(self._namespaces) >= _MOST_NAMESPACES:
            oldest = min(self._used_ms.keys() - {0}, key=self._used_ms.__getitem__)
            self._namespaces.pop(oldest).close()
            del self._used_ms[oldest]
        try:
            self._namespaces[at] = Namespace(pid)
        except OSError as error:
            self._refused = f"{error.strerror} in another network namespace"

    def _let_go(self, now_ms: int) -> None:
        """Namespaces that nobody was looked at in lately: our sockets would keep them there though all in them have ended."""
        for at in [at for at, used_ms in self._used_ms.items() if at and not 0 <= now_ms - used_ms <= _UNUSED_MS]:
            self._namespaces.pop(at).close()
            del self._used_ms[at]

    def _talks_to(self, pid: int, hands: dict[int, set[int]], table: _Table, now_ms: int) -> set[int]:
        """Add to `hands` those at the other end of its local sockets; who they are."""
        ends = set()
        for inode in hands[pid]:
            there, near = table.unix.get(inode), table.by_inode.get(inode)
            if there is not None and there.peer:
                ends.add(there.peer)
            elif near is not None and near.state != LISTEN and not self._outside(near, table.addresses):
                other = table.by_ends.get((near.there, near.here))
                ends |= {other.inode} if other is not None else set()
        if not ends:
            return set()
        owner = {inode: each for each, mine in hands.items() if each != pid for inode in mine}
        if ends - owner.keys():
            owner = self._scan(now_ms) | owner
        others = {owner[inode] for inode in ends if inode in owner} - {pid, os.getpid()}
        hands |= {each: descriptors(each)[0] for each in others if each not in hands}
        return others

    def _scan(self, now_ms: int) -> dict[int, int]:
        """Who holds which socket on this machine: a look into every process, so not often."""
        if not 0 <= now_ms - self._scanned[0] < _SCAN_EVERY_MS:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 (names are all it takes)
            self._scanned = (now_ms, {inode: each for each in pids for inode in descriptors(each)[0]})
        return self._scanned[1]

    def _since(self, found: Socket, pid: int, reader: _Reader, now_ms: int) -> tuple[int | None, int | None]:
        """(not open before, its process began), as far as is known."""
        owner = self._owners.get(_pair(found))
        if owner is not None:
            return owner.at_ms, owner.began_ms
        began_ms = self._begun(pid, now_ms)
        if began_ms is not None and now_ms - began_ms <= _YOUNG_MS:
            return began_ms, began_ms
        return (reader.looked_ms if reader.looked_ms and found.inode not in reader.seen else None), began_ms

    def _begun(self, pid: int, now_ms: int) -> int | None:
        """When a process began; if it is gone, as it was seen alive just before."""
        stat = procfs.stat(pid)
        if stat is None:
            at_ms, began_ms = self._began.get(pid, (0, None))
            return began_ms if 0 <= now_ms - at_ms <= _LATE_MS else None
        if len(self._began) >= _MOST_OWNERS:
            self._began.clear()
        began_ms = _wall_ms(stat.start, now_ms)
        self._began[pid] = now_ms, began_ms
        return began_ms

    def _printing(
        self, pid: int, reader: _Reader, own: Iterable[int], table: _Table, present: set[str], now_ms: int
    ) -> Iterator[Fact]:
        """A connection to the print service of this machine: what the service writes meanwhile is what is printed."""
        listener = next((each.inode for each in table.unix.values() if not each.peer and _IPP_SOCKET in each.name), 0)
        for inode in own:
            peer = table.unix.get(table.unix[inode].peer) if inode in table.unix else None
            near = table.by_inode.get(inode)
            by_port = near is not None and near.there[1] == _IPP and not self._outside(near, table.addresses)
            if not by_port and (peer is None or _IPP_SOCKET not in peer.name):
                continue
            spooler = self._scan(now_ms).get(listener, 0)
            spooled = written(spooler)
            told = self._told.setdefault(f"print:{inode}", _Told(pid, spooler, spooled or 0))
            fact = WayHeld(at_ms=now_ms, pid=pid, way="print", id=f"print:{inode}", peer="ipp", since_ms=reader.began_ms)
            fact.began_ms, fact.sent = reader.began_ms, None if spooled is None else spooled - told.base
            present.add(fact.id)
            yield from self._tell(fact, pid)

    def _tell(self, fact: WayHeld, reader: int) -> Iterator[Fact]:
        """Once, and again when its count grew or another hand holds it."""
        told = self._told.get(fact.id)
        if told is None:
            told = self._told[fact.id] = _Told(reader)
        hand = (fact.pid, *fact.feeders)
        if hand not in told.hands or fact.sent != told.sent:
            told.hands.add(hand)
            told.sent = fact.sent
            yield fact

    def _gone(self, pid: int, present: set[str], now_ms: int, ended: bool) -> Iterator[Fact]:
        """Ways that end without a word of the kernel; and all, should it have dropped some."""
        lost = 0 <= now_ms - self._missed_ms <= 2 * _SLOW_MS
        for way, told in list(self._told.items()):
            if told.reader == pid and way not in present and (lost or not way.startswith("tcp:")):
                del self._told[way]
                spooled = written(told.spooler) if told.spooler else None
                sent = None if spooled is None else spooled - told.base
                yield WayClosed(at_ms=now_ms, id=way, pid=0 if ended else pid, sent=sent)


def _held(
    found: Socket, pid: int, feeders: tuple[int, ...], since_ms: int | None, began_ms: int | None, now_ms: int
) -> WayHeld:
    peer = spoken(found.there)
    way = WayHeld(at_ms=now_ms, pid=pid, way=_way(found), id=found.id, peer=peer, sent=found.sent, feeders=list(feeders))
    way.since_ms, way.began_ms = since_ms, began_ms
    return way


def _way(found: Socket) -> str:
    return "print" if found.there[1] == _IPP else "network"


def _pair(each: Socket) -> tuple[End, End]:
    return each.here, each.there


def _namespace_of(pid: str) -> int:
    target = procfs.link(f"/proc/{pid}/ns/net")
    return int(target[5:-1]) if target.startswith(b"net:[") else 0


def _of_the_machine(pid: int) -> bool:
    """Whether a process lives in our user namespace, so that only who may administer the network gave it its addresses."""
    theirs = procfs.link(f"/proc/{pid}/ns/user")
    return bool(theirs) and theirs == procfs.link("/proc/self/ns/user")


def _wall_ms(start: int, now_ms: int) -> int:
    """Clock ticks since boot as wall time."""
    return now_ms - time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000 + start * 1000 // _TICKS_A_S
