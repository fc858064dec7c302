"""Files finished on users' FUSE mounts (sshfs, rclone, views of a directory): the agent's side of `sharing.py`.

Owns: a small process for each such mount, as nothing that its server or its owner does may stop the agent: starting it, hearing
it, saying where one could not watch or ended, and trying again. Must not know what a share is or what a file on one means.

The process has the owner's ids, so the owner may end it; that is told as Lost and blind, and it is started anew after AGAIN_S.
One that waits for its server longer than PATIENCE_S is told likewise, but not replaced: it can't be killed. The agent may not
signal it anyway (no CAP_KILL): it goes when its socket closes, when the agent ends, or by its own alarm.
"""

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.contract.event import path_text
from agent.core.facts import Closed, Coverage, Fact, Lost
from agent.sense.sharing import BUSY, CLOSED, DONE, LOST, MESSAGE, PATIENCE_S, WATCHED

AGAIN_S = 10.0
MOST, MOST_OF_ONE = 24, 8
"""Small processes in all, and of one owner: whose servers do not answer must leave room for others"""
_READS = 2_048
_MESSAGE_BYTES = 1 << 16
_BEGINS = "its server is being asked"
_BOOT = """
import sys
for name, path in (("agent", sys.argv[1]), ("agent.sense", sys.argv[2])):
    package = type(sys)(name)
    package.__path__ = [path]
    sys.modules[name] = package
from agent.sense import sharing
sharing.main(int(sys.argv[3]), int(sys.argv[4]), bytes.fromhex(sys.argv[5]), int(sys.argv[6]), int(sys.argv[7]))
"""  # the packages by hand, as for the process that holds

OnPid = Callable[[int], None]


class _Share:
    """One mount. `why`: what is wrong with it, empty while it is watched."""

    __slots__ = ("busy_s", "child", "ears", "heard_ms", "owner", "tried_s", "why")

    def __init__(self, owner: tuple[int, int]) -> None:
        self.busy_s: float | None = None
        """Since when the server has been asked, by time.monotonic"""
        self.owner, self.why, self.tried_s, self.heard_ms = owner, _BEGINS, 0.0, 0
        self.child: subprocess.Popen[bytes] | None = None
        self.ears: socket.socket | None = None


class Shares:
    """A Sensor. `watch` and `unwatch` mounts, `check` about once a second; nothing here waits for anybody."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._shares: dict[bytes, _Share] = {}
        self._ending: list[tuple[subprocess.Popen[bytes], tuple[int, int]]] = []
        self._last_words: list[Fact] = []

    def fileno(self) -> int:
        """An epoll descriptor over all sockets, -1 when closed."""
        return -1 if self._poll.closed else self._poll.fileno()

    @property
    def pids(self) -> set[int]:
        """The small processes, whose own opens are nobody's business."""
        return {each.child.pid for each in self._shares.values() if each.child is not None}

    def watch(self, mount: str, owner: tuple[int, int]) -> None:
        """Be told of what is finished on the FUSE file system at `mount`, which `owner` (uid, gid) mounted."""
        share = self._shares[os.fsencode(mount)] = _Share(owner)
        self._start(os.fsencode(mount), share)

    def unwatch(self, mount: str) -> bool:
        """No longer; False if it was not watched here."""
        share = self._shares.pop(os.fsencode(mount), None)
        if share is not None:
            self._let_go(share)
        return share is not None

    def check(self, now_ms: int) -> None:
        """Notice who ended or waits too long for a server, start again what ended."""
        self._ending = [each for each in self._ending if each[0].poll() is None]
        for mount, share in self._shares.items():
            if share.child is not None and share.child.poll() is not None:
                self._fails(share, now_ms)
                self._let_go(share)
            elif share.busy_s is not None and time.monotonic() - share.busy_s > PATIENCE_S:
                self._fails(share, now_ms)
            if share.child is None and time.monotonic() - share.tried_s >= AGAIN_S:
                self._start(mount, share)

    def drain(self, now_ms: int, on_pid: OnPid | None = None) -> Iterator[Fact]:
        """Closed for each finished file, Lost for what could not be known."""
        told, self._last_words = self._last_words, []
        for share in self._shares.values():
            told += self._hear(share, now_ms)
        for fact in told:
            if isinstance(fact, Closed) and on_pid is not None:
                on_pid(fact.pid)
            yield fact

    def coverage(self, now_ms: int) -> Coverage:
        """Which of these mounts are watched; finished writes are all that can be known of one."""
        whys = [f"{path_text(mount)}: {share.why}" for mount, share in sorted(self._shares.items()) if share.why]
        blind = ["medium_not_watched"] if whys else []
        partly = ["medium_new_files", "medium_renames", "medium_deletes"] if self._shares else []
        return Coverage(
            at_ms=now_ms, sensor="shares", ok=not whys, sees=["media_files"], blind=[*blind, *partly], why="; ".join(whys)
        )

    def close(self) -> None:
        """Let all of them go."""
        for share in self._shares.values():
            self._let_go(share)
        self._shares.clear()
        if not self._poll.closed:
            self._poll.close()

    # -- the small processes -------------------------------------------------------------------------------------------

    def _start(self, mount: bytes, share: _Share) -> None:
        share.tried_s = time.monotonic()
        there = [other.owner for other in self._shares.values() if other.child is not None]
        there += [owner for _, owner in self._ending]
        if len(there) >= MOST or there.count(share.owner) >= MOST_OF_ONE:
            share.why = f"{there.count(share.owner)} such mounts of this user, {len(there)} in all, are watched already"
            return
        here = Path(__file__).parent
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            arguments = [str(here.parent), str(here), str(theirs.fileno()), str(os.getpid())]
            arguments += [mount.hex(), *(str(each) for each in share.owner)]
            try:
                share.child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BOOT, *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                share.why = f"no process could be started to watch it ({error.strerror})"
                return
        share.ears, share.busy_s = ours, share.tried_s
        self._poll.register(ours, select.EPOLLIN)

    def _let_go(self, share: _Share) -> None:
        if share.ears is not None:
            self._poll.unregister(share.ears)
            share.ears.close()
            share.ears = None
        if share.child is not None:
            self._ending.append((share.child, share.owner))
            share.child = None

    def _fails(self, share: _Share, now_ms: int) -> None:
        self._last_words += self._hear(share, now_ms)
        if not share.why:
            since_ms = share.heard_ms or now_ms
            self._last_words.append(Lost(at_ms=now_ms, reason="share_unwatched", since_ms=since_ms, until_ms=now_ms))
        if share.why in ("", _BEGINS):
            share.why = "its server did not answer, or its owner ended the process that watches it"

    def _hear(self, share: _Share, now_ms: int) -> Iterator[Fact]:
        for _ in range(_READS):
            try:
                message = share.ears.recv(_MESSAGE_BYTES) if share.ears is not None else b""
            except BlockingIOError:
                share.heard_ms = now_ms
                return
            except OSError:
                message = b""
            if len(message) < MESSAGE.size:
                if share.ears is not None:
                    self._poll.unregister(share.ears)  # or its end would wake us for ever
                    share.ears.close()
                    share.ears = None
                return
            kind, pid, size, length = MESSAGE.unpack_from(message)
            key, path = message[MESSAGE.size : MESSAGE.size + length], message[MESSAGE.size + length :]
            if kind in (WATCHED, DONE):
                share.busy_s = None
                share.why = f"can't be watched ({os.strerror(pid)}); copies to it will not be seen" if pid else ""
            elif kind == BUSY:
                share.busy_s = time.monotonic()
            elif kind == CLOSED:
                yield Closed(at_ms=now_ms, pid=pid, key=key, path=path_text(path), size=size)
            elif kind == LOST:
                yield Lost(at_ms=now_ms, reason="share_unread", since_ms=share.heard_ms or now_ms, until_ms=now_ms)
