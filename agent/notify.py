"""Telling the person at the machine: the agent's side of `notifying.py`.

Owns: one small process a notice (started, heard, given up), how many may run at once, and the account of what reached whom
(`status`). Must not know why something is told (`core/notice.py`) nor how it is worded (`voice.py`). Never waits: a person's
session bus is the person's, and may be slow, hostile or gone. Called by `daemon` from its one thread.

A process that outlives its time is killed; one that can't be (it has the person's ids, and the agent may lack CAP_KILL; a
stopped one takes no alarm) is left alone, and this person is told nothing more until it is gone.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from agent.contract.form import AnyEvent
from agent.core.notice import Due, Notice, Notices, of_event
from agent.voice import approval_link, spoken, urgency

MOST_AT_ONCE, MOST_WAITING = 4, 64
_PATIENCE_S = 8.0
_KILLED_S = 0.05
_ANSWER_BYTES = 4_096
_MOST_SHOWN = 256
_TOLD = ("desktop", "terminal", "nobody")
_BOOT = """
import sys
package = type(sys)("agent")
package.__path__ = [sys.argv[1]]
sys.modules["agent"] = package
sys.path += sys.argv[2:]
from agent import notifying
notifying.main()
"""  # the package by hand, as for the process that holds


class _Child:
    __slots__ = ("about", "began_s", "process", "uid")

    def __init__(self, process: subprocess.Popen[bytes], about: tuple[int, str, str]) -> None:
        self.process, self.about, self.uid = process, about, about[0]
        self.began_s = time.monotonic()


class Notifier:
    """`take` each event, `step` at least once a second. `run`, `dev` and `utmp` are where sessions and terminals are."""

    def __init__(
        self, contact: str, approval_url: str, collector: str, machine: str, run: str = "/run", dev: str = "/dev"
    ) -> None:
        self.contact, self.approval_url, self._collector, self._machine = contact, approval_url, collector, machine
        self._run, self._dev = run, dev
        self._notices = Notices()
        self._queue: deque[Due] = deque()
        self._children: list[_Child] = []
        self._shown: dict[tuple[int, str, str], int] = {}
        self._counts: Counter[str] = Counter()
        self._last_why = ""
        library = importlib.util.find_spec("jeepney")
        folders = list(library.submodule_search_locations or []) if library is not None else []
        self._library = [str(Path(folder).parent) for folder in folders]

    def take(self, event: AnyEvent) -> None:
        """An event was made: tell somebody of it, if there is something to tell."""
        notice = of_event(event)
        if notice is not None:
            self.tell(notice)

    def tell(self, notice: Notice) -> None:
        """Say it now, or with what follows."""
        due = self._notices.add(notice)
        if due is not None:
            self._put(due)
            self._start()

    def step(self, now_ms: int) -> None:
        """Hear what became of those that run, and say what is due."""
        self._hear()
        for due in self._notices.due(now_ms):
            self._put(due)
        self._start()

    def status(self) -> dict[str, Any]:
        """How many notices reached a desktop, terminals, or nobody; why the last one did not."""
        said = {name: self._counts[name] for name in (*_TOLD, "dropped")}
        return {**said, "waiting": len(self._queue) + len(self._children), "last_why": self._last_why}

    @property
    def pids(self) -> list[int]:
        """The small processes that run now."""
        return [child.process.pid for child in self._children]

    def close(self) -> None:
        """What is not told by now is not told."""
        for child in self._children:
            self._end(child)
        self._children.clear()

    # -- the small processes -------------------------------------------------------------------------------------------

    def _put(self, due: Due) -> None:
        for at, waiting in enumerate(self._queue):
            if waiting.about == due.about:
                self._queue[at] = due
                return
        if len(self._queue) >= MOST_WAITING:
            self._counts["dropped"] += 1
            return
        self._queue.append(due)

    def _start(self) -> None:
        busy = {child.uid for child in self._children}
        for due in list(self._queue):
            if len(self._children) >= MOST_AT_ONCE:
                return
            if due.notice.uid not in busy:
                self._queue.remove(due)
                busy.add(due.notice.uid)
                self._begin(due)

    def _begin(self, due: Due) -> None:
        notice = due.notice
        link = approval_link(self.approval_url, self._collector, notice, self._machine)
        message = {
            "uid": notice.uid,
            "replaces": self._shown.get(due.about, 0) if notice.replaces else 0,
            "urgency": urgency(notice.severity),
            "tty": notice.tty,
            "texts": {lang: spoken(notice, lang, self.contact, link) for lang in ("en", "ja")},
            "run": self._run,
            "dev": self._dev,
            "utmp": f"{self._run}/utmp",
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, str(Path(__file__).parent), *self._library],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                process_group=0,
            )
        except OSError as error:
            self._count("nobody", f"no process could be started ({error.strerror})")
            return
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        try:  # a new pipe takes 64 KiB at once
            os.set_blocking(process.stdin.fileno(), False)
            process.stdin.write(json.dumps(message).encode())
            process.stdin.close()
        except OSError:
            pass  # it ended at once: `_hear` says why nothing was told
        self._children.append(_Child(process, due.about))

    def _hear(self) -> None:
        for child in list(self._children):
            if child.process.poll() is None:
                if time.monotonic() - child.began_s > _PATIENCE_S:
                    self._give_up(child)
                continue
            self._children.remove(child)
            self._understand(child)

    def _give_up(self, child: _Child) -> None:
        if not child.process.stdout or child.process.stdout.closed:
            return  # given up before, and not to be killed
        self._count("nobody", "it took too long")
        self._end(child)

    def _end(self, child: _Child) -> None:
        if child.process.stdout is not None:
            child.process.stdout.close()
        try:
            child.process.kill()
            child.process.wait(_KILLED_S)
        except (OSError, subprocess.TimeoutExpired):
            return  # no CAP_KILL: its own alarm ends it

    def _understand(self, child: _Child) -> None:
        out = child.process.stdout
        if out is None or out.closed:
            return
        try:
            data = os.read(out.fileno(), _ANSWER_BYTES)
            answer = json.loads(data) if data else {}
        except (OSError, ValueError, RecursionError):
            answer = {}
        finally:
            out.close()
        told = answer.get("told") if isinstance(answer, dict) else None
        if told not in _TOLD:
            self._count("nobody", f"the process that tells ended with {child.process.returncode}")
            return
        shown = answer.get("id")
        if told == "desktop" and type(shown) is int and 0 <= shown < 1 << 32:
            self._shown.pop(child.about, None)
            self._shown[child.about] = shown
            if len(self._shown) > _MOST_SHOWN:
                del self._shown[next(iter(self._shown))]
        why = answer.get("why")
        self._count(str(told), why if isinstance(why, str) and told == "nobody" else "")

    def _count(self, told: str, why: str = "") -> None:
        self._counts[told] += 1
        if why:
            self._last_why = why[:200]
