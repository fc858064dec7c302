"""Whether a file came from a medium: a look at it and at what its writer opened there, and at scripts that are run from one.

Question: was this written from that? Owns: the order of the looks, cheapest first (an archive's own list, then bytes), and
which programs run scripts: those that the machine's own commands name in their first line (`#!`, execve(2)). Must not know
people, media or what follows. Asked by `senses` within its allowance, with what `core.inbound` wants; nothing is kept open.
"""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.contract.event import path_bytes, path_text
from agent.core.facts import Traced
from agent.sense.archives import Archives, is_archive
from agent.sense.likeness import compare

_COMMANDS = (b"/usr/bin", b"/usr/sbin", b"/usr/local/bin", b"/bin")
_MOST_COMMANDS = 8_000
_LINE = 256
_EXECUTABLE = (b"\x7fELF", b"#!", b"MZ")

Where = Callable[[bytes], tuple[bytes, os.stat_result] | None]


class Question(Protocol):
    """`core.inbound.Trace`."""

    @property
    def key(self) -> bytes:
        """The file's."""

    @property
    def path(self) -> str:
        """Last known."""

    @property
    def sources(self) -> Sequence[tuple[str, int | None]]:
        """On media."""

    @property
    def total(self) -> int:
        """Bytes of them."""

    @property
    def plain(self) -> bool:
        """It is known already."""

    @property
    def joined(self) -> bool:
        """Its bytes may be those of the sources."""

    @property
    def new(self) -> bool:
        """Made after they were opened."""

    @property
    def run_by(self) -> str:
        """Of a script."""


class Origins:
    """`look` at one question. Archives' lists, and the interpreters of this machine, are remembered."""

    def __init__(self) -> None:
        self._archives = Archives()
        self._interpreters: set[bytes] | None = None

    def look(self, asked: Question, where: Where, now_ms: int) -> Traced:
        """What is to be said of one file. `where` finds it by its key."""
        if asked.run_by:
            how, size = self._script(path_bytes(asked.path), path_bytes(asked.run_by))
            return Traced(at_ms=now_ms, key=asked.key, path=asked.path, how=how, size=size)
        looked = where(asked.key)
        if looked is None:
            return Traced(at_ms=now_ms, key=asked.key, path=asked.path, how="gone")
        raw, seen = looked
        how, source = ("copied", "") if asked.plain else self._how(asked, raw, seen.st_size)
        program = how in ("copied", "extracted", "unpacked") and _head(raw, 4).startswith(_EXECUTABLE)
        fact = Traced(at_ms=now_ms, key=asked.key, path=path_text(raw), how=how, size=seen.st_size, source=source)
        fact.program = program
        return fact

    def _how(self, asked: Question, raw: bytes, size: int) -> tuple[str, str]:
        name, packed, known = raw.rpartition(b"/")[2], "", False
        for path, _ in asked.sources:
            archive = self._archives.of(path_bytes(path))
            known = known or archive is not None
            if archive is None or not archive.is_one:
                continue
            holds = archive.holds(name, size)
            if holds:
                return "extracted", path
            if holds is None and not packed:
                packed = path
        if asked.joined and known:
            sources = [(path_bytes(path), count) for path, count in asked.sources]
            alike = compare(raw, sources, asked.total)
            if alike in ("same", "part") or (alike == "packed" and is_archive(_head(raw, 512))):  # not a thumbnail of it
                return "copied", ""
        if packed and asked.new:
            return "unpacked", packed
        return "other" if known else "unknown", ""

    # -- scripts -------------------------------------------------------------------------------------------------------

    def _script(self, path: bytes, exe: bytes) -> tuple[str, int]:
        """Whether `exe`, which opened the file that its command line names first, runs it: the script says so itself, or `exe`
        is what runs scripts on this machine."""
        try:
            size = os.stat(path).st_size  # noqa: PTH116 (raw bytes)
        except OSError:
            return "unknown", 0
        if exe in named(_head(path, _LINE)):
            return "script", size
        if self._interpreters is None:
            self._interpreters = interpreters()
        return ("perhaps_script" if exe in self._interpreters else "other"), size


def named(head: bytes) -> set[bytes]:
    """The programs that a script's first line names, by their real paths: with a path, or (for env(1)) without."""
    if not head.startswith(b"#!"):
        return set()
    found: set[bytes] = set()
    for word in head[2:].split(b"\n", 1)[0].split()[:4]:
        paths = [word] if word.startswith(b"/") else [b"%s/%s" % (folder, word) for folder in _COMMANDS if b"/" not in word]
        found.update(os.path.realpath(path) for path in paths if b"\0" not in path and os.access(path, os.X_OK))
    return found


def interpreters() -> set[bytes]:
    """The programs that this machine's commands name in their first line, by their real paths."""
    found: set[bytes] = set()
    lines: set[bytes] = set()
    count = 0
    for folder in dict.fromkeys(os.path.realpath(folder) for folder in _COMMANDS):
        try:
            names = os.listdir(folder)  # noqa: PTH208 (raw bytes)
        except OSError:
            continue
        for name in names[: _MOST_COMMANDS - count]:
            line = _head(folder + b"/" + name, _LINE).split(b"\n", 1)[0]
            if line not in lines:
                lines.add(line)
                found |= named(line)
        count += len(names)
    return found


def _head(path: bytes, most: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""
    try:
        return os.pread(fd, most, 0)
    except OSError:
        return b""
    finally:
        os.close(fd)
