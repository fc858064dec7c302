"""Sizes of files that were opened earlier, looked up when the core finds that they matter.

Owns: one lstat for each path asked for. Almost all that is read is never written to a medium, so nothing is looked up when
it is opened. Must not know why a size is wanted. Called by `daemon` with what `Core.ask` names, answered at once.
"""

import os
import stat
from collections.abc import Iterable, Iterator

from agent.contract.event import path_bytes
from agent.core.facts import Fact, Sized


def look(paths: Iterable[str], now_ms: int) -> Iterator[Fact]:
    """Sized for each path, without a size if there is no regular file any more. Paths are spelt by `path_text`."""
    for path in paths:
        fact = Sized(at_ms=now_ms, path=path)
        try:
            found = os.lstat(path_bytes(path))
        except (OSError, ValueError):
            yield fact
            continue
        if stat.S_ISREG(found.st_mode):
            fact.size, fact.inode = found.st_size, found.st_ino
        yield fact
