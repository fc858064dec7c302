"""Who opens files on a medium, seen while the opener is held: the agent's side of `holding.py`.

Owns: that process' life (start, watch its pings, kill when it stalls, start again) and turning what it says into ProcSeen.
Must not know what the processes did. A stopped or stuck holder keeps people from opening files on a medium; so it is
killed, not asked, when it was silent for STALL_S: the kernel then lets every held open go on. That is a Lost.
Without permission events (kernel without FANOTIFY_ACCESS_PERMISSIONS, no privilege) the agent goes on without, and says so.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.contract.event import path_text
from agent.core.facts import Coverage, Fact, Lost, OpenFile, Process, ProcSeen, Refused
from agent.sense import SensorError, kernel
from agent.sense.refusing import Refusing, Rule

STALL_S = 1.5
RESTARTS = 5
MOST_FOLDERS = 8_192
_FOLDERS_A_MESSAGE = 100
_RESTART_S = 60.0
_SO_SNDBUFFORCE, _SNDBUF_BYTES = 32, 4 << 20  # about 3,000 looks wait for a busy agent
_BOOT = """
import sys
for name, path in (("agent", sys.argv[1]), ("agent.sense", sys.argv[2])):
    package = type(sys)(name)
    package.__path__ = [path]
    sys.modules[name] = package
from agent.sense import holding
holding.main(int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
"""  # the packages by hand, so that their __init__ and all it imports stay out of the small process


class Holder:
    """A Sensor. Call `check` about once a second, or oftener."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._mounts: dict[bytes, int] = {}
        self._refused: dict[bytes, str] = {}
        self._folders: dict[bytes, None] = {}
        self._fresh: list[tuple[bytes, bool]] = []
        self._crowded = False
        self._given_up = ""
        self._heard = 0.0
        self._unhurried = False
        self._starts: list[float] = []
        self._down_since_ms: int | None = None
        self._pending: list[Fact] = []
        self.looked_ns: dict[int, int] = {}
        """When a pid was looked at, by CLOCK_MONOTONIC; of those that `drain` is about to yield"""
        self._drained_ms = 0
        self._writes = -1
        self.starts = 0
        self.tripwire_said: list[tuple[Any, ...]] = []
        self._refusing: Refusing | None = None

    @classmethod
    def trial(cls) -> "Holder":
        """A holder, if permission events may be had here. Raises SensorError."""
        try:
            os.close(kernel.fanotify_init(kernel.FAN_CLASS_CONTENT | kernel.FAN_CLOEXEC))
        except OSError as error:
            raise SensorError(f"permission events: {error.strerror}") from None
        return cls()

    @property
    def refusers(self) -> list[int]:
        """The pids of the processes that refuse opens."""
        return self._refusing.pids if self._refusing is not None else []

    @property
    def pid(self) -> int:
        """The holder's pid, 0 when there is none; its own opens are nobody's business."""
        return self._child.pid if self._child else 0

    def lay_tripwire(self, writes: int) -> None:
        """From now on the small process runs always, with a tripwire (`tripwire.py`) that arms the group `writes`.

        `starts` counts how often it began anew, knowing nothing; what it says is added to `tripwire_said`.
        """
        self._writes = writes
        self._end()
        self._start()

    def may_refuse(self, refusing: Refusing) -> None:
        """From now on opens can be refused, too (mode "enforce"), by processes of their own."""
        if self._refusing is not None:
            self._refusing.close()
        self._refusing = refusing
        for folder in self._folders:
            refusing.folder(folder, False)

    def refuse(self, rules: dict[bytes, Rule]) -> dict[bytes, str]:
        """Refuse opens by these rules and no others; the path of a medium each. What could not be, and why."""
        if self._refusing is None or self._given_up:
            return dict.fromkeys(rules, self._given_up or "no permission events")
        return self._refusing.apply(rules)

    def tripwire(self, order: str, paths: list[bytes] | None = None, patience_ms: int = 50) -> bool:
        """An order for the tripwire; waits a little where the socket is full. False if there is nobody to obey it."""
        if self._refusing is not None and order in ("mark", "unmark"):
            self._refusing.sources(paths or [], order == "unmark")
        if self._socket is None:
            return False
        message = marshal.dumps(("tripwire", order, paths or []))
        for _ in range(2):
            try:
                self._socket.send(message)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                poll.poll(patience_ms)
                continue
            except OSError:
                break
            return True
        self._heard = 0.0  # as in `_tell`
        return False

    def fileno(self) -> int:
        """The socket to the holder; another one after a restart, -1 while there is none."""
        return self._socket.fileno() if self._socket else -1

    def watch(self, mount: str) -> None:
        """Hold opens on the file system at `mount`, which must be the medium's own. What is refused shows in `coverage`."""
        raw = os.fsencode(mount)
        try:
            self._mounts[raw] = os.stat(raw).st_dev  # noqa: PTH116 (raw bytes)
        except OSError as error:
            self._refused[raw] = error.strerror or str(error)
            return
        self._refused.pop(raw, None)
        if self._child is None:
            self._start()
        else:
            self._tell("watch", raw)

    def unwatch(self, mount: str) -> None:
        """No longer; harmless when it was unmounted already. With nothing left to hold, the small process ends."""
        raw = os.fsencode(mount)
        self._refused.pop(raw, None)
        below = raw if raw.startswith(b"/proc/") else os.path.realpath(raw)  # the way into a container may be gone
        for folder in [each for each in self._folders if each == below or each.startswith(below + b"/")]:
            self.hold_folder(folder, True)
        self._crowded = self._crowded and bool(self._folders)
        self.flush()
        if self._mounts.pop(raw, None) is not None:
            self._tell("unwatch", raw)
        if not self._needed:
            self._end()

    def hold_folder(self, folder: bytes, gone: bool) -> None:
        """Hold opens right in this directory of a plain folder that plays a medium, or (`gone`) no longer."""
        if self._refusing is not None:
            self._refusing.folder(folder, gone)
        if gone and self._folders.pop(folder, None) is None:
            return
        if not gone:
            if len(self._folders) >= MOST_FOLDERS:
                self._crowded = True
                return
            self._folders[folder] = None
        if self._fresh and self._fresh[-1][1] != gone:
            self.flush()
        self._fresh.append((folder, gone))
        if len(self._fresh) >= _FOLDERS_A_MESSAGE:
            self.flush()

    def flush(self) -> None:
        """Tell the small process of directories that came and went."""
        fresh, self._fresh = self._fresh, []
        if fresh and self._child is None and self._needed and not self._given_up:
            self._start()  # which tells it of all there are
        elif fresh:
            self._send(("folders", [folder for folder, _ in fresh], fresh[0][1]))

    def holds(self, folder: str) -> bool:
        """Whether opens right in this directory are held, and there was room for all others (MOST_FOLDERS)."""
        return not self._crowded and not self._given_up and os.fsencode(folder) in self._folders

    def check(self, now_ms: int) -> None:
        """Kill a holder that was silent too long, start one where it is missing. The Lost comes with the next `drain`."""
        self._receive(now_ms)
        if self._refusing is not None:
            self._refusing.check()
        if self._child is None:
            if not self._needed or self._given_up or not self._may_start():
                return
            self._start()
            if self._child is not None and self._down_since_ms is not None:
                self._pending.append(Lost(at_ms=now_ms, reason="holder_stalled", since_ms=self._down_since_ms, until_ms=now_ms))
                self._down_since_ms = None
            return
        silent_s = time.monotonic() - self._heard
        if self._child.poll() is not None or silent_s > STALL_S:
            self._receive(now_ms)  # its last words
            self._end()
            self._down_since_ms = now_ms - int(silent_s * 1000)
            self.check(now_ms)

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """ProcSeen for each process looked at since the last call, Lost for looks that did not fit the socket."""
        self.flush()
        self._receive(now_ms)
        for said in self._refusing.drain() if self._refusing is not None else ():
            self._understand(said, now_ms)
        pending, self._pending = self._pending, []
        yield from pending
        self.looked_ns.clear()

    def coverage(self, now_ms: int) -> Coverage:
        """Whether writers on media are held while they are looked at."""
        down = self._needed and self._child is None and not self._given_up
        why = "; ".join(f"{path_text(raw)}: opens can't be held ({said})" for raw, said in sorted(self._refused.items()))
        if down:
            why = "the process that holds opens does not run" + (f"; {why}" if why else "")
        if self._given_up:
            why = f"this kernel has no permission events ({self._given_up}); writers are looked at after the fact"
        ok = not why
        if ok and self._unhurried:
            why = "may not run in real time (RLIMIT_RTPRIO is 0): on a busy machine opens on media can wait for milliseconds"
        return Coverage(
            at_ms=now_ms,
            sensor="holder",
            ok=ok,
            sees=["medium_openers"] if ok else [],
            blind=[] if ok else ["short_lived_writers"],
            why=why,
        )

    def close(self) -> None:
        """End the small process; whoever was held goes on."""
        self._mounts.clear()
        self._folders.clear()
        self._writes = -1
        if self._refusing is not None:
            self._refusing.close()
        self._end()

    @property
    def _needed(self) -> bool:
        return bool(self._mounts or self._folders) or self._writes >= 0

    # -- the small process --------------------------------------------------------------------------------------------

    def _may_start(self) -> bool:
        now = time.monotonic()
        self._starts = [at for at in self._starts if now - at < _RESTART_S]
        return len(self._starts) < RESTARTS

    def _start(self) -> None:
        self._heard = time.monotonic()
        self._starts.append(self._heard)
        here = Path(__file__).parent
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            theirs.setblocking(False)
            with contextlib.suppress(PermissionError):
                theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SNDBUF_BYTES)  # beyond net.core.wmem_max
            arguments = [str(here.parent), str(here), str(theirs.fileno()), str(os.getpid()), str(self._writes)]
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BOOT, *arguments],
                    pass_fds=[theirs.fileno(), *([self._writes] if self._writes >= 0 else [])],
                    stdin=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    process_group=0,  # Ctrl+C is for the agent, which then ends it
                )
            except OSError:
                ours.close()  # no memory, no processes left: `check` tries again
                return
        self._socket = ours
        self.starts += 1
        for raw in self._mounts:
            self._tell("watch", raw)
        folders, self._fresh = list(self._folders), []
        for at in range(0, len(folders), _FOLDERS_A_MESSAGE):
            self._send(("folders", folders[at : at + _FOLDERS_A_MESSAGE], False))

    def _tell(self, order: str, raw: bytes) -> None:
        self._send((order, raw, self._mounts.get(raw, 0)))

    def _send(self, message: tuple[Any, ...]) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(marshal.dumps(message))
        except OSError:
            self._heard = 0.0  # it does not listen: let `check` take it for stalled

    def _end(self) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)
            self._child.wait()
            self._child = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _receive(self, now_ms: int) -> None:
        while self._socket is not None:
            try:
                message = self._socket.recv(1 << 20)
            except BlockingIOError:
                break
            except OSError:
                message = b""
            if not message:
                self._heard = 0.0
                break
            self._heard = time.monotonic()
            self._understand(marshal.loads(message), now_ms)  # noqa: S302 (from our own child, over a private socket)
        self._drained_ms = now_ms

    def _understand(self, said: tuple[Any, ...], now_ms: int) -> None:
        if said[0] == "seen":
            for look in said[1]:
                self._pending.append(ProcSeen(at_ms=now_ms, process=process(look)))
                self.looked_ns[look[1]] = look[0]
        elif said[0] == "denied":
            self._pending.append(Refused(at_ms=now_ms, pid=said[1], key=b"", path=path_text(said[2]), source=said[3]))
        elif said[0] == "refused":
            self._given_up = os.strerror(said[1])
        elif said[0] in ("tripped", "disarmed"):
            self.tripwire_said.append(said)
        elif said[0] == "unhurried":
            self._unhurried = True
        elif said[0] == "watched" and said[2] and (said[1] in self._mounts or said[1] in self._folders):
            self._refused[said[1]] = os.strerror(said[2])
        elif said[0] == "ping" and said[1]:
            since_ms = self._drained_ms or now_ms
            self._pending.append(
                Lost(at_ms=now_ms, reason="holder_socket_full", since_ms=since_ms, until_ms=now_ms, count=said[1])
            )


def process(look: tuple[Any, ...]) -> Process:
    """What the small process tells of one look, as a fact's Process; names of users are for others to add."""
    _, pid, start, ppid, uid, loginuid, session, exe, argv, pipes, ends, blind, files = look
    return Process(
        pid=pid,
        start=start,
        ppid=ppid,
        uid=uid,
        loginuid=loginuid,
        session=str(session) if session is not None else "",
        exe=path_text(exe),
        argv=[argument.decode("utf-8", "backslashreplace") for argument in argv],
        pipes=pipes,
        ends=ends,
        blind=blind,
        files=[OpenFile(path=path_text(path), size=size, key=key) for path, size, key in files],
    )
