"""How much one person carried out, in many sliding windows at once.

Question: is it more than a limit allows? Owns: the counters, per person and limit, in buckets (so memory does not grow with
events), and when a finding is due: at the limit, then at each doubling (2×, 4×, …) until the window emptied below the limit.
Must not know events or media. Counters leave and return as bytes, so that a restart forgets nothing.

Bytes add up with every copy, the same file twice counts twice. `files` counts distinct source files: each counts once, in
the bucket where it was last seen. A window of W seconds has 60 buckets and covers between W and W + W/60, never less.
A clock that jumps back makes what was counted "just now", so that it is kept longer, not lost.
"""

from hashlib import blake2b

import msgspec
from msgspec import Struct

BUCKETS = 60
_MOST_FILES = 20_000
_MOST_PEOPLE = 2_000
_EVIDENCE = 100


class WindowLimit(Struct, frozen=True, kw_only=True):
    """A limit as configured; 0 bytes or files: not limited. `ways`: what left by these counts; empty: by any."""

    name: str
    window_s: int
    bytes: int = 0
    files: int = 0
    ways: tuple[str, ...] = ()


class Passed(Struct):
    """A limit was passed: what was counted in its window, and the uids of the last events that count."""

    limit: WindowLimit
    bytes: int
    files: int
    events: list[str]


class _Window(Struct, array_like=True):
    """Counters of one person and limit. `buckets`: number → [bytes, unremembered files]; `files`: digest → bucket.

    `bytes` and `unremembered` are the sums over `buckets`.
    """

    buckets: dict[int, list[int]] = {}
    files: dict[int, int] = {}
    fired: int = 0
    newest: int = 0
    bytes: int = 0
    unremembered: int = 0


class _Person(Struct, array_like=True):
    windows: dict[str, _Window] = {}
    events: list[tuple[int, str]] = []


_Open = tuple[WindowLimit, _Window, int, list[int]]
"""A limit, a person's window of it, the number of its newest bucket, and that bucket"""


class Limits:
    """`add` counts one copied source of one person. `changed` tells that there is something new to keep."""

    def __init__(self, limits: list[WindowLimit]) -> None:
        self.limits = limits
        self._people: dict[str, _Person] = {}
        self._latest: tuple[str, int, list[WindowLimit]] = ("", 0, [])
        self._known, self._open = _Person(), list[_Open]()
        self.changed = False

    def add(self, person: str, at_ms: int, size_bytes: int, source: str, event_uid: str, way: str = "mount") -> list[Passed]:
        """Count; the limits that this passed just now. `source` names the file, `person` is any stable word for a person."""
        self.changed = True
        who, when_ms, limits = self._latest
        if person != who or at_ms != when_ms or limits is not self.limits:
            self._turn_to(person, at_ms)
        events = self._known.events
        events.append((at_ms, event_uid))
        if len(events) > 2 * _EVIDENCE:
            del events[:_EVIDENCE]
        digest = int.from_bytes(blake2b(source.encode(), digest_size=8).digest(), "big")
        size_bytes = max(size_bytes, 0)
        passed = []
        for limit, window, bucket, here in self._open:
            if limit.ways and way not in limit.ways:
                continue
            files = window.files
            here[0] += size_bytes
            window.bytes += size_bytes
            if files.pop(digest, None) is not None or len(files) < _MOST_FILES:
                files[digest] = bucket  # moved to the end: the oldest are at the front
            else:
                here[1] += 1
                window.unremembered += 1
            if _fires(window, limit, window.bytes, window.unremembered + len(files)):
                since = at_ms - limit.window_s * 1000
                evidence = [uid for when, uid in events if when > since][-_EVIDENCE:]
                passed.append(Passed(limit, window.bytes, window.unremembered + len(files), evidence))
        return passed

    def _turn_to(self, person: str, at_ms: int) -> None:
        """The windows of a person and their buckets of this time; kept, as copies come in storms."""
        if person != self._latest[0]:
            self._people[person] = self._people.pop(person) if person in self._people else _Person()
            if len(self._people) > _MOST_PEOPLE:
                del self._people[next(iter(self._people))]
        self._latest, self._known, self._open = (person, at_ms, self.limits), self._people[person], []
        for limit in self.limits:
            window = self._known.windows.setdefault(limit.name, _Window())
            bucket = _bucket(limit, at_ms)
            _expire(window, bucket)
            self._open.append((limit, window, bucket, window.buckets.setdefault(bucket, [0, 0])))

    def _forget_latest(self) -> None:
        self._latest = ("", 0, [])

    def counted(self, person: str, limit: WindowLimit, at_ms: int) -> tuple[int, int]:
        """(bytes, distinct files) of a person in a limit's window that ends at `at_ms`."""
        window = self._people.get(person, _Person()).windows.get(limit.name)
        if window is None:
            return 0, 0
        _expire(window, _bucket(limit, at_ms))
        self._forget_latest()
        return window.bytes, window.unremembered + len(window.files)

    def sweep(self, now_ms: int) -> None:
        """Forget people whose windows are all empty, and limits that are no longer configured."""
        by_name = {limit.name: limit for limit in self.limits}
        for person, known in list(self._people.items()):
            known.windows = {name: window for name, window in known.windows.items() if name in by_name}
            for name, window in known.windows.items():
                _expire(window, _bucket(by_name[name], now_ms))
            if not any(window.buckets or window.files for window in known.windows.values()):
                del self._people[person]
                self.changed = True
        self._forget_latest()

    def to_bytes(self) -> bytes:
        """All counters."""
        return msgspec.msgpack.encode(self._people)

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        self._forget_latest()
        self._people = msgspec.msgpack.decode(data, type=dict[str, _Person])


def _bucket(limit: WindowLimit, at_ms: int) -> int:
    return at_ms * BUCKETS // (max(limit.window_s, 1) * 1000)


def _expire(window: _Window, bucket: int) -> None:
    if bucket == window.newest:
        return
    if bucket < window.newest:  # the clock went back: all later buckets become this one
        late = [number for number in window.buckets if number > bucket]
        for number in late:
            size_bytes, files = window.buckets.pop(number)
            here = window.buckets.setdefault(bucket, [0, 0])
            here[0] += size_bytes
            here[1] += files
        for digest in [digest for digest, number in window.files.items() if number > bucket]:
            window.files[digest] = bucket
    window.newest = bucket
    first = bucket - BUCKETS
    for number in [number for number in window.buckets if number < first]:
        size_bytes, files = window.buckets.pop(number)
        window.bytes -= size_bytes
        window.unremembered -= files
    old = []
    for digest, number in window.files.items():
        if number >= first:
            break
        old.append(digest)
    for digest in old:
        del window.files[digest]


def _fires(window: _Window, limit: WindowLimit, size_bytes: int, files: int) -> bool:
    """Whether a finding is due. `fired` is the multiple of the limit at which the next one is not due yet."""
    by_bytes, by_files = size_bytes // limit.bytes if limit.bytes else 0, files // limit.files if limit.files else 0
    level = by_bytes if by_bytes > by_files else by_files
    if level == 0:
        window.fired = 0
        return False
    if level < window.fired * 2:
        return False
    window.fired = 1 << (level.bit_length() - 1)
    return True
