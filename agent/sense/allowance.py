"""How long files may be looked into, so that a storm of questions can't keep the agent from its sensors.

Owns: a share of the time, with some of it saved up for a burst. A look takes from 0.1 to 200 ms; a build by somebody who read a
protected file asks for thousands. Must not know what is looked at, or what becomes of questions that must wait.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE, SAVED_S = 0.2, 0.5


class Allowance:
    """`left` tells whether there is time for one more look; `spending` takes the time of one from what is left."""

    def __init__(self) -> None:
        self._saved_s, self._at = SAVED_S, time.monotonic()

    @property
    def left(self) -> bool:
        """Whether a look may be taken now, however long it takes."""
        now = time.monotonic()
        self._saved_s = min(SAVED_S, self._saved_s + (now - self._at) * SHARE)
        self._at = now
        return self._saved_s > 0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """A look."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._saved_s -= time.monotonic() - began
