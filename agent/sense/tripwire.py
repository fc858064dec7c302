"""The tripwire on protected files, in the small process that holds opens: whoever opens one first arms the watch on writes.

Question: is somebody reading protected files just now? Owns: a permission group of its own (FAN_OPEN_PERM on protected
directories, on staged and moved-out files), and the two switches that it throws while the first opener is held: the mark for
finished writes on every system file system (the agent's group, handed down to us), and an ignore mark there for its own
group, so that nobody is held again. Both take about 40 us; then the opener goes on. Must not know which paths these are, who
reads, or when it is over: the agent says "set" (hold the next one again) and later "disarm".

It opens nothing, waits for nobody and never denies: the agent may be stopped or gone. Dies with its process, and then the
kernel lets whoever is held go on. Nothing is done twice while tripped, so a storm of opens is held once.

Why holding: a copy of a small file takes 0.15 ms from open to close. Told afterwards, the watch came too late for 1 to 47 of
100 single copies, even in real time; held, for none (docs/staging.md).
"""

import errno
import os

from agent.sense import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:  # as in `holding.py`
    from collections.abc import Callable

_MASK = kernel.FAN_OPEN_PERM | kernel.FAN_EVENT_ON_CHILD
_SYSTEM = kernel.FAN_MARK_ADD | kernel.FAN_MARK_FILESYSTEM
_IGNORE = _SYSTEM | kernel.FAN_MARK_IGNORED_MASK | kernel.FAN_MARK_IGNORED_SURV_MODIFY
_FLUSH = kernel.FAN_MARK_FLUSH | kernel.FAN_MARK_FILESYSTEM


class Tripwire:
    """`answer` when `group` is readable, `obey` for what the agent orders. `writes` is the agent's group, inherited."""

    def __init__(self, writes: int) -> None:
        flags = kernel.FAN_CLASS_CONTENT | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK
        self.group = kernel.fanotify_init(flags | kernel.FAN_UNLIMITED_QUEUE | kernel.FAN_UNLIMITED_MARKS)
        self._writes = writes
        self._systems: list[bytes] = []
        self._trees: list[bytes] = []
        self._marked = 0
        self._refused = 0
        self._tripped = False
        self.trips = 0

    def answer(self, look: "Callable[[int], None]") -> bool:
        """Arm, `look` at who tripped it, then let everybody go on who is held. True if it was not tripped before."""
        try:
            buffer = os.read(self.group, 8192)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                self._refused += 1  # a file could not be opened for us (EIO): its opener was refused, too
            return False
        news = self.trip()
        offset = 0
        while offset + kernel.EVENT_METADATA.size <= len(buffer):
            length, _, _, _, _, fd, pid = kernel.EVENT_METADATA.unpack_from(buffer, offset)
            offset += length
            if fd == kernel.FAN_NOFD:
                continue
            try:
                if news:
                    look(pid)
            finally:
                os.close(fd)  # before the answer, which names it by its number: then a quick reader finds nothing busy
                os.write(self.group, kernel.FAN_RESPONSE.pack(fd, kernel.FAN_ALLOW))
        return news

    def trip(self) -> bool:
        """Arm; False if it was already. Also for whoever is held at an open on a medium, whose bytes may go elsewhere next."""
        if self._tripped:
            return False
        self._trip()
        return True

    def obey(self, order: str, paths: list[bytes]) -> "tuple[str, int, int] | None":
        """ "mark" and "unmark" name directories and files, "systems" the mount points at which writes are watched, "trees"
        those with protected files on them besides.

        "set" holds the next opener again; "disarm" ends the watch on writes, unless somebody tripped it since. Answers what
        the agent must know: ("disarmed", trips, marks refused).
        """
        if order == "mark":
            for path in paths:
                self._mark(kernel.FAN_MARK_ADD, path)
        elif order == "unmark":
            for path in paths:
                self._mark(kernel.FAN_MARK_REMOVE, path)
        elif order == "systems":
            self._systems = paths
        elif order == "trees":
            self._trees = paths
        elif order == "set":
            self._tripped = False
            _mark_all(self.group, _FLUSH, 0, [b"/"])
        elif not self._tripped:
            _mark_all(self._writes, _FLUSH, 0, [b"/"])
            return ("disarmed", self.trips, self._refused)
        return None

    def _trip(self) -> None:
        self._tripped = True
        self.trips += 1
        for path in self._systems:
            try:
                kernel.fanotify_mark(self._writes, _SYSTEM, kernel.FAN_CLOSE_WRITE, path)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    self._mark_subvolume(path)
        _mark_all(self.group, _IGNORE, kernel.FAN_OPEN_PERM, [*self._systems, *self._trees])

    def _mark_subvolume(self, path: bytes) -> None:
        try:
            kernel.mark_whole(self._writes, kernel.FAN_MARK_ADD, kernel.FAN_CLOSE_WRITE, path)
        except OSError:
            return  # as in `_mark_all`

    def _mark(self, action: int, path: bytes) -> None:
        try:
            kernel.fanotify_mark(self.group, action | kernel.FAN_MARK_DONT_FOLLOW, _MASK, path)
        except OSError as error:
            if error.errno != errno.ENOENT:  # it went away meanwhile, and its files with it
                self._refused += 1


def _mark_all(group: int, action: int, mask: int, paths: list[bytes]) -> None:
    """The same on every file system; one that was unmounted, or that takes no such mark, must not keep us from the others."""
    for path in paths:
        try:
            kernel.fanotify_mark(group, action, mask, path)
        except OSError:
            continue  # `arming.py` tries the same marks once, and says which were refused
