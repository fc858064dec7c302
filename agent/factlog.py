"""The record of facts that `run --record FILE` keeps, for `replay`: NDJSON, its owner's alone, without secrets.

Owns: opening that file (facts hold names of private files) and masking what command lines give away, before it is written:
the same words are hidden as in events. Must not know what a fact means otherwise. From `daemon`, one fact after another.
"""

import os

from msgspec import structs

from agent.core import facts
from agent.core.facts import Fact, ProcSeen
from agent.core.masks import masked


class NotPrivate(Exception):
    """Others may read the file; str() says what to do."""


class FactLog:
    """An open record. Raises OSError if it can't be made, NotPrivate."""

    def __init__(self, path: str) -> None:
        self._missing = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            os.close(self._fd)
            raise NotPrivate(f"{path}: may be read by others; remove it, or chmod 600 it and make it yours")

    def write(self, fact: Fact) -> None:
        """Append one fact. On a full disk nothing is written, and where the record goes on it says how many are missing."""
        if isinstance(fact, ProcSeen):
            process = structs.replace(fact.process, argv=masked(fact.process.argv))
            fact = structs.replace(fact, process=process)
        line = facts.write(fact) + b"\n"
        if self._missing:
            line = b"# %d facts are missing here, as they could not be written\n" % self._missing + line
        end = os.fstat(self._fd).st_size
        try:
            whole = os.write(self._fd, line) == len(line)
        except OSError:
            whole = False
        if whole:
            self._missing = 0
            return
        self._missing += 1
        os.ftruncate(self._fd, end)  # of half a line nobody could read the rest
