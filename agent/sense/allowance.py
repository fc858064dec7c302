"""How long files may be looked into, so that a storm of questions can't keep the agent from its sensors.

Owns: a share of the time, with some of it saved up for a burst. A look takes from 0.1 to 200 ms; a build by somebody who read a
protected file asks for thousands. Must not know what is looked at, or what becomes of questions that must wait.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE, SAVED_S = 0.2, 0.5
WAITED = 0.25
"""What of the time counts in which we waited, for a disk or, on a busy machine, for a processor: a look takes ten times as long
there, and joins that nobody doubts for want of time are wrong more often"""


class Allowance:
    """`left` tells whether there is time for one more look; `spending` takes the time of one from what is left."""

    def __init__(self, share: float = SHARE, saved_s: float = SAVED_S) -> None:
        self._share, self._most_s = share, saved_s
        self._saved_s, self._at = saved_s, time.monotonic()

    @property
    def left(self) -> bool:
        """Whether a look may be taken now, however long it takes."""
        now = time.monotonic()
        self._saved_s = min(self._most_s, self._saved_s + (now - self._at) * self._share)
        self._at = now
        return self._saved_s > 0

    @contextmanager
    def spending(self) -> Iterator[None]:
        """A look."""
        began, worked = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            work_s = time.thread_time() - worked
            self._saved_s -= work_s + max(0.0, time.monotonic() - began - work_s) * WAITED
