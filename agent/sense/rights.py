"""Who may read and write in the protected directories, looked up now and then: the agent's side of `readers`.

Owns: when it is worth a look (at the start, every so often, a while after something was changed, and when the machine's
users, groups or sudoers were), and the program that looks: one at a time, cut off after PATIENCE_S. Must not know what
was so before, nor what is too much.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from agent.contract.event import path_bytes
from agent.core.facts import Coverage, Fact, Grant, Rights
from agent.sense import SensorError

PATIENCE_S = 600.0
SETTLE_S = 2.0
"""Changes come in swarms (chmod -R): looked at when this long there was none, but after MOST_S at the latest"""
MOST_S = 60.0
_SHARE = 50
"""Between two looks at one directory at least as many times as long as the last one took"""
_NSS = ("/etc/passwd", "/etc/group", "/etc/sudoers", "/etc/sudoers.d")
_READ_BYTES = 1 << 16


class _Told(msgspec.Struct):
    grants: list[Grant] = []
    files: int = 0
    folders: int = 0
    unread: int = 0
    setuid: int = 0
    unknown: list[str] = []
    error: str = ""


_decode = msgspec.json.Decoder(_Told).decode


class _Directory:
    """One protected directory. Times by time.monotonic."""

    __slots__ = ("first_s", "last_s", "not_before_s", "why")

    def __init__(self) -> None:
        self.first_s, self.last_s, self.not_before_s = 0.0, 0.0, 0.0
        """The first and the last change since it was looked at (0: none; a new one was never looked at)"""
        self.why = ""


class RightsWatch:
    """A Sensor, asked by the clock. `protect` what is there, `stir` what was changed; `every_s` 0: never look."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._directories: dict[str, _Directory] = {}
        self._looking: tuple[str, subprocess.Popen[bytes], float] | None = None
        self._said = bytearray()
        self._ending: list[subprocess.Popen[bytes]] = []
        self._nss = self._stamps()

    def fileno(self) -> int:
        """Nothing to poll."""
        return -1

    def protect(self, paths: Iterable[str]) -> None:
        """These directories (as `path_text` spells them) are there and protected."""
        wanted = set(paths)
        for path in [path for path in self._directories if path not in wanted]:
            del self._directories[path]
        for path in wanted - self._directories.keys():
            self._directories[path] = _Directory()

    def stir(self, paths: Iterable[str]) -> None:
        """Something in these was changed."""
        now = time.monotonic()
        for path in paths:
            if (directory := self._directories.get(path)) is not None:
                directory.first_s, directory.last_s = directory.first_s or now, now

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """Rights, if somebody who looked is done; then the next one may look."""
        if self.every_s <= 0:
            return
        self._ending = [each for each in self._ending if each.poll() is None]
        if self._looking is not None:
            yield from self._listen(now_ms)
        stamps = self._stamps()
        if stamps != self._nss:
            self._nss = stamps
            self.stir(list(self._directories))
        if self._looking is None:
            self._next()

    def coverage(self, now_ms: int) -> Coverage:
        """Which directories could not be looked at."""
        whys = [f"{path}: {each.why}" for path, each in sorted(self._directories.items()) if each.why]
        sees = ["access_rights"] if self.every_s > 0 else []
        blind = ["access_rights"] if whys else []
        return Coverage(at_ms=now_ms, sensor="rights", ok=not whys, sees=sees, blind=blind, why="; ".join(whys))

    def close(self) -> None:
        """End who looks."""
        if self._looking is not None:
            self._end(self._looking[1])
            self._looking = None

    def _next(self) -> None:
        now = time.monotonic()
        for path, each in self._directories.items():
            settled = each.last_s and (now - each.last_s >= SETTLE_S or now - each.first_s >= MOST_S)
            if now >= each.not_before_s and (settled or not each.not_before_s or now - each.not_before_s >= self.every_s):
                each.first_s = each.last_s = 0.0
                looker = subprocess.Popen(
                    _program(path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                assert looker.stdout is not None
                os.set_blocking(looker.stdout.fileno(), False)
                self._looking, self._said = (path, looker, now), bytearray()
                return

    def _listen(self, now_ms: int) -> Iterator[Fact]:
        assert self._looking is not None
        path, looker, since = self._looking
        assert looker.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while some := os.read(looker.stdout.fileno(), _READ_BYTES):
                self._said += some
        now = time.monotonic()
        if looker.poll() is None and now - since < PATIENCE_S:
            return
        self._end(looker)
        self._looking = None
        directory = self._directories.get(path)
        if directory is None:
            return
        directory.not_before_s = now + _SHARE * (now - since)
        try:
            told = _decode(self._said)
        except msgspec.MsgspecError:
            said = "took too long" if now - since >= PATIENCE_S else f"ended with {looker.returncode}"
            directory.why = f"who may read it could not be looked up: it {said}"
            return
        directory.why = f"who may read it could not be looked up: {told.error}" if told.error else ""
        if not told.error:
            yield _fact(path, told, now_ms)

    def _end(self, looker: "subprocess.Popen[bytes]") -> None:
        if looker.stdout is not None:
            looker.stdout.close()
        if looker.poll() is None:
            looker.kill()  # it waits for a directory server, perhaps; it holds nothing of ours
            self._ending.append(looker)

    @staticmethod
    def _stamps() -> list[int]:
        """When the tables of users and rights were changed; 0 where there is none."""
        stamps = []
        for path in _NSS:
            try:
                stamps.append(os.stat(path).st_mtime_ns)  # noqa: PTH116 - each second: no object for it
            except OSError:
                stamps.append(0)
        return stamps


def look(path: str, now_ms: int) -> Rights:
    """Who may get at the directory `path` now; waits for the answer. Raises SensorError."""
    try:
        done = subprocess.run(_program(path), capture_output=True, timeout=PATIENCE_S, check=True)
        told = _decode(done.stdout)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise SensorError(f"who may read {path} could not be looked up: {error}") from None
    if told.error:
        raise SensorError(f"{path}: {told.error}")
    return _fact(path, told, now_ms)


def _program(path: str) -> list[str]:
    return [sys.executable, "-I", str(Path(__file__).with_name("readers.py")), os.fsdecode(path_bytes(path))]


def _fact(path: str, told: _Told, now_ms: int) -> Rights:
    return Rights(
        at_ms=now_ms,
        root=path,
        grants=told.grants,
        files=told.files,
        unread=told.unread,
        setuid=told.setuid,
        unknown=told.unknown,
    )
