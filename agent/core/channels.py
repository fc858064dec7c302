"""Who can have handed bytes to whom: pipes, named pipes and pairs of sockets, by the ends that processes were seen to hold.

Question: from which processes can this one have been fed? Owns: who was seen to hold which channel, and the way from a writer
upstream, over any number of stages. Must not know files, media, or why somebody asks.

A channel is an int (an unnamed pipe's inode number) or a word (`fifo:DEV:INODE`, `unix:INODE:INODE`, `tcp:END-END`). An end is
READS or WRITES of a pipe, or the first or second socket of a pair (the same two bits). Bytes go from who writes to who reads,
and between sockets from either end to the other. So who inherited the same end of a session's pipe is no stage of a
pipeline. Where ends were not told, a pipe that an ancestor held long before, or that outlived other holders, links nobody.
Of sockets a way takes only one: everybody is connected to a message bus.
"""

from collections.abc import Callable, Collection, Iterable, Iterator

from agent.core.entry import Entry
from agent.core.facts import Channel

READS, WRITES = 1, 2
_CROWD = 12
_MOST_LINKED = 256
_OLD_PIPE_MS = 1_000
_OVERLAP_MS = 2_000


class Channels:
    """`entry` answers for the living and the lately dead, `ancestors` with the parents of a pid, nearest first."""

    def __init__(self, entry: Callable[[int], Entry | None], ancestors: Callable[[int], Iterable[int]]) -> None:
        self._entry, self._ancestors = entry, ancestors
        self._holders: dict[Channel, dict[int, int]] = {}
        self._counts: dict[Channel, list[int]] = {}
        """How many hold no end that was told, the first, the second, both: thousands may have inherited one pipe"""

    def held(self, entry: Entry) -> None:
        """Take in what a process holds now."""
        pid = entry.process.pid
        for channel, end in entry.ends.items():
            holders = self._holders.setdefault(channel, {})
            before = holders.get(pid)
            if before != end:
                counts = self._counts.setdefault(channel, [0, 0, 0, 0])
                if before is not None:
                    counts[before] -= 1
                counts[end] += 1
                holders[pid] = end

    def dropped(self, entry: Entry) -> None:
        """A process is forgotten."""
        for channel in entry.channels:
            holders = self._holders.get(channel)
            end = holders.pop(entry.process.pid, None) if holders is not None else None
            if end is not None:
                self._counts[channel][end] -= 1
                if not holders:
                    del self._holders[channel], self._counts[channel]

    def upstream(self, pid: int) -> list[int]:
        """Who can have fed `pid`, nearest first."""
        linked: dict[int, bool] = {}
        todo = [(pid, False)]
        for here, by_socket in todo:
            for other, socket in self._feeders(here, by_socket):
                if other != pid and other not in linked and len(linked) < _MOST_LINKED:
                    linked[other] = socket
                    todo.append((other, by_socket or socket))
        return list(linked)

    def unfed(self, pid: int) -> bool:
        """Whether it reads a channel of its own that nobody was seen to write to."""
        return any(True for _ in self._lacks(pid, READS, WRITES))

    def unfed_by_name(self, pid: int) -> bool:
        """Whether such a channel is a socket or a named pipe: who writes to it may have opened it after we looked."""
        return any(isinstance(channel, str) for channel in self._lacks(pid, READS, WRITES))

    def unheard(self, pid: int) -> bool:
        """Whether it writes to a channel of its own that nobody was seen to read."""
        return any(True for _ in self._lacks(pid, WRITES, READS))

    def _lacks(self, pid: int, own: int, missing: int) -> Iterator[Channel]:
        entry = self._entry(pid)
        for channel, since_ms in entry.channels.items() if entry is not None else ():
            end, socket = self._end(pid, channel), _is_socket(channel)
            if (end and not end & own and not socket) or self._inherited(channel, pid, since_ms):
                continue
            others = self._others(pid, channel)
            if socket and any(each & end for each in others):
                continue  # they inherited it from somebody
            if not socket and end == READS | WRITES and any(each & own for each in others):
                continue  # it holds both ends, and another one does what is asked for: it is the other side itself
            met = (not each or not end or (_fed(end, each, True) if socket else bool(each & missing)) for each in others)
            if not any(met) and not (socket and end == 3):
                yield channel

    def _others(self, pid: int, channel: Channel) -> list[int]:
        """Which ends others hold, each once."""
        own = self._holders.get(channel, {}).get(pid)
        counts = self._counts.get(channel, ())
        return [end for end, count in enumerate(counts) if count > (1 if end == own else 0)]

    def _feeders(self, here: int, by_socket: bool) -> Iterator[tuple[int, bool]]:
        entry = self._entry(here)
        for channel, since_ms in entry.channels.items() if entry is not None else ():
            holders = self._holders.get(channel, {})
            socket = _is_socket(channel)
            if len(holders) < 2 or (socket and by_socket):
                continue
            end, others = self._end(here, channel), self._others(here, channel)
            if not any(_fed(end, each, socket) for each in others):
                continue
            vague = not end or 0 in others
            crowd = len(holders) > _CROWD
            if vague and (crowd or self._inherited(channel, here, since_ms) or self._outlived(holders.keys())):
                continue
            for other in sorted(holders.keys() - {here}):
                if _fed(end, self._end(other, channel), socket) and self._overlap(here, other):
                    yield other, socket

    def _end(self, pid: int, channel: Channel) -> int:
        entry = self._entry(pid)
        return entry.ends.get(channel, 0) if entry is not None else 0

    def _inherited(self, channel: Channel, pid: int, since_ms: int) -> bool:
        """Whether an ancestor was seen to hold the same end well before `pid` was seen at all: then it is not its own."""
        end = self._end(pid, channel)
        for parent in self._ancestors(pid):
            entry = self._entry(parent)
            held_ms = entry.channels.get(channel) if entry is not None else None
            if entry is not None and held_ms is not None and (_is_socket(channel) or since_ms - held_ms >= _OLD_PIPE_MS):
                theirs = entry.ends[channel]
                return not end or not theirs or bool(end & theirs)
        return False

    def _outlived(self, holders: Collection[int]) -> bool:
        """Whether a pipe was given to a process after another of the same parent that held it had ended: it is the parent's."""
        if len(holders) < 3:
            return False
        ended: dict[int, int] = {}
        entries = [entry for holder in holders if (entry := self._entry(holder)) is not None]
        for each in entries:
            if each.gone_ms is not None and each.process.ppid:
                ended[each.process.ppid] = min(each.gone_ms, ended.get(each.process.ppid, each.gone_ms))
        return any(each.born_ms > ended.get(each.process.ppid, each.born_ms) for each in entries)

    def _overlap(self, one: int, other: int) -> bool:
        first, second = self._entry(one), self._entry(other)
        if first is None or second is None:
            return False
        return not (
            (first.gone_ms is not None and second.born_ms - first.gone_ms > _OVERLAP_MS)
            or (second.gone_ms is not None and first.born_ms - second.gone_ms > _OVERLAP_MS)
        )


def _is_socket(channel: Channel) -> bool:
    return isinstance(channel, str) and not channel.startswith("fifo:")


def _fed(here: int, there: int, socket: bool) -> bool:
    """Whether bytes can have gone from the end `there` to the end `here`; yes if nobody told which they are."""
    if not here or not there:
        return True
    if socket:
        return bool((here & 1 and there & 2) or (here & 2 and there & 1))
    return bool(here & READS and there & WRITES)
