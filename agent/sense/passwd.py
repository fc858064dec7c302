"""Names of users, without ever waiting for a name service.

Owns: /etc/passwd, read again when it changed, and a background thread that asks nsswitch(5) (LDAP, SSSD) for the others:
until it has answered, and when nobody knows, a name is empty. Must not know what a name is used for.
"""

import os
import pwd
import queue
import threading
import time
from pathlib import Path

_ASK_AGAIN_S = 300.0
_LOOK_AGAIN_S = 1.0
_ASKED_MAX = 10_000


def parse(raw: bytes) -> dict[int, str]:
    """uid → name from passwd(5) lines; the first line of a uid counts, others are passed over."""
    names: dict[int, str] = {}
    for line in raw.split(b"\n"):
        fields = line.split(b":")
        if len(fields) > 2 and fields[0] and fields[2].isdigit():
            names.setdefault(int(fields[2]), fields[0].decode("utf-8", "backslashreplace"))
    return names


class Passwd:
    """`name(uid)` answers at once."""

    def __init__(self, path: str = "/etc/passwd") -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int] | None = None
        self._looked = -_LOOK_AGAIN_S
        self._local: dict[int, str] = {}
        self._asked: dict[int, tuple[float, str]] = {}
        self._questions: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def name(self, uid: int | None) -> str:
        """The user's name, empty if it is not known (yet)."""
        if uid is None:
            return ""
        now = time.monotonic()
        if now - self._looked >= _LOOK_AGAIN_S:
            self._looked = now
            self._look()
        if uid in self._local:
            return self._local[uid]
        asked_at, name = self._asked.get(uid, (-_ASK_AGAIN_S, ""))
        if now - asked_at >= _ASK_AGAIN_S:
            if len(self._asked) >= _ASKED_MAX:
                self._asked.clear()
            self._asked[uid] = now, name
            self._questions.put(uid)
            if self._thread is None:
                self._thread = threading.Thread(target=self._ask, name="names", daemon=True)
                self._thread.start()
        return name

    def close(self) -> None:
        """Let the thread end, as soon as the name service has answered what was asked."""
        if self._thread is not None:
            self._questions.put(None)

    def _look(self) -> None:
        try:
            found = os.stat(self._path)  # noqa: PTH116 (once a second, in the reading thread)
            stamp = found.st_mtime_ns, found.st_ino
            if stamp != self._stamp:
                self._local, self._stamp = parse(self._path.read_bytes()), stamp
        except OSError:
            return  # being replaced: what we know still holds

    def _ask(self) -> None:
        while (uid := self._questions.get()) is not None:
            try:
                name = pwd.getpwuid(uid).pw_name
            except (KeyError, OSError, OverflowError):
                name = ""
            self._asked[uid] = time.monotonic(), name
