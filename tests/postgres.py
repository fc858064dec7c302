"""A real PostgreSQL for tests: made by initdb, started, promoted and killed here, on a socket and a loopback port of its own.

As root it runs as "postgres" or "nobody", since it refuses to be root's. One server serves a whole run of tests; each test gets
a database of its own. `standby` makes another node that follows the first.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from tests.house import free_port, until

PLACES = [
    *sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda at: at.parent.name.zfill(3), reverse=True),
    *(Path(found).parent for found in [shutil.which("initdb")] if found),
]
_NUMBER = count(1)


def missing() -> str:
    """Why there is no PostgreSQL for the tests; empty if there is."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no PostgreSQL driver here: pip install 'sekisho[postgres]'"
    if not PLACES:
        return "no PostgreSQL here: apt-get install postgresql"
    if os.geteuid() == 0 and _owner() is None:
        return "no user that PostgreSQL may run as: neither postgres nor nobody"
    return ""


def _owner() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


class Node:
    """One PostgreSQL server."""

    def __init__(self, root: Path, name: str = "one") -> None:
        self.root, self.name, self.port = root, name, free_port()
        self.data, self.log = root / name, root / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def _as(self) -> dict[str, Any]:
        """How subprocess runs a program of PostgreSQL's."""
        owner = _owner() if os.geteuid() == 0 else None
        who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
        return {"cwd": self.root, "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}, **who}

    def run(self, command: str, *args: str) -> str:
        """One of PostgreSQL's own programs, as its user."""
        program = [str(PLACES[0] / command), *args]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120, **self._as())
        assert done.returncode == 0, f"{command} {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def make(self) -> None:
        self.run("initdb", "-D", str(self.data), "-U", "sekisho", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nunix_socket_directories = '{self.root}'\nmax_connections = 200\n"
                "shared_buffers = 64MB\nwal_keep_size = 256MB\nautovacuum = on\nlog_min_messages = warning\n"
                f"port = {self.port}\n"
            )

    def start(self) -> None:
        program = [str(PLACES[0] / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(program, stdout=log, stderr=log, **self._as())
        until(self.answers, lambda: f"PostgreSQL does not start:\n{self.log.read_text()}", 30)

    def answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(self.url("postgres"), connect_timeout=2):
                return True
        except psycopg.Error:
            return False

    def stop(self, with_signal: int = signal.SIGINT) -> None:
        """SIGINT: cleanly. SIGQUIT: at once. SIGKILL: with all its children, as by a power cut."""
        if self._process is None:
            return
        if with_signal == signal.SIGKILL:
            import psutil

            children = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            for child in children:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue
        else:
            self._process.send_signal(with_signal)
        self._process.wait(30)
        self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://sekisho@127.0.0.1:{self.port}/{database}"

    def sql(self, text: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as db:
            cursor = db.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """A new, empty database; its address."""
        name = f"site_{os.getpid()}_{next(_NUMBER)}"
        self.sql(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
        return self.url(name)

    def standby(self, name: str) -> "Node":
        """A second node that follows this one under its name; started."""
        made = Node(self.root, name)
        source = f"host=127.0.0.1 port={self.port} user=sekisho application_name={name}"
        self.run("pg_basebackup", "-d", source, "-D", str(made.data), "-R", "-X", "stream", "--no-sync", "-c", "fast")
        with (made.data / "postgresql.conf").open("a") as file:
            file.write(f"port = {made.port}\nsynchronous_standby_names = ''\n")
        made.start()
        return made

    def promote(self) -> None:
        self.sql("SELECT pg_promote(true, 30)")


def room() -> Path:
    """A directory that PostgreSQL's user may use, short enough for a socket's name."""
    made = Path(tempfile.mkdtemp(prefix="sekisho-pg-"))
    if os.geteuid() == 0 and (owner := _owner()):
        os.chown(made, owner.pw_uid, owner.pw_gid)
    made.chmod(0o700)
    return made
