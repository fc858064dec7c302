"""Events that are not durable yet, in order, kept small: what the recorder has in hand while the disk is slow or full.

Owns: the order, the room (bytes, not events: one can be fifty times another), and what is given up once that is full: low
severities first, oldest first, never findings or `agent.gap`. The newest events stay as they are; from a thousand on, the
oldest of them are packed, 500 together, which makes 70 bytes of each 3,000: a storm of 50,000 fits while the disk is full.
Must not know the spool, threads (its owner locks) or how a loss is told.
"""

import zlib
from collections import Counter, deque

import msgspec

from agent.contract.codes import FINDING
from agent.contract.event import Event
from agent.contract.form import AnyEvent

MAX_PACKED_BYTES = 8 << 20
"""About 80,000 copies of small files by one program."""
_BLOCK = 500
_LOOSE = 1_000
_LEVEL = 1  # zlib: a higher one makes a tenth less and takes three times as long
_decode = msgspec.json.Decoder(list[Event]).decode


class _Block:
    """Packed events, oldest first. `light`: how many may be given up, by severity."""

    __slots__ = ("count", "light", "packed", "since_ms")

    def __init__(self, events: list[AnyEvent]) -> None:
        self.packed = zlib.compress(b"[" + b",".join(event.seal(0, 0, b"") for event in events) + b"]", _LEVEL)
        self.count = len(events)
        self.since_ms = min(event.time for event in events)
        self.light = Counter(event.severity_id for event in events if _light(event))

    def events(self) -> list[AnyEvent]:
        return [*_decode(zlib.decompress(self.packed))]


class Shed(msgspec.Struct, frozen=True):
    """What was given up: how many events, and the time of the oldest (ms)."""

    count: int
    since_ms: int


class Backlog:
    """`put` at one end, `take` from the other; what was taken counts until it is `done`."""

    def __init__(self, max_bytes: int = MAX_PACKED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._taken: list[AnyEvent] = []
        self._blocks: deque[_Block] = deque()
        self._packed = self._packed_bytes = 0
        self._loose: list[AnyEvent] = []

    def __len__(self) -> int:
        """How many events are not durable yet."""
        return len(self._taken) + self._packed + len(self._loose)

    @property
    def since_ms(self) -> int | None:
        """The time of the oldest event that is not durable yet; None if there is none."""
        times = [event.time for event in (*self._taken, *self._loose)] + [block.since_ms for block in self._blocks]
        return min(times, default=None)

    def put(self, events: list[AnyEvent]) -> Shed | None:
        """Add the newest events. Returns what had to be given up for them."""
        self._loose.extend(events)
        while len(self._loose) > _LOOSE + _BLOCK:
            self._pack(self._loose[:_BLOCK])
            del self._loose[:_BLOCK]
        return self._shed() if self._packed_bytes > self._max_bytes else None

    def take(self, most: int) -> list[AnyEvent]:
        """The oldest events, the same ones again until they are `done`."""
        if not self._taken and self._blocks:
            block = self._blocks.popleft()
            self._count(block, -1)
            self._taken = block.events()
        elif not self._taken:
            self._taken, self._loose = self._loose[:most], self._loose[most:]
        return self._taken

    @property
    def all_taken(self) -> bool:
        """Whether nothing waits behind what was taken."""
        return not self._packed and not self._loose

    def done(self) -> None:
        """What was taken is durable."""
        self._taken = []

    def _pack(self, events: list[AnyEvent], at: int | None = None) -> None:
        block = _Block(events)
        self._blocks.insert(len(self._blocks) if at is None else at, block)
        self._count(block, 1)

    def _count(self, block: _Block, sign: int) -> None:
        self._packed += sign * block.count
        self._packed_bytes += sign * len(block.packed)

    def _shed(self) -> Shed | None:
        """Give up until a tenth of the room is free, or only findings and gaps are left."""
        goal, dropped, since_ms = self._max_bytes - self._max_bytes // 10, 0, 1 << 62
        for severity in sorted({each for block in self._blocks for each in block.light}):
            for block in [block for block in self._blocks if block.light[severity]]:
                if self._packed_bytes <= goal:
                    break
                gone: list[AnyEvent] = []
                kept: list[AnyEvent] = []
                for event in block.events():
                    (gone if event.severity_id == severity and _light(event) else kept).append(event)
                dropped, since_ms = dropped + len(gone), min(since_ms, *(event.time for event in gone))
                at = self._blocks.index(block)
                del self._blocks[at]
                self._count(block, -1)
                if kept:
                    self._pack(kept, at)
        return Shed(dropped, since_ms) if dropped else None


def _light(event: AnyEvent) -> bool:
    """Whether it may be given up."""
    return event.class_uid != FINDING and event.code != "agent.gap"
