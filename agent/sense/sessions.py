"""Who sits at the machine: the active local session, as logind keeps it under /run/systemd (sd-login(3)).

Owns: reading those small files once a second. Must not know what a session is used for. With no seat (a server, a
virtual machine) the one person who is logged in is taken if there is exactly one; else nobody is named. Beside each file lies
logind's pipe for that session (`N.ref`), which is never opened: who reads it waits until the person logs out.
"""

from collections.abc import Iterator
from pathlib import Path

from agent.core.facts import Coverage, Fact, Session

_RUN = Path("/run/systemd")


def parse(text: str) -> dict[str, str]:
    """KEY=VALUE lines as logind writes them; others are passed over."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


class Sessions:
    """A Sensor asked by the clock."""

    def __init__(self, run: Path = _RUN) -> None:
        self._run = run
        self._last: tuple[int | None, str, str] | None = None

    def fileno(self) -> int:
        """None to poll."""
        return -1

    def drain(self, now_ms: int) -> Iterator[Fact]:
        """A Session when somebody else sits there now."""
        now = self._active()
        if now != self._last:
            self._last = now
            yield Session(at_ms=now_ms, uid=now[0], user=now[1], session=now[2])

    def coverage(self, now_ms: int) -> Coverage:
        """Whether logind is there to say."""
        ok = (self._run / "sessions").is_dir()
        why = "" if ok else "systemd-logind does not run here; media are told without a person"
        return Coverage(at_ms=now_ms, sensor="sessions", ok=ok, blind=[] if ok else ["local_session"], why=why)

    def close(self) -> None:
        """Nothing is held."""

    def _active(self) -> tuple[int | None, str, str]:
        seat = self._read("seats/seat0")
        session = seat.get("ACTIVE", "")
        if session:
            said = self._read(f"sessions/{session}")
            return self._person(said, session) if _sits_here(said) else (None, "", "")
        here: dict[int, str] = {}
        try:
            names = [entry.name for entry in (self._run / "sessions").iterdir() if entry.is_file()]
        except OSError:
            return None, "", ""
        for name in names:
            said = self._read(f"sessions/{name}")
            if said.get("ACTIVE") == "1" and _sits_here(said) and said.get("UID", "").isdigit():
                here[int(said["UID"])] = name
        if len(here) != 1:
            return None, "", ""
        ((uid, session),) = here.items()
        return uid, _name(uid), session

    @staticmethod
    def _person(said: dict[str, str], session: str) -> tuple[int | None, str, str]:
        uid = said.get("UID", "")
        return (int(uid), _name(int(uid)), session) if uid.isdigit() else (None, "", "")

    def _read(self, name: str) -> dict[str, str]:
        try:
            return parse((self._run / name).read_text(errors="replace"))
        except OSError:
            return {}


def _sits_here(said: dict[str, str]) -> bool:
    """A person's own session at this machine: not one over ssh, not the login screen, not a background service."""
    return said.get("CLASS") == "user" and said.get("REMOTE") != "1"


def _name(uid: int) -> str:
    """The user's name from the local file only: a name service may block."""
    try:
        with Path("/etc/passwd").open(errors="replace") as file:
            for line in file:
                fields = line.split(":")
                if len(fields) > 2 and fields[2] == str(uid):
                    return fields[0]
    except OSError:
        pass
    return ""
