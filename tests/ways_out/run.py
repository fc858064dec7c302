"""Carrying out: every case of a table, one after the other, in one lab with one real agent.

Owns: what a case finds (files, folders, variables), the order in which things are made ready (all files and folders before the
agent starts, so that no case races with a mark), and how long the agent is waited for. Must not know what is right: `judge`
says. A case says by exit code 77 that it can't be done here; its last line on stderr says why.
"""

import contextlib
import os
import random
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.contract.event import path_text
from tests.ways_out import judge
from tests.ways_out.judge import Doing, Expected
from tests.ways_out.lab import FIRST, SECOND, Lab
from tests.ways_out.table import Case

CANNOT = 77
_LET_IT_SETTLE_S = 2.5
_TIMEOUT_S = 420
_PERSONS = {"first": FIRST, "second": SECOND, "nobody": None}

Told = Callable[[Doing], None]


class Session:
    """A shell that somebody has logged in to, waiting for what to do. `ended` after a case that took too long."""

    def __init__(self, login: list[str]) -> None:
        loop = 'while read -r script; do bash "$script" < /dev/null > "$script.out" 2> "$script.err"; echo $?; done'
        command = [*login, "bash", "-c", loop]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.ended = False

    def run(self, text: str, environment: dict[str, str]) -> tuple[int, str]:
        """(exit code, what it said) of shell text."""
        script = Path(environment["WORK"]) / "case.sh"
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        script.write_bytes(os.fsencode(f"{exports}cd {shlex.quote(environment['WORK'])}\nset -e\n{text}\n"))
        assert self._shell.stdin and self._shell.stdout
        self._shell.stdin.write(os.fsencode(script) + b"\n")
        self._shell.stdin.flush()
        if not select.select([self._shell.stdout], [], [], _TIMEOUT_S)[0]:
            self.end()
            return 1, f"not done after {_TIMEOUT_S} s"
        code = self._shell.stdout.readline().strip()
        if not code:
            self.end()
        said = [
            Path(f"{script}.{end}").read_text(errors="replace").strip()
            for end in ("err", "out")
            if Path(f"{script}.{end}").exists()
        ]
        return int(code or 1), next(filter(None, said), "")

    def end(self) -> None:
        """Log out, and end what was started by it and stayed."""
        self.ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe:
                pipe.close()


class Runner:
    """`run(cases)` does them all and returns what was done; the events are in the lab."""

    def __init__(self, lab: Lab, chance: random.Random, told: Told = lambda doing: None) -> None:
        self._lab, self._chance, self._told = lab, chance, told
        self._waiting: dict[str, subprocess.Popen[bytes]] = {}
        self._sessions: dict[str, Session] = {}

    def run(self, cases: list[Case]) -> list[Doing]:
        """Make everything ready, start the agent, plug the media, do the cases, stop the agent."""
        doings = {case.id: self._doing(case) for case in cases}
        todo = [case for case in cases if not doings[case.id].skipped]
        try:
            self._prepare(todo, doings)
            self._lab.start()
            for name in dict.fromkeys(case.onto for case in todo):
                if name not in ("none", "early") and f"medium {name}" not in self._lab.missing:
                    self._lab.plug(name)
            for case in cases:
                doing = doings[case.id]
                if not doing.skipped and not doing.broken:
                    self._do(case, doing)
                self._told(doing)
            self._lab.alive()
            time.sleep(_LET_IT_SETTLE_S)  # what innocent rows did is told by now, if it is
            self._lab.stop()
        finally:
            self._end()
        return list(doings.values())

    def _prepare(self, todo: list[Case], doings: dict[str, Doing]) -> None:
        """Disks, media and files, and what runs before the agent does."""
        lab = self._lab
        for name in dict.fromkeys(case.disk for case in todo):
            lab.disk(name)
        for name in dict.fromkeys(case.onto for case in todo):
            lab.medium(name)
        lab.scratch()
        if any("peer" in case.way.needs for case in todo):
            lab.connect()
        for case in todo:
            doing = doings[case.id]
            doing.skipped = self._missing(case)
            if not doing.skipped:
                self._make_ready(case, doing)
        if any(case.onto == "early" for case in todo):
            lab.plug("early")
        for case in todo:
            if case.way.before and not doings[case.id].skipped:
                self._begin_before(case, doings[case.id])

    def _end(self) -> None:
        for process in self._waiting.values():
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
        for session in self._sessions.values():
            session.end()

    # -- before --------------------------------------------------------------------------------------------------------

    def _doing(self, case: Case) -> Doing:
        medium = self._lab.root / "media" / case.onto
        source = self._lab.root / "disks" / case.disk / "protected" / case.id
        doing = Doing(
            id=case.id,
            source=path_text(os.fsencode(source)) + "/",
            dest="" if case.onto == "none" else path_text(os.fsencode(medium / case.id)) + "/",
            serial=self._lab.serial(case.onto),
            way=case.way.way,
            links=case.way.links,
            innocent=case.way.innocent,
        )
        doing.skipped = next((why for need in case.way.needs if (why := self._lacks(need))), "")
        return doing

    def _lacks(self, need: str) -> str:
        """Why a need of a row can't be met here, empty if it can."""
        if need in ("peer", "carry"):
            return self._lab.missing.get(need, "")
        if need == "vm":
            return "only on real hardware, in the virtual machine (make test-vm)"
        if need == "systemd":
            return "" if Path("/run/systemd/system").is_dir() else "systemd is not the machine's init"
        if need == "device-mapper":
            misc = Path("/proc/misc").read_text()
            return "" if "device-mapper" in misc else "this kernel has no device mapper"
        if need.startswith("/"):
            return "" if Path(need).exists() else f"{need} is not there"
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        return "" if shutil.which(need, path=path) else f"needs {need}"

    def _missing(self, case: Case) -> str:
        missing = self._lab.missing
        return (
            missing.get(f"disk {case.disk}")
            or missing.get(f"medium {case.onto}")
            or next((missing[need] for need in case.way.needs if need in missing), "")
        )

    def _make_ready(self, case: Case, doing: Doing) -> None:
        source = self._source(case)
        for folder in self._folders(case):
            folder.mkdir(parents=True)
            os.chown(folder, FIRST, FIRST)
            folder.chmod(0o777)
        least, most = case.way.sizes
        for number in range(case.way.files):
            size = self._chance.randint(least, most)
            (source / f"{case.way.id[:24]}-{number:05}.csv").write_bytes(self._chance.randbytes(size))
        if case.way.prepare:
            self._root(case, doing, case.way.prepare, "prepare")
        for folder, _, names in os.walk(os.fsencode(source)):
            os.chown(folder, FIRST, FIRST)
            for name in names:
                path = os.path.join(folder, name)
                os.chown(path, FIRST, FIRST, follow_symlinks=False)
                os.chmod(path, 0o644)
        self._expect(case, doing)

    def _expect(self, case: Case, doing: Doing) -> None:
        """What must be told: every file below $SRC that the row's globs name."""
        source = os.fsencode(self._source(case))
        for folder, _, names in os.walk(source):
            for name in names:
                path = os.path.join(folder, name)
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode):
                    continue
                text = path_text(path)
                rel = text.removeprefix(doing.source)
                if case.way.expects(rel):
                    moved = None if case.way.bytes == "any" else found.st_size * case.way.copies
                    doing.expected.append(Expected(path=text, bytes=moved, login=_PERSONS[case.way.person_of(rel)]))
                elif case.way.allows(rel):
                    doing.may.append(text)

    def _begin_before(self, case: Case, doing: Doing) -> None:
        go = self._lab.root / "work" / case.id / "go"
        os.mkfifo(go)
        go.chmod(0o666)
        command = [*self._login(case), "bash", "-c", f"exec 0<>{go}\n{case.way.before}"]
        process = subprocess.Popen(command, env=self._environment(case), stdout=subprocess.PIPE, cwd=go.parent)
        self._waiting[case.id] = process
        assert process.stdout
        if not process.stdout.readline():
            doing.broken = f"what runs before the agent ended with {process.wait()}"

    # -- the case ------------------------------------------------------------------------------------------------------

    def _do(self, case: Case, doing: Doing) -> None:
        self._lab.alive()  # innocent rows wait for nothing, and would pass for right without an agent
        if case.way.setup and not self._root(case, doing, case.way.setup, "setup"):
            return
        began = time.monotonic()
        code, said = self._session(case).run(case.way.run, self._environment(case))
        doing.seconds = time.monotonic() - began
        last = said.splitlines()[-1] if said else ""
        if code == CANNOT:
            doing.skipped = last or "can't be done here"
        elif code:
            doing.broken = f"ended with {code}: {said[-400:]}"
        elif (process := self._waiting.get(case.id)) is not None:
            process.wait(20)
        if not doing.skipped and not doing.broken and not doing.innocent:
            self._await(doing, case.way.within)
        if case.way.clean:
            self._root(case, doing, case.way.clean, "clean")

    def _await(self, doing: Doing, seconds: int) -> None:
        """Until all of it is told, or time is up; what is told later counts, too. Raises LabError if the agent ended."""
        deadline = time.monotonic() + seconds
        mine: list[dict[str, Any]] = []
        while time.monotonic() < deadline:
            self._lab.alive()
            fresh = [event for event in self._lab.news() if event["metadata"]["event_code"] == "file.copied_out"]
            mine += fresh
            if fresh and len(mine) >= len(doing.expected) and judge.complete(doing, mine):
                return
            time.sleep(0.05)

    def _root(self, case: Case, doing: Doing, text: str, what: str) -> bool:
        environment = self._environment(case)
        done = subprocess.run(
            ["bash", "-c", f"set -e\n{text}"], env=environment, cwd=environment["WORK"], capture_output=True, timeout=_TIMEOUT_S
        )
        said = done.stderr.decode(errors="replace").strip()
        if done.returncode == CANNOT:
            doing.skipped = said.splitlines()[-1] if said else "can't be done here"
        elif done.returncode:
            doing.broken = f"{what} ended with {done.returncode}: {said[-400:]}"
        return done.returncode == 0

    def _session(self, case: Case) -> "Session":
        """Who does it has been logged in for a while."""
        user = case.way.user
        if user not in self._sessions or self._sessions[user].ended:
            self._sessions[user] = Session(self._login(case))
        return self._sessions[user]

    def _login(self, case: Case) -> list[str]:
        carry = str(self._lab.carry)
        return {"person": [carry, "login", str(FIRST)], "root": [carry, "login", str(FIRST), "root"], "nobody": []}[
            case.way.user
        ]

    def _source(self, case: Case) -> Path:
        return self._lab.root / "disks" / case.disk / "protected" / case.id

    def _folders(self, case: Case) -> list[Path]:
        root = self._lab.root
        folders = [
            self._source(case),
            root / "disks" / case.disk / "elsewhere" / case.id,
            root / "work" / case.id,
            root / "work" / "scratch" / case.id,
        ]
        return folders + ([root / "media" / case.onto / case.id] if case.onto in self._lab.media else [])

    def _environment(self, case: Case) -> dict[str, str]:
        lab, source = self._lab, self._source(case)
        carry, elsewhere = lab.carry, lab.root / "disks" / case.disk / "elsewhere" / case.id
        medium = lab.root / "media" / case.onto
        first = next(iter(sorted(source.glob("*.csv"))), source / "none") if source.is_dir() else source
        given = {
            "SRC": source,
            "F": first,
            "PROTECTED": source.parent,
            "DISK": source.parent.parent,
            "MEDIUM": medium,
            "OUT": medium / case.id,
            "ELSEWHERE": elsewhere,
            "SCRATCH": lab.root / "work" / "scratch" / case.id,
            "WORK": lab.root / "work" / case.id,
            "GO": lab.root / "work" / case.id / "go",
            "DEVICE": lab.devices.get("device", ""),
            "PEER": lab.peer,
            "CARRY": carry,
            "FIRST": f"{carry} login {FIRST}",
            "SECOND": f"{carry} login {SECOND}",
            "FIRST_ROOT": f"{carry} login {FIRST} root",
            "UID1": FIRST,
            "UMOUNT": f"bash {Path(__file__).parent}/umount.sh",
            "PYTHON": shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable,  # one that anybody may run
            "HOME": lab.root / "work" / case.id,
            "TMPDIR": lab.root / "work" / "scratch" / case.id,
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
        }
        return {name: str(value) for name, value in given.items()}
