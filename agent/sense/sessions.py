"""Who sits at the machine: the active local session, as logind keeps it under /run/systemd (sd-login(3)).

Owns: reading those small files once a second. Must not know what a session is used for. With no seat (a server, a
virtual machine) the one person who is logged in is taken if there is exactly one; else nobody is named.
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
        session, uid = seat.get("ACTIVE", seat.get("ACTIVE_SESSION", "")), seat.get("ACTIVE_UID", "")
        if uid.isdigit():
            return int(uid), _name(int(uid)), session
        people: dict[int, str] = {}
        try:
            names = [entry.name for entry in (self._run / "sessions").iterdir()]
        except OSError:
            return None, "", ""
        for name in names:
            said = self._read(f"sessions/{name}")
            if said.get("CLASS") == "user" and said.get("ACTIVE") == "1" and said.get("UID", "").isdigit():
                people[int(said["UID"])] = name
        if len(people) != 1:
            return None, "", ""
        ((only, session),) = people.items()
        return only, _name(only), session

    def _read(self, name: str) -> dict[str, str]:
        try:
            return parse((self._run / name).read_text(errors="replace"))
        except OSError:
            return {}


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
