"""Who a pid is: /proc while it lives, the proc connector's table when it is gone.

Owns: a netlink socket for fork, exec, uid and session events (<linux/cn_proc.h>), and two memories: a table of every
process with what it inherited at fork (complete, but exe and argv only until it execs), and the processes that were looked
at, kept a while after their end. A start time tells a pid's second owner from its first.
Must not know: files, media, what a process did.

The socket is not polled: `drain` is called by the daemon at each turn, and `look` empties it when it needs to know.
Exit events are not asked for; what ended is noticed by looking, once a second, at those that were looked at.
"""

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from agent.contract.event import path_text
from agent.core.facts import Coverage, Fact, Lost, OpenFile, Parent, Process, ProcGone
from agent.sense import cgroup, procfs
from agent.sense.pairs import Pairs
from agent.sense.passwd import Passwd
from agent.sense.programs import Programs

NETLINK_CONNECTOR, CN_IDX_PROC, CN_VAL_PROC = 11, 1, 1
PROC_CN_MCAST_LISTEN = 1
PROC_EVENT_FORK, PROC_EVENT_EXEC, PROC_EVENT_UID, PROC_EVENT_SID, PROC_EVENT_EXIT = 0x1, 0x2, 0x4, 0x80, 0x80000000
_ALTERS = (PROC_EVENT_EXEC, PROC_EVENT_UID, PROC_EVENT_SID)
_EVENTS = PROC_EVENT_FORK | PROC_EVENT_EXEC | PROC_EVENT_UID | PROC_EVENT_SID | PROC_EVENT_EXIT
_SO_RCVBUFFORCE = 33
_RCVBUF_BYTES = 8 << 20
_NLMSGHDR = struct.Struct("=IHHII")  # len type flags seq pid
_CN_MSG = struct.Struct("=IIIIHH")  # idx val seq ack len flags
_PROC_EVENT = struct.Struct("=I4xQIIII")  # what (cpu) timestamp_ns pid tgid and two more, as follows
# FORK: the parent's, child pid, child tgid. UID: ruid, euid. EXEC, SID: none. EXIT: code, signal
_AT = _NLMSGHDR.size + _CN_MSG.size
_TABLE_MAX = 8192
_DRAIN_MAX = 50_000
_LOOKED_MAX = 4096
_REMEMBER_MS = 60_000
_FRESH_MS = 1000
_GONE_EVERY_MS = 1000
_ANCESTORS = 16
_REFRESH = 16
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

Identity = tuple[int | None, int | None, int | None, bytes, list[bytes]]
"""uid, loginuid, kernel session id, exe, argv: what a child inherits at fork"""
_NOBODY: Identity = (None, None, None, b"", [])
_NOT, _BEFORE, _ITSELF = 0, 1, 2


class _Entry:
    """A process in the table. `execed`: exe and argv are not those of the identity, as it execed ITSELF, or an ancestor did
    BEFORE it was forked. `start`: ticks since boot, by its fork (then one more than /proc tells at times), 0 if that was not
    seen: so that a pid given again is not taken for its former owner. `born_ns`, `ended_ns`, `execed_ns` (its last exec):
    CLOCK_MONOTONIC, 0 if not told."""

    __slots__ = ("born_ns", "ended_ns", "execed", "execed_ns", "identity", "ppid", "start")

    def __init__(self, ppid: int, identity: Identity, execed: int, start: int = 0, born_ns: int = 0) -> None:
        self.ppid, self.identity, self.execed, self.start, self.born_ns = ppid, identity, execed, start, born_ns
        self.ended_ns = self.execed_ns = 0


class _Looked(NamedTuple):
    """A look at a process: by the daemon's clock, and by CLOCK_MONOTONIC, which the proc connector's events carry."""

    at_ms: int
    at_ns: int
    process: Process


class Processes:
    """A Sensor without a descriptor. `run` is where logind keeps its sessions.

    `eager`: every program is read at its exec, for when a medium is watched whose openers can't be held; the daemon then
    polls `wake_fd`, which costs it a wake and some 50 µs an exec on the whole machine.
    """

    def __init__(self, now_ms: int, run: Path = Path("/run/systemd/sessions")) -> None:
        self._run = run
        self.eager = False
        self._passwd = Passwd()
        self._images = cgroup.Images()
        self._pairs = Pairs()
        self._buffer = bytearray(4096)
        self._table: dict[int, _Entry] = {}
        self._ended: dict[int, _Entry] = {}
        self._looked: dict[int, _Looked] = {}
        self._gone: dict[int, int] = {}
        self._stale: set[int] = set()
        self._ending: list[int] = []
        self.programs = Programs()
        self._sessions: dict[str, str] = {}
        self._checked_ms = self._drained_ms = now_ms
        self._lost_since_ms: int | None = None
        self._refused = ""
        self._slept_ns = _slept_ns()
        self._socket: socket.socket | None = None
        try:
            self._socket = _subscribe()
        except OSError as error:
            self._refused = error.strerror or str(error)
        self._scan()

    def fileno(self) -> int:
        """None to poll: it would wake the daemon a thousand times a second during a build."""
        return -1

    @property
    def wake_fd(self) -> int:
        """The netlink socket, -1 if there is none."""
        return self._socket.fileno() if self._socket is not None else -1

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """Take in what was forked and execed. Yields ProcGone for processes looked at, Lost if the socket overflowed."""
        self._slept_ns = _slept_ns()
        self._take(now_ms)
        if self._lost_since_ms is not None:
            since_ms, self._lost_since_ms = self._lost_since_ms, None
            yield Lost(at_ms=now_ms, reason="proc_connector_overflow", since_ms=since_ms, until_ms=now_ms)
        yield from self._told_ends(now_ms)
        if now_ms - self._checked_ms >= _GONE_EVERY_MS or now_ms < self._checked_ms:
            self._checked_ms = now_ms
            yield from self._ends(now_ms)

    def look(self, pid: int, now_ms: int) -> Process:
        """What is known of a process: "exact" if it lives or was looked at while it did, "cached", or "unknown"."""
        if pid in self._looked:
            self._take(now_ms)  # it may have become another program since
        known = self._looked.get(pid)
        at_ns = time.monotonic_ns()
        stat = procfs.stat(pid)
        if stat is not None and stat.state != b"Z":
            same = known is not None and known.process.start == stat.start
            # no argv: it was looked at in the middle of its exec
            if known and same and known.process.argv and pid not in self._stale and 0 <= now_ms - known.at_ms < _FRESH_MS:
                return known.process
            found = procfs.look(pid)
            if found is not None and found.exe:
                process = self._process(found)
                if known and same:
                    _add(process, known.process)
                return self._remember(process, now_ms, at_ns)
        self._take(now_ms)
        known = self._looked.get(pid)  # the table may just have learnt that the pid has a new owner
        if known and (stat is None or stat.start == known.process.start):
            return self._as_it_was_last(pid, known).process
        return self._cached(pid, stat)

    def catch_up(self, now_ms: int) -> None:
        """Take in what was forked by now: a pid in the table may have another owner since."""
        self._take(now_ms)

    def _as_it_was_last(self, pid: int, known: _Looked) -> _Looked:
        """A process that is gone; it may have become another program after the last look, which nobody saw."""
        if pid in self._stale and known.process.known == "exact":
            entry = self._table.get(pid) or self._ended.get(pid)
            exe = self._exe(pid, entry)
            process = msgspec.structs.replace(known.process, exe=exe, known="cached", blind=True)
            if exe != known.process.exe:
                process.argv = []  # another program's command line
            if entry is not None and not entry.execed:  # read right after its exec
                process.argv = [_text(argument) for argument in entry.identity[4]]
            self._name_login(process, entry)
            known = self._looked[pid] = known._replace(process=process)
        return known

    def _name_login(self, process: Process, entry: _Entry | None) -> None:
        """A login uid that was set after the look, before the exec."""
        if process.loginuid is None and entry is not None and entry.identity[1] is not None:
            process.loginuid = entry.identity[1]
            process.login_user = self._passwd.name(process.loginuid)

    def parent(self, pid: int) -> int:
        """The parent of a process, living or lately ended, by the table; 0 if nothing is known of it."""
        entry = self._table.get(pid) or self._ended.get(pid)
        if entry is None:
            self._take(self._drained_ms)  # it may have come and gone since
            entry = self._table.get(pid) or self._ended.get(pid)
        if entry is not None and entry.ppid:
            return entry.ppid
        stat = procfs.stat(pid)
        return stat.ppid if stat is not None else 0

    def changed(self, pid: int) -> bool:
        """Whether a process that was looked at has become another program since, as far as `drain` was told."""
        return pid in self._stale

    def learn(self, process: Process, now_ms: int, at_ns: int = 0) -> Process:
        """Take in what the holder saw at `at_ns` (CLOCK_MONOTONIC; 0: unknown); returns it with names and parents added."""
        self._take(now_ms)
        self._name(process)
        self._find_pairs(process)
        process.began_ms = self._began_ms(process.pid, process.start)
        if not process.parents:
            process.parents = self._parents(process.ppid)
        known = self._looked.get(process.pid)
        if known and known.process.start == process.start:
            _add(process, known.process)
        process.exe = process.exe or self._exe(process.pid, self._table.get(process.pid))
        self._remember(process, now_ms, at_ns)
        if [_text(argument) for argument in procfs.argv(process.pid)] not in ([], process.argv):
            self._stale.add(process.pid)  # a shell's child that was held at a redirection, and has execed since
        return process

    def coverage(self, now_ms: int) -> Coverage:
        """Whether the proc connector can be heard."""
        ok = self._socket is not None
        why = "" if ok else f"proc connector: {self._refused}; it needs CAP_NET_ADMIN and CONFIG_PROC_EVENTS"
        blind = ["exe_of_short_lived"] if ok else ["short_lived_processes"]
        return Coverage(at_ms=now_ms, sensor="processes", ok=ok, sees=["processes"], blind=blind, why=why)

    def close(self) -> None:
        """Stop listening."""
        self._passwd.close()
        self._pairs.close()
        self.programs.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # -- the table ----------------------------------------------------------------------------------------------------

    def _take(self, now_ms: int) -> None:
        if self._socket is None:
            return
        receive, buffer, table = self._socket.recv_into, self._buffer, self._table
        unpack, looked, stale = _PROC_EVENT.unpack_from, self._looked, self._stale
        refresh, slept_ns, forked = _REFRESH, self._slept_ns, self.programs.forked
        self.programs.drain()
        for _ in range(_DRAIN_MAX):
            try:
                size = receive(buffer)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._lost_since_ms = self._drained_ms if self._lost_since_ms is None else self._lost_since_ms
                    self._scan()
                    continue
                break
            if size < _AT + _PROC_EVENT.size:
                continue
            what, at_ns, thread, tgid, child, child_tgid = unpack(buffer, _AT)
            if what == PROC_EVENT_FORK:
                if child != child_tgid:
                    continue  # a thread
                parent = table.get(tgid)
                start = (at_ns + slept_ns) // _TICK_NS
                table[child] = (
                    _Entry(tgid, parent.identity, min(parent.execed, _BEFORE), start, at_ns)
                    if parent is not None
                    else _Entry(tgid, _NOBODY, _ITSELF, start, at_ns)
                )
                forked(child, at_ns)
                if child in looked and at_ns > looked[child].at_ns:  # else we looked before this was read
                    del looked[child]
                    self._gone.pop(child, None)
                continue
            if what == PROC_EVENT_EXIT:
                if thread == tgid and (entry := table.get(tgid)) is not None:
                    entry.ended_ns = at_ns
                    if tgid in looked:
                        self._ending.append(tgid)
                continue
            if what not in _ALTERS:
                continue  # before Linux 6.6 every kind of event comes
            entry = table.get(tgid)
            if entry is None:
                entry = table[tgid] = _Entry(0, _NOBODY, _ITSELF)
            if what == PROC_EVENT_EXEC:
                entry.execed, entry.execed_ns = _ITSELF, at_ns
                if tgid in looked and at_ns > looked[tgid].at_ns:
                    stale.add(tgid)
                if self.eager and refresh > 0:
                    refresh -= 1
                    self._read(tgid, entry)
                    continue
                if entry.identity[1] is not None:
                    continue  # a loginuid, once set, does not change in the ordinary way
            elif what == PROC_EVENT_UID:
                entry.identity = (child, *entry.identity[1:])
            if refresh > 0:
                refresh -= 1
                self._refresh(tgid, entry)
        self._drained_ms = now_ms
        if len(table) > _TABLE_MAX:
            self._prune()

    def _read(self, pid: int, entry: _Entry) -> None:
        """Everything a program is known by, right after its exec."""
        base = f"/proc/{pid}"
        argv, exe = procfs.argv(pid), procfs.link(f"{base}/exe")
        if argv and exe:
            loginuid, session = procfs.number(f"{base}/loginuid"), procfs.number(f"{base}/sessionid")
            entry.identity, entry.execed = (procfs.uid(pid), loginuid, session, exe, argv), _NOT

    def _refresh(self, pid: int, entry: _Entry) -> None:
        """Login sets the loginuid, uid and session of a process that is there already."""
        base = f"/proc/{pid}"
        loginuid = procfs.number(f"{base}/loginuid")
        if loginuid is None and entry.identity[1] is not None:
            return  # gone, most likely
        _, _, _, exe, argv = entry.identity
        uid, session = procfs.uid(pid), procfs.number(f"{base}/sessionid")
        entry.identity = (uid if uid is not None else entry.identity[0], loginuid, session, exe, argv)

    def _scan(self) -> None:
        """Every process there is, once."""
        for name in os.listdir("/proc"):  # noqa: PTH208
            if not name.isdigit():
                continue
            pid = int(name)
            stat = procfs.stat(pid)
            if stat is None:
                continue
            base = f"/proc/{pid}"
            loginuid, session = procfs.number(f"{base}/loginuid"), procfs.number(f"{base}/sessionid")
            identity = (procfs.uid(pid), loginuid, session, procfs.link(f"{base}/exe"), procfs.argv(pid))
            self._table[pid] = _Entry(stat.ppid, identity, _NOT, stat.start)

    def _prune(self) -> None:
        """Keep the living, and of the dead one generation."""
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208
        self._ended = {pid: entry for pid, entry in self._table.items() if pid not in alive}
        for pid in self._ended:
            del self._table[pid]

    def _ends(self, now_ms: int) -> Iterator[Fact]:
        for pid, looked in list(self._looked.items()):
            if pid in self._gone:
                if now_ms - self._gone[pid] > _REMEMBER_MS:
                    del self._looked[pid], self._gone[pid]
                continue
            stat = procfs.stat(pid)
            if stat is None or stat.start != looked.process.start:
                self._gone[pid] = now_ms
                self._as_it_was_last(pid, looked)
                self._stale.discard(pid)
                yield ProcGone(at_ms=now_ms, pid=pid, start=looked.process.start)

    def _told_ends(self, now_ms: int) -> Iterator[Fact]:
        """The kernel's word on the ends of processes that were looked at."""
        ending, self._ending = self._ending, []
        for pid in ending:
            looked, entry = self._looked.get(pid), self._table.get(pid)
            if looked is not None and pid not in self._gone and entry is not None and entry.ended_ns:
                self._gone[pid] = now_ms
                start = self._as_it_was_last(pid, looked).process.start
                self._stale.discard(pid)
                yield ProcGone(at_ms=now_ms, pid=pid, start=start, ended_ms=_when_ms(entry.ended_ns))

    # -- one process --------------------------------------------------------------------------------------------------

    def _remember(self, process: Process, now_ms: int, at_ns: int) -> Process:
        if len(self._looked) >= _LOOKED_MAX:
            for pid in list(self._looked)[: _LOOKED_MAX // 4]:
                del self._looked[pid]
                self._gone.pop(pid, None)
        self._looked.pop(process.pid, None)  # so that the order is that of the last look
        self._looked[process.pid] = _Looked(now_ms, at_ns, process)
        self._gone.pop(process.pid, None)
        self._stale.discard(process.pid)
        entry = self._table.get(process.pid)
        if entry is not None and entry.execed_ns > at_ns > 0:
            self._stale.add(process.pid)  # held and looked at, it has become another program before we heard of the look
        return process

    def _process(self, look: procfs.Look) -> Process:
        stat = look.stat
        process = Process(
            pid=stat.pid,
            start=stat.start,
            ppid=stat.ppid,
            uid=look.uid,
            loginuid=look.loginuid,
            session=str(look.session) if look.session is not None else "",
            tty=tty_name(stat.tty),
            exe=path_text(look.exe),
            argv=[_text(argument) for argument in look.argv],
            pipes=look.pipes,
            ends=look.ends,
            blind=look.blind,
            files=[OpenFile(path=path_text(path), size=size, key=key) for path, size, key in look.files],
            parents=self._parents(stat.ppid),
            began_ms=self._began_ms(stat.pid, stat.start),
        )
        self._name(process)
        self._find_pairs(process)
        return process

    def _cached(self, pid: int, stat: procfs.Stat | None) -> Process:
        entry = self._table.get(pid) or self._ended.get(pid)
        if entry is None or entry.identity is _NOBODY:
            return Process(pid=pid, start=stat.start if stat else entry.start if entry else 0, known="unknown")
        uid, loginuid, session, _, argv = entry.identity
        parent = self._looked.get(entry.ppid)
        if loginuid is None and parent is not None:
            loginuid, session = parent.process.loginuid, None
        if loginuid is None:  # a login that happened since the last drain: the parent may live and have it
            loginuid, session = procfs.number(f"/proc/{entry.ppid}/loginuid"), procfs.number(f"/proc/{entry.ppid}/sessionid")
        process = Process(
            pid=pid,
            start=stat.start if stat else entry.start,
            ppid=entry.ppid,
            uid=uid,
            loginuid=loginuid,
            session=str(session) if session is not None else "",
            exe=self._exe(pid, entry),
            argv=[] if entry.execed else [_text(argument) for argument in argv],
            parents=self._parents(entry.ppid),
            began_ms=self._began_ms(pid, entry.start),
            ended_ms=_when_ms(entry.ended_ns) if entry.ended_ns else None,
            known="cached",
        )
        self._name(process)
        return process

    def _exe(self, pid: int, entry: _Entry | None) -> str:
        """The program of a process that nobody looked at in time, as far as it was told at its exec or its parent's."""
        for _ in range(_ANCESTORS):
            if entry is None:
                break
            if not entry.execed:
                return path_text(entry.identity[3])
            program = self.programs.of(pid)
            if program or entry.execed == _ITSELF:
                return path_text(program)
            pid, entry = entry.ppid, self._table.get(entry.ppid) or self._ended.get(entry.ppid)
        return ""

    def _began_ms(self, pid: int, start: int) -> int | None:
        """When a process began: as its fork was told, else by its start time, to 10 ms."""
        entry = self._table.get(pid) or self._ended.get(pid)
        if entry is not None and entry.born_ns and abs(entry.start - start) <= 1:
            return _when_ms(entry.born_ns)
        return _when_ms(start * _TICK_NS - self._slept_ns) if start else None

    def _parents(self, pid: int) -> list[Parent]:
        chain: list[Parent] = []
        while pid > 0 and len(chain) < _ANCESTORS:
            stat = procfs.stat(pid)
            if stat is not None:
                chain.append(Parent(pid=pid, start=stat.start, exe=path_text(procfs.link(f"/proc/{pid}/exe"))))
                pid = stat.ppid
                continue
            looked = self._looked.get(pid)
            entry = self._table.get(pid) or self._ended.get(pid)
            if looked is not None:
                chain.append(Parent(pid=pid, start=looked.process.start, exe=looked.process.exe))
                pid = looked.process.ppid
            elif entry is not None:
                chain.append(Parent(pid=pid, exe=self._exe(pid, entry)))
                pid = entry.ppid
            else:
                break
        return chain

    def _find_pairs(self, process: Process) -> None:
        """Sockets that are connected within the machine get the name of the pair; others hand nothing on here."""
        sockets = [int(each[7:]) for each in process.pipes if isinstance(each, str) and each.startswith("socket:")]
        if sockets:
            held = dict(zip(process.pipes, process.ends, strict=True)).items()
            named = {each: end for each, end in held if not str(each).startswith("socket:")}
            channels = named | self._pairs.of(sockets)
            process.pipes, process.ends = list(channels), list(channels.values())

    def _name(self, process: Process) -> None:
        process.user = self._passwd.name(process.uid)
        process.login_user = self._passwd.name(process.loginuid)
        group = cgroup.parse(procfs.read(f"/proc/{process.pid}/cgroup") or procfs.read(f"/proc/{process.ppid}/cgroup"))
        process.session = group.session or process.session
        process.unit, process.container = group.unit, group.container
        process.image = self._images.of(group.container) if group.container else ""
        process.remote = self._remote(process.session)

    def _remote(self, session: str) -> str:
        """The address an ssh session comes from, as logind wrote it down."""
        if not session or "/" in session:
            return ""
        known = self._sessions.get(session)
        if known is None:
            if len(self._sessions) >= 256:
                self._sessions.clear()
            lines = procfs.read(str(self._run / session)).split(b"\n")
            known = next((_text(line[12:]) for line in lines if line.startswith(b"REMOTE_HOST=")), "")
            if lines != [b""]:
                self._sessions[session] = known
        return known


def _slept_ns() -> int:
    """What processes' start times (CLOCK_BOOTTIME) have over the proc connector's (CLOCK_MONOTONIC): the time suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()


def tty_name(number: int) -> str:
    """tty_nr of /proc/PID/stat as the name under /dev; empty for none, "major:minor" for one we have no name for."""
    major, minor = (number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00)
    if number == 0:
        return ""
    if 136 <= major <= 143:
        return f"pts/{minor + ((major - 136) << 8)}"
    if major == 4:
        return f"tty{minor}" if minor < 64 else f"ttyS{minor - 64}"
    return f"{major}:{minor}"


def _subscribe() -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_CONNECTOR)
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RCVBUF_BYTES)
        listener.bind((0, CN_IDX_PROC))
        release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
        body = struct.pack("=I", PROC_CN_MCAST_LISTEN)
        if release >= (6, 6):  # older kernels pass over a request of this length
            body += struct.pack("=I", _EVENTS)
        request = _CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, len(body), 0) + body
        listener.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(request), 3, 0, 0, os.getpid()) + request)  # 3: NLMSG_DONE
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _add(process: Process, before: Process) -> None:
    """Keep what an earlier look at the same process saw: the pipe's other end may be closed by now."""
    ends = dict(zip(before.pipes, before.ends, strict=True))
    for pipe, end in zip(process.pipes, process.ends, strict=True):
        ends[pipe] = ends.get(pipe, 0) | end
    process.pipes, process.ends = list(ends), list(ends.values())
    process.blind = process.blind and before.blind
    held = {file.key or file.path for file in process.files}
    process.files = [*process.files, *(file for file in before.files if (file.key or file.path) not in held)][:64]


def _when_ms(at_ns: int) -> int:
    """A moment of CLOCK_MONOTONIC, in ms since 1970."""
    return (time.time_ns() - time.monotonic_ns() + at_ns) // 1_000_000


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
