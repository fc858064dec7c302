"""A whole house for tests: a real collector and real agents on loopback, started and killed as an admin would.

The agent comes from the public pytest plugin; this adds the collector, and programs that run as a logged-in person.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agent.pytest_plugin import _environment
from tests.ocsf_check import problems

TOKEN = "house-token"
LOGIN_UID = 1000


def until(holds: Callable[[], Any], otherwise: str | Callable[[], str], within_s: float = 20.0) -> Any:
    """Wait for a condition; its value is returned. Fails with `otherwise` (called, if it can be) after the deadline."""
    deadline = time.monotonic() + within_s
    while not (value := holds()):
        assert time.monotonic() < deadline, otherwise() if callable(otherwise) else otherwise
        time.sleep(0.02)
    return value


def none_is_bad_ocsf(events: list[dict[str, Any]]) -> None:
    """Every event that a test made the product write is valid OCSF 1.8.0."""
    bad = {event["metadata"]["event_code"]: found for event in events if (found := problems(event))}
    assert not bad, bad


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Stores:
    """Where the collectors of the tests that run now keep their events: each in a SQLite file, or in a database of its own."""

    new_database: Callable[[], str] | None = None
    """A new, empty PostgreSQL database's address; None: SQLite."""


class Table:
    """The store behind a collector, as whoever owns its machine can touch it: the same few words for both engines."""

    def __init__(self, db: Any, mark: str) -> None:
        self.db, self._mark = db, mark

    def execute(self, sql: str, values: tuple[Any, ...] = ()) -> Any:
        """A cursor; `?` stands for a parameter."""
        return self.db.execute(sql.replace("?", self._mark), values)


class Collector:
    """A real `sekisho-collector serve`. `events()` asks its API with an API token, as a SIEM would."""

    def __init__(self, root: Path, database: str = "", more: str = "") -> None:
        """`database`: another than one of its own. `more`: lines for its configuration."""
        self.root = root
        self.database = database or (Stores.new_database() if Stores.new_database else "sqlite")
        self.state_dir = root / "collector"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config_file = root / "collector.toml"
        self.log = root / "collector.log"
        self.config_file.write_text(
            f'[collector]\nlisten = "127.0.0.1:{self.port}"\nstate_dir = {json.dumps(str(self.state_dir))}\n'
            f'enroll_token = "{TOKEN}"\nsilent_after = "5s"\n'
            + (f'database = "{self.database}"\n' if self.database != "sqlite" else "")
            + more
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._token = ""

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "server_stub.cli", "serve", "-c", str(self.config_file)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        until(self._ready, lambda: f"the collector does not start:\n{self.log.read_text()}")
        if not self._token:
            self._token = self.run("token", "create", "--role", "viewer").strip()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the collector is not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(with_signal)
        code = self._process.wait(20)
        self._process = None
        return code

    def forget(self) -> None:
        """Lose the store, but not the signing key: a collector restored from nothing."""
        assert self._process is None, "stop it first"
        if self.database != "sqlite":
            with self.store() as store:
                store.execute("DROP SCHEMA public CASCADE")
                store.execute("CREATE SCHEMA public")
        for path in self.state_dir.iterdir():
            if "key" not in path.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._token = ""

    @contextlib.contextmanager
    def store(self) -> Iterator[Table]:
        """The store, by plain SQL, past the collector; what was done to it is kept at the end."""
        if self.database == "sqlite":
            with contextlib.closing(sqlite3.connect(self.state_dir / "collector.db")) as file, file:
                yield Table(file, "?")
            return
        import psycopg

        with psycopg.connect(self.database) as db:
            yield Table(db, "%s")

    def aged(self, received_at: int, which: str = "true") -> None:
        """Have events been received at this time (ms), past the collector, which is stopped."""
        with self.store() as store:
            if self.database != "sqlite":
                from server_stub.store import pgmonths

                pgmonths.ensure(store.db, pgmonths.month_of(received_at))
            store.execute(f"UPDATE events SET received_at = ? WHERE {which}", (received_at,))

    def run(self, *args: str) -> str:
        """A command on the collector's own machine."""
        command = [sys.executable, "-m", "server_stub.cli", *args, "-c", str(self.config_file)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
        assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def events(self, **filters: str) -> list[dict[str, Any]]:
        """All events, oldest first, page by page; looks at them, events too, only if they are asked for."""
        found: list[dict[str, Any]] = []
        after: Any = None
        while True:
            query = {"limit": "500", "order": "asc", **filters, **({"after": str(after)} if after else {})}
            page = self.get("/v1/events?" + "&".join(f"{key}={value}" for key, value in query.items()))
            found += page["events"]
            after = page["next"]
            if not after:
                return [each for each in found if "event" in filters or each["metadata"]["event_code"] != "record.viewed"]

    def _ready(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise AssertionError(f"the collector ended:\n{self.log.read_text()}")
        try:
            with urllib.request.urlopen(self.url + "/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def link_config(collector: Collector) -> str:
    """What an agent's configuration says of this collector."""
    return f'[agent.collector]\nurl = "{collector.url}"\ntoken = "{TOKEN}"\nheartbeat = "1s"\n'


def can_set_loginuid() -> bool:
    """Whether a child here can be given a login uid: root, audit in the kernel, and none set yet."""
    probe = subprocess.run(["sh", "-c", f"echo {LOGIN_UID} > /proc/self/loginuid"], capture_output=True)
    return probe.returncode == 0


def as_person(shell: str, cwd: Path | None = None, uid: int = LOGIN_UID) -> subprocess.CompletedProcess[str]:
    """Run shell text as somebody who logged in as `uid`, as far as this machine lets us."""

    def login() -> None:
        try:
            Path("/proc/self/loginuid").write_text(str(uid))
        except OSError:
            return  # told by can_set_loginuid; the event then names no login

    done = subprocess.run(["bash", "-c", shell], cwd=cwd, capture_output=True, text=True, preexec_fn=login, timeout=120)
    assert done.returncode == 0, f"{shell}: {done.returncode}\n{done.stderr}"
    return done


def wait_quietly(process: subprocess.Popen[Any]) -> None:
    """End a process of ours for good."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
