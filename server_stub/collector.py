"""The collector as one object: it opens key and store, starts the writer, and keeps what all requests share.

Owns: what is in memory only (when each agent was last heard, who enrolled, the register in force, the bells that wake
readers). What is done by the clock is in `duties`. Wires and starts and stops; judges nothing itself. Lives in one event loop.
Must not know HTTP: `app` asks it, `serve` runs it.
"""

import asyncio
import base64
import contextlib
import fcntl
import logging
import os
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct
from nacl.signing import SigningKey

from agent.contract import wire
from server_stub import auth, carry, duties, ledger, looks, signers, tree, witness
from server_stub.commit import Busy, Writer
from server_stub.config import ConfigError, Settings
from server_stub.store import StoreError
from server_stub.store.opening import open_store
from server_stub.tail import Bell

T = TypeVar("T")
log = logging.getLogger(__name__)
_AGENTS = "SELECT agent, key, name, last_seen, silent FROM agents"
VERIFIERS = 2
READERS = 4


def _read_vkey(text: str) -> tuple[str, bytes]:
    try:
        return witness.read_vkey(text)
    except ValueError as error:
        raise ConfigError(f"[[collector.cosign]]: {error}") from None


class Enrolled(Struct):
    """An agent this collector knows: its Ed25519 key, its name, when it was last heard (ms)."""

    key: bytes
    name: str
    last_seen: int
    silent: bool


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


def _make_key(path: Path) -> None:
    """A new key at `path`, whole or not at all, however this ends; one that is there already stays. Raises OSError."""
    handle, made = tempfile.mkstemp(prefix=".signing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(base64.b64encode(os.urandom(32)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
    finally:
        Path(made).unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load_key(path: Path) -> SigningKey:
    """The log's signing key (base64 of its 32-byte seed, one line), made if missing. Raises ConfigError.

    It may be root's and be lent to our group (0640), so that a service reads what it can't change.
    """
    try:
        if not path.exists():
            _make_key(path)
        with path.open("rb") as file:
            held, text = os.fstat(file.fileno()), file.read(256)
    except OSError as error:
        raise ConfigError(f"{path}: the signing key can't be read or made ({error.strerror}); see to its directory") from None
    if held.st_mode & 0o037 or held.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path}: others may use the signing key (owner {held.st_uid}, mode {stat.S_IMODE(held.st_mode):04o});"
            " make it yours and chmod 600 it"
        )
    try:
        return SigningKey(base64.b64decode(text, validate=False))
    except Exception:
        raise ConfigError(f"{path}: is not a signing key (base64 of 32 bytes); restore it from your backup") from None


def _lock_file(settings: Settings) -> int:
    """The open lock in a directory that is ours alone. Raises ConfigError."""
    state_dir = settings.state_dir
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = state_dir.stat()
        if held.st_mode & 0o077:
            raise ConfigError(
                f"{state_dir}: is open to others (mode {stat.S_IMODE(held.st_mode):04o}), who could read the events or stop"
                f" the collector; run: chmod 700 {state_dir}"
            )
        lock = os.open(settings.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(lock, 0o600)
        return lock
    except OSError as error:
        raise ConfigError(f"{state_dir}: can't be used ({error.strerror}); run as the collector's user, or as root") from None


@contextlib.contextmanager
def locked(settings: Settings, patience_s: float) -> Any:
    """Be the one process that writes this store. Raises ConfigError if another one is for longer than `patience_s`."""
    with os.fdopen(_lock_file(settings), "r+") as file:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ConfigError(f"{settings.state_dir}: another collector works on this store; stop it first") from None
                time.sleep(0.05)
        yield


@contextlib.contextmanager
def _private() -> Any:
    """Whatever is made meanwhile is the owner's alone: SQLite's files beside the store, too."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class Collector:
    """Everything the requests share. Make it with `opened`."""

    def __init__(self, settings: Settings, now: Callable[[], int] = now_ms) -> None:
        self.settings, self.now = settings, now
        self.loop = asyncio.get_running_loop()
        self.bell, self.register_bell = Bell(), Bell()
        self.elsewhere = asyncio.Event()
        self.store = open_store(settings)
        self.key = signers.finish(self.store.session(), settings.key_file, load_key(settings.key_file))
        self.writer = Writer(self.store, self.key, socket.gethostname() or "collector", now=now, woken=self._woken)
        self.verifiers = ThreadPoolExecutor(VERIFIERS, "verify")
        self.readers = ThreadPoolExecutor(READERS, "read")
        self.started_at = now()
        self.stopping = False
        self.batches = dict.fromkeys(("accept", "repeat", "heartbeat", "hole", "fork", "bad", "busy"), 0)
        self.in_flight: dict[str, int] = {}
        self.tails = self.exports = 0
        self.looks = looks.Looks(self.store)
        self.agents: dict[str, Enrolled] = {}
        for agent, key, name, seen, silent in self.store.rows(_AGENTS):
            self.agents[agent] = Enrolled(bytes(key), name, seen, bool(silent))
        self._seen: set[str] = set()
        self.cosign = dict(_read_vkey(text) for text in settings.cosign)
        self.carried = {"ok": 0, "failed": 0, "rewritten": 0}
        self.register_version = 0
        self.register = wire.SignedRegister("", "")

    @property
    def origin(self) -> str:
        """The name of the log in its checkpoints."""
        return f"sekisho/{self.writer.id}"

    def _elsewhere(self, size: int) -> None:
        """Another collector over this store has committed: called from the store's thread."""
        self.writer.seen(size)
        with contextlib.suppress(RuntimeError):  # the loop is closing
            self.loop.call_soon_threadsafe(self.elsewhere.set)

    async def known(self, agent: str) -> Enrolled | None:
        """An agent, also one that enrolled at another collector over this store."""
        found = self.agents.get(agent)
        if found is None and agent and self.store.shared:
            for _, key, name, seen, silent in await self.rows(f"{_AGENTS} WHERE agent = ?", (agent,)):
                found = self.agents.setdefault(agent, Enrolled(bytes(key), name, seen, bool(silent)))
        return found

    async def reread(self) -> None:
        """What is remembered of a store that others change, too: the register in force."""
        rows = await self.rows("SELECT substr(value, 1, 20) FROM meta WHERE name = 'register'")
        if rows and int(rows[0][0].partition("\n")[0]) > self.register_version:
            self.take_register(await self.change(ledger.current_register))

    async def reread_agents(self) -> None:
        """Which agents there are, when any collector last heard them, and who is said to be silent."""
        for agent, key, name, seen, silent in await self.rows(_AGENTS):
            known = self.agents.setdefault(agent, Enrolled(bytes(key), name, seen, bool(silent)))
            known.name, known.last_seen, known.silent = name, max(known.last_seen, seen), bool(silent)

    def _woken(self, _size: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closing: nobody waits any more
            self.loop.call_soon_threadsafe(self.bell.ring)

    async def change(self, work: Callable[[Writer], T], events: int = 1) -> T:
        """Run `work` within the writer; returns once its commit is durable. Raises Busy, StoreError, or its Refusal."""
        return await asyncio.wrap_future(self.writer.submit(work, events))

    async def rows(self, sql: str, values: list[Any] | tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Committed rows, read in a thread."""
        return await self.loop.run_in_executor(self.readers, self.store.rows, sql, values)

    async def reading(self, work: Callable[[], T]) -> T:
        """Run `work`, which reads the store, in a thread."""
        return await self.loop.run_in_executor(self.readers, work)

    def heard(self, agent: str) -> None:
        """An authentic batch came from `agent`, now."""
        self.agents[agent].last_seen = self.now()
        self._seen.add(agent)

    async def enrol(self, asked: wire.Enrol, key: bytes) -> str:
        """Admit an agent; its id. Raises auth.NotAllowed."""
        agent = await self.change(lambda writer: auth.enrol(writer, asked, key, self.settings.enroll_token))
        known = self.agents.get(agent)
        self.agents[agent] = Enrolled(key, asked.name, self.now(), known.silent if known else False)
        return agent

    async def point(self, size: int | None = None) -> carry.Point:
        """The signed checkpoint of the log at `size` (default: now)."""
        at = self.writer.size if size is None else size

        def make() -> carry.Point:
            note = tree.checkpoint(self.origin, at, tree.root_at(at, self.store.subtree), self.key)
            return carry.Point(note, self.origin, at, self.writer.keys)

        return await self.reading(make)

    def take_register(self, stored: tuple[int, wire.SignedRegister]) -> None:
        """A new register is in force: wake the agents that wait for it."""
        if stored[0] > self.register_version:
            self.register_version, self.register = stored
            self.register_bell.ring()

    def stop(self) -> None:
        """Let go of all who wait, so that they may end."""
        self.stopping = True
        self.bell.ring()
        self.register_bell.ring()


@asynccontextmanager
async def opened(
    settings: Settings, patience_s: float = 5.0, now: Callable[[], int] = now_ms, served: bool = False
) -> AsyncIterator[Collector]:
    """A collector on its store, for as long as the context lasts; `served`: it also does what is done by the clock alone.

    Raises ConfigError, StoreError.
    """
    with _private(), locked(settings, patience_s):
        collector = Collector(settings, now)
        tasks: list[asyncio.Task[None]] = []
        try:
            collector.take_register(await collector.change(ledger.current_register))
            collector.store.listen(collector._elsewhere)
            due = [duties.watch_fleet, duties.keep_in_step]
            due += [duties.keep_retention, duties.keep_witnesses, duties.keep_register] * served
            tasks += [asyncio.create_task(each(collector)) for each in due]
            yield collector
        finally:
            collector.stop()
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            with contextlib.suppress(StoreError, Busy):  # of a store that fails the counts since the last look are lost
                await duties.keep_looks(collector, collector.looks.due(now()), now())
            collector.verifiers.shutdown()
            collector.readers.shutdown()
            collector.writer.close()
            collector.store.close()
