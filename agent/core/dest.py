"""A file that is being written to where protected bytes may go, and a source that was found in it.

Owns: what is remembered of a destination from its first sight to its settling (`joins`), which grading looks at. Must not
know reads, processes or how a join is graded (`grading`).
"""

from typing import NamedTuple

from agent.contract.codes import Link
from agent.core.facts import FileFact, OpenFile
from agent.core.media import Mount
from agent.core.reads import Read

_UNSEEN_START_MS = 600_000
_TELL_NO_BEGINNING = ("exfat", "fuse", "btrfs")
"""File systems of which the kernel tells finished writes only (they have no file handles, or not for all of it)."""


class Left(NamedTuple):
    """One protected source that left: `bytes` None if no size was ever seen."""

    read: Read
    bytes: int | None
    link: Link
    confidence: float
    pid: int = 0
    """Who read it, if that is not the writer"""


class Dest:
    """A file on a medium, or (`mount` None) elsewhere on the machine, from its first sight to its settling. `begun`: it was
    told when it was made; `before`: its size when it arrived the last time, if that was lately."""

    __slots__ = (
        "at_ms",
        "before",
        "begun",
        "closed_order",
        "due_ms",
        "files",
        "first_ms",
        "first_order",
        "found",
        "key",
        "maker",
        "mount",
        "named",
        "names",
        "path",
        "pid",
        "ripe",
        "seen_ms",
        "size",
    )

    def __init__(self, fact: FileFact, mount: Mount | None, order: int, begun: bool) -> None:
        path = fact.path
        self.key, self.mount, self.path, self.pid = fact.key, mount, path, fact.pid
        name = path[path.rfind("/") + 1 :]
        self.maker, self.seen_ms = fact.pid, fact.at_ms
        self.names = [name]
        self.named = (fact.pid, name)
        self.first_ms = fact.at_ms if begun else fact.at_ms - _UNSEEN_START_MS
        self.at_ms = self.due_ms = fact.at_ms
        self.first_order = self.closed_order = order
        self.size: int | None = None
        self.begun = begun
        self.before: int | None = None
        self.files: list[OpenFile] = []
        self.found = self.ripe = False

    @property
    def medium(self) -> str:
        """The medium it is on; empty if it lies elsewhere on the machine."""
        return self.mount.medium.id if self.mount is not None else ""

    @property
    def base(self) -> int:
        """Bytes that may have been there before."""
        return self.before if self.before is not None and self.before < (self.size or 0) else 0

    @property
    def appended(self) -> bool:
        """Whether it was there before, and nobody knows how large: a line may have been added, or all written anew."""
        untold = self.mount is not None and self.mount.fs.startswith(_TELL_NO_BEGINNING)
        return not self.begun and self.before is None and not self.found and not untold

    def renamed(self, path: str) -> None:
        """It has another name now."""
        self.path = path
        self.names.insert(0, path[path.rfind("/") + 1 :])
