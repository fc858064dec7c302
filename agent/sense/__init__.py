"""Edges in: one kernel or desktop source each, turned into facts. They judge nothing and do not import each other.

What one edge must tell another goes through `daemon`, which owns them all and calls them from one thread.
"""

from collections.abc import Iterator
from typing import Protocol

from agent.core.facts import Coverage, Fact


class SensorError(Exception):
    """A sensor can't do its work here; str() is one sentence that says why and what to do."""


class Sensor(Protocol):
    """What `daemon` asks of every edge. No method blocks."""

    def fileno(self) -> int:
        """The descriptor to poll for reading; -1 if the sensor is asked by the clock instead."""
        ...

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """All that was seen since the last call, oldest first; never raises for what the outside world does."""
        ...

    def coverage(self, now_ms: int) -> Coverage:
        """What it sees and does not see on this machine, now."""
        ...

    def close(self) -> None:
        """Give back every descriptor and mark. Twice does no harm."""
        ...
