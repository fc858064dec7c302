"""One process in one life, as the core keeps it.

Owns: what is remembered of a process beyond the last look at it: when it was first told, when it began and ended, every
channel it was ever seen to hold and by which end, and what its last look found open. Must not know other processes
(`people`, `channels`) or files' meaning.
"""

from agent.contract.codes import Attribution
from agent.core.facts import Channel, OpenFile, Process

NO_LOGIN = 0xFFFF_FFFF
"""(uid_t) -1: the kernel's word for "no login uid" (proc(5))."""
_MAX_CHANNELS = 64


class Entry:
    """`encoded` is room for whoever writes the process as JSON, emptied when it changed. `channels`: since when each was seen;
    `ends`: which ends (bits, 0: not told). `taken`: the list of open files that was taken for read already."""

    __slots__ = ("channels", "encoded", "ends", "files", "first_ms", "gone_ms", "process", "seen_ms", "taken")

    def __init__(self, process: Process, at_ms: int) -> None:
        self.process = process
        self.first_ms = self.seen_ms = at_ms
        self.gone_ms: int | None = process.ended_ms
        self.channels: dict[Channel, int] = {}
        self.ends: dict[Channel, int] = {}
        self.files: list[OpenFile] = process.files
        self.encoded: object = None
        self.taken: object = None
        self.hold(process, at_ms)

    def hold(self, process: Process, at_ms: int) -> None:
        """Remember the channels that a look found, beside those of earlier looks."""
        ends = process.ends if len(process.ends) == len(process.pipes) else [0] * len(process.pipes)
        for channel, end in zip(process.pipes, ends, strict=True):
            if channel in self.channels or len(self.channels) < _MAX_CHANNELS:
                self.channels.setdefault(channel, at_ms)
                self.ends[channel] = self.ends.get(channel, 0) | end

    @property
    def born_ms(self) -> int:
        """When it began; if nobody told, when it was first told of, which is later."""
        began_ms = self.process.began_ms
        return self.first_ms if began_ms is None else min(began_ms, self.first_ms)

    @property
    def login_uid(self) -> int | None:
        """The login uid, None if the kernel has none for this process."""
        uid = self.process.loginuid
        return None if uid is None or uid == NO_LOGIN or uid < 0 else uid

    @property
    def attribution(self) -> Attribution:
        """How the process was known."""
        return "exact" if self.process.known == "exact" else "cached"

    @property
    def blind(self) -> bool:
        """Whether it can have held what nobody saw: it was never looked at, or was ending then, or became another program."""
        return self.process.blind or self.process.known != "exact" or not self.process.exe

    @property
    def became_another(self) -> bool:
        """Whether it was looked at, and became a program since that nobody saw alive."""
        return self.process.blind and self.process.known == "exact"
