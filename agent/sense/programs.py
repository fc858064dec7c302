# ruff: noqa: PTH115
# (paths are raw bytes here, and pathlib knows only text)
"""Which program each process became, however short it lived: fanotify's FAN_OPEN_EXEC on the file systems that carry programs.

Question: what would /proc/PID/exe have said? Owns: a notification group, file-system marks while somebody wants them (`arm`),
and by pid the last program that it began. Must not know what a process did or who it is (`processes.py`, which asks).

One exec opens several files: a script, its interpreter, and the dynamic linker that the program names. Those with `#!` are
passed over, and so is the linker of the program before; what kind a file is, is read once. The group is not polled: it is
read when somebody asks. A record costs about 3 µs, an open that is no exec nothing. Where the kernel refuses handles (FUSE,
overlay, a btrfs subvolume) programs stay unknown, as far as no look caught them.
"""

import errno
import os
import time
from typing import NamedTuple

from agent.sense import kernel
from agent.sense.fanotify_events import heads, names

_MOST = 16_384
_MOST_FILES = 4_096
_MOST_EXECUTED = 1_024
_READS = 64
_READ_BYTES = 1 << 16
_ST_NOEXEC = 8
_MARK = kernel.FAN_MARK_FILESYSTEM
_HEADER_BYTES = 4096


class Program(NamedTuple):
    """A file that was executed: its path, and the handle of the dynamic linker it names, empty if it names none.

    `runs`: it is a program by itself, not a script that another one reads."""

    path: bytes
    runs: bool
    linker: bytes


class Began(NamedTuple):
    """The program that a process became, read from the queue at `read_ns` (CLOCK_MONOTONIC)."""

    program: Program
    read_ns: int


class Programs:
    """`arm` with mount points, `of` a pid, `forked` when a pid has a new owner. Silent where fanotify can't be had."""

    def __init__(self) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_UNLIMITED_MARKS
        try:
            self._group = kernel.fanotify_init(flags | kernel.FAN_REPORT_DFID_NAME_TARGET)
        except OSError:
            self._group = -1
        self.media: tuple[bytes, ...] = ()
        """Where media are (paths that end in "/"): what is executed there is kept in `executed`, as pid, key and path"""
        self.executed: list[tuple[int, bytes, bytes]] = []
        self._systems: dict[bytes, bytes] = {}
        self._files: dict[bytes, Program] = {}
        self._began: dict[int, Began] = {}

    @property
    def armed(self) -> bool:
        """Whether programs are told now."""
        return bool(self._systems)

    def arm(self, mounts: list[bytes]) -> None:
        """Be told of what is executed on these file systems, one mount point each; none: of nothing."""
        if self._group < 0:
            return
        wanted = {system: mount for mount in mounts if (system := _carries_programs(mount))}
        for system in self._systems.keys() - wanted.keys():
            mount = self._systems.pop(system)
            if _carries_programs(mount) == system:  # else it was unmounted, and its mark went with it
                self._mark(kernel.FAN_MARK_REMOVE, mount)
        for system in wanted.keys() - self._systems.keys():
            if self._mark(kernel.FAN_MARK_ADD, wanted[system]):
                self._systems[system] = wanted[system]
        if not self._systems:
            self._began.clear()
            self._files.clear()

    def of(self, pid: int) -> bytes:
        """The path of the program that a process became last, empty if that was not told."""
        began = self._began.get(pid)
        return began.program.path if began is not None else b""

    def forked(self, pid: int, at_ns: int) -> None:
        """A pid has a new owner: what was read before is of the former one."""
        began = self._began.get(pid)
        if began is not None and began.read_ns < at_ns:
            del self._began[pid]

    def drain(self) -> None:
        """Read what began since the last call."""
        if not self._systems:
            return
        for _ in range(_READS):
            now_ns = time.monotonic_ns()
            try:
                buffer = os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                break
            for mask, _, pid, start, end in heads(buffer):
                if mask & kernel.FAN_Q_OVERFLOW:
                    self._began.clear()  # who began what meanwhile nobody knows
                    continue
                told = names(buffer, start, end)
                program = self._files.get(told.target) or self._file(told.target, told.dir, told.name)
                if self.media and program.path.startswith(self.media) and len(self.executed) < _MOST_EXECUTED:
                    self.executed.append((pid, told.target, program.path))
                before = self._began.pop(pid, None)
                if program.runs and (before is None or before.program.linker != told.target):
                    self._began[pid] = Began(program, now_ns)
                elif before is not None:
                    self._began[pid] = before
        if len(self._began) > _MOST:
            for pid in list(self._began)[: len(self._began) - _MOST // 2]:
                del self._began[pid]

    def close(self) -> None:
        """Closing the group drops its marks."""
        if self._group >= 0:
            os.close(self._group)
            self._group = -1
            self._systems.clear()

    def _mark(self, action: int, mount: bytes) -> bool:
        try:
            kernel.fanotify_mark(self._group, action | _MARK, kernel.FAN_OPEN_EXEC, mount)
        except OSError:
            return False  # no handles there; `processes.py` says what that costs
        return True

    def _file(self, target: bytes, folder: bytes, name: bytes) -> Program:
        """What was executed, by its handle; looked at once."""
        mount = self._systems.get(target[:8], b"")
        path, head = _look(mount, target[8:], folder[8:], name) if mount else (b"", b"")
        linker = b""
        if head and (wanted := interpreter(head)):
            try:
                linker = kernel.file_key(os.path.realpath(wanted))
            except OSError:
                linker = b""
        if len(self._files) >= _MOST_FILES:
            self._files.clear()
        known = self._files[target] = Program(path, bool(path) and not head.startswith(b"#!"), linker)
        return known


def interpreter(head: bytes) -> bytes:
    """The dynamic linker that an ELF file names in PT_INTERP, by the file's first bytes; empty if it names none: elf(5)."""
    if head[:4] != b"\x7fELF" or len(head) < 64:
        return b""
    order = "little" if head[5] == 1 else "big"
    wide = head[4] == 2

    def at(offset: int, size: int) -> int:
        return int.from_bytes(head[offset : offset + size], order)  # type: ignore[arg-type]

    table, size, count = (at(32, 8), at(54, 2), at(56, 2)) if wide else (at(28, 4), at(42, 2), at(44, 2))
    for entry in range(table, min(table + size * count, len(head)), size or 1):
        if at(entry, 4) == 3:  # PT_INTERP
            offset, length = (at(entry + 8, 8), at(entry + 32, 8)) if wide else (at(entry + 4, 4), at(entry + 16, 4))
            return head[offset : offset + length].split(b"\0", 1)[0]
    return b""


def _carries_programs(mount: bytes) -> bytes:
    """The id of the file system at a mount point; empty if nothing there may be executed, or it is gone."""
    try:
        return b"" if os.statvfs(mount).f_flag & _ST_NOEXEC else kernel.fsid(mount)
    except OSError:
        return b""


def _look(mount: bytes, target: bytes, folder: bytes, name: bytes) -> tuple[bytes, bytes]:
    """Path and first bytes of a file by its handle. It is opened to read, which no mark of ours tells."""
    path = head = b""
    try:
        at = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return path, head
    try:
        fd = kernel.open_by_handle_at(at, target, os.O_RDONLY | os.O_NONBLOCK)
        try:
            path = os.readlink(b"/proc/self/fd/%d" % fd).removesuffix(b" (deleted)")
            head = os.pread(fd, _HEADER_BYTES, 0)
        finally:
            os.close(fd)
        parent = kernel.open_by_handle_at(at, folder)
        try:
            path = os.readlink(b"/proc/self/fd/%d" % parent).rstrip(b"/") + b"/" + name  # of several names, the one executed
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT, errno.EACCES, errno.EPERM):
            return b"", b""
    finally:
        os.close(at)
    return path, head
