"""Where opens are refused: the agent's side of `refusal.py`, the small process that refuses. It keeps nobody waiting for ever.

Owns: those processes' life, and that each knows all rules. "open": there is one; if it dies, the kernel lets whoever it held go
on, and nothing is refused until another is there. "closed": there are two with the same rules, and an open must pass both; if
one dies, the other refuses, and it takes both at once to let something through. A stopped one is killed by a thread of its own
here, also while the agent waits in an open of its own. Must not know why something is stopped.

The agent owns none of their groups, as it has others (see `refusal.py`): if it ends they see that, and end.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from agent.sense import procfs

STALL_S = 1.5
_LOOK_S, _IDLE_S = 0.5, 5.0
_PATIENCE_S = 3.0
_A_MESSAGE = 100
_BOOT = """
import sys
for name, path in (("agent", sys.argv[1]), ("agent.sense", sys.argv[2])):
    package = type(sys)(name)
    package.__path__ = [path]
    sys.modules[name] = package
from agent.sense import refusal
refusal.main(int(sys.argv[3]), int(sys.argv[4]))
"""  # as in `holder.py`


class Rule(NamedTuple):
    """What is refused on a medium: `kind` is "all", "writes" or "tainted"; `roots`, ending in "/", for the last."""

    kind: str
    folder: bool
    roots: tuple[bytes, ...] = ()


class _Process:
    """One small process that refuses."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.setblocking(False)
            arguments = [str(here.parent), str(here), str(theirs.fileno()), str(os.getpid())]
            try:
                self.child = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _BOOT, *arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    process_group=0,
                )
            except OSError:
                self.socket.close()
                raise
        self.socket.setblocking(False)
        self.heard = time.monotonic()
        self.failed: dict[bytes, int] = {}
        self.ruled = 0

    def send(self, message: tuple[Any, ...], patience_s: float = 0.2) -> None:
        """Tell it; if it does not listen for so long, it counts as stalled."""
        data, deadline = marshal.dumps(message), time.monotonic() + patience_s
        while True:
            try:
                self.socket.send(data)
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.socket, select.POLLOUT)
                if time.monotonic() < deadline and poll.poll(50):
                    continue
            except OSError:
                pass
            else:
                return
            if time.monotonic() >= deadline or self.child.poll() is not None:
                self.heard = 0.0
                return

    def receive(self) -> Iterator[tuple[Any, ...]]:
        """What it said; its pings are taken in."""
        while True:
            try:
                message = self.socket.recv(1 << 20)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self.heard = 0.0
                return
            self.heard = time.monotonic()
            said = marshal.loads(message)  # noqa: S302 (from our own child, over a private socket)
            if said[0] == "ruled":
                self.ruled, self.failed = said[1], said[2]
            elif said[0] in ("seen", "denied"):
                yield said

    def end(self) -> None:
        """Kill it: the kernel lets everybody go on whom it held."""
        self.child.kill()
        self.child.wait()
        self.socket.close()


class Refusing:
    """`apply` the rules, keyed by the path of a medium; `check` once a second; `drain` what was said."""

    def __init__(self, closed: bool) -> None:
        self.closed = closed
        self._wanted = 2 if closed else 1
        self._processes: list[_Process] = []
        self._rules: dict[bytes, Rule] = {}
        self._devs: dict[bytes, int] = {}
        self._folders: dict[bytes, None] = {}
        self._sources: dict[bytes, None] = {}
        self._serial = 0
        self._said: list[tuple[Any, ...]] = []
        self._over = threading.Event()
        self._stir = threading.Event()
        threading.Thread(target=self._keep, name="keeper", daemon=True).start()
        self.check()

    @property
    def pids(self) -> list[int]:
        """The processes that refuse now."""
        return [each.child.pid for each in self._processes]

    def apply(self, rules: dict[bytes, Rule]) -> dict[bytes, str]:
        """From now on these and no others. It holds when this returns, but for those that are named, and why."""
        devs = {}
        failed = {}
        for path, rule in rules.items():
            try:
                devs[path] = 0 if rule.folder else os.stat(path).st_dev  # noqa: PTH116 (raw bytes)
            except OSError as error:
                failed[path] = error.strerror or str(error)
        self._rules, self._devs = {path: rule for path, rule in rules.items() if path in devs}, devs
        self.check()
        self._stir.set()
        self._serial += 1
        for process in self._processes:
            self._tell_rules(process)
        self._await()
        for process in self._processes:
            failed |= {path: os.strerror(code) for path, code in process.failed.items()}
        if not self._processes and rules:
            failed |= dict.fromkeys(rules, "the process that refuses does not run")
        return failed

    def folder(self, folder: bytes, gone: bool) -> None:
        """A directory of a plain folder that may play a medium came or went."""
        self._known(self._folders, "folders", [folder], gone)

    def sources(self, paths: list[bytes], gone: bool) -> None:
        """Protected directories, and copies of protected files, that came or went."""
        self._known(self._sources, "sources", paths, gone)

    def check(self) -> None:
        """Kill what was silent too long, start what is missing, and tell it all there is."""
        for process in list(self._processes):
            self._said += process.receive()
            if process.child.poll() is not None or time.monotonic() - process.heard > STALL_S:
                process.end()
                self._processes.remove(process)
        while len(self._processes) < self._wanted:
            try:
                fresh = _Process()
            except OSError:
                return  # no memory, no processes left: tried again in a second
            self._processes.append(fresh)
            for table, order in ((self._folders, "folders"), (self._sources, "sources")):
                self._tell_known(fresh, order, list(table), False)
            self._tell_rules(fresh)

    def drain(self) -> list[tuple[Any, ...]]:
        """("seen", looks) and ("denied", pid, path, source) since the last call."""
        for process in self._processes:
            self._said += process.receive()
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Nothing is refused any more; all who wait go on."""
        self._over.set()
        self._stir.set()
        self._rules, self._wanted = {}, 0
        for process in self._processes:
            process.end()
        self._processes.clear()

    def _await(self) -> None:
        """Until all have taken the rules; who takes too long is not waited for further."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            for process in self._processes:
                self._said += process.receive()
            late = [each for each in self._processes if each.ruled < self._serial and each.heard]
            if not late:
                return
            poll = select.poll()
            for process in late:
                poll.register(process.socket, select.POLLIN)
            poll.poll(100)

    def _tell_rules(self, process: _Process) -> None:
        rules = [
            (path.rstrip(b"/") + b"/", self._devs[path], rule.kind, rule.folder, list(rule.roots))
            for path, rule in self._rules.items()
        ]
        for at in range(0, len(rules), _A_MESSAGE):
            process.send(("rules", rules[at : at + _A_MESSAGE]))
        process.send(("ruled", self._serial))

    def _known(self, table: dict[bytes, None], order: str, paths: list[bytes], gone: bool) -> None:
        for path in paths:
            if gone:
                table.pop(path, None)
            else:
                table[path] = None
        for process in self._processes:
            self._tell_known(process, order, paths, gone)

    @staticmethod
    def _tell_known(process: _Process, order: str, paths: list[bytes], gone: bool) -> None:
        for at in range(0, len(paths), _A_MESSAGE):
            process.send((order, paths[at : at + _A_MESSAGE], gone))

    def _keep(self) -> None:
        """The keeper's thread: kill a process that somebody stopped, for whoever it holds waits for it."""
        stopped: dict[int, int] = {}
        while not self._over.is_set():
            self._stir.wait(_IDLE_S)
            if not self._rules:
                self._stir.clear()
                continue
            self._over.wait(_LOOK_S)
            for process in list(self._processes):
                pid = process.child.pid
                seen = procfs.stat(pid)
                halted = seen is not None and seen.state in (b"T", b"t")
                stopped[pid] = stopped.get(pid, 0) + 1 if halted else 0
                if stopped[pid] > 1:
                    with contextlib.suppress(OSError):
                        process.child.send_signal(signal.SIGKILL)
                    del stopped[pid]
                    break  # one at a time: the other one refuses meanwhile
