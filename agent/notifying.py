"""The small process that tells one person one thing, as that person: a program of its own, started by `notify.py`.

Question: did it reach somebody? Owns: becoming that user for good, the desktop's notification service over the session bus,
and the terminals of whoever has no desktop. What answers here belongs to the person (a bus may be slow, hostile or gone), so
nothing of this may happen in the agent: a few seconds, little memory, no privilege, one message in, one short answer out.
Must not know events, or what is said.

In: one JSON object {uid, replaces, urgency, tty, texts: {en: [title, [lines]], ja: …}, run, dev, utmp} and the end of the file.
Out: {told: "desktop", id} or {told: "terminal", count} or {told: "nobody", why}. A terminal is written to only if it belongs to
the user, is one, and takes the text at once; `mesg n` keeps other users out, not word of one's own doings: as with root's wall.
"""

import json
import os
import resource
import signal
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

PATIENCE_S = 5
_BUS_S = 3.0
_TERMINAL_S = 2
_NOBODY = 65534
_MOST_MESSAGE, _MOST_ENVIRON, _MOST_LOOKED, _MOST_TERMINALS = 65_536, 65_536, 400, 16
_LIMITS = {
    resource.RLIMIT_AS: 512 << 20,
    resource.RLIMIT_CPU: PATIENCE_S,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 0,
}
_TTY_MAJORS = {4, *range(136, 144)}
"""Consoles and serial lines, pseudo terminals: the kernel's Documentation/admin-guide/devices.txt"""
_VT_MAJOR, _SERIAL_MINOR = 4, 64
_UTMP = struct.Struct("=hxxi32s4s32s256shhi2i16s20x")
_USER_PROCESS = 7


def main() -> None:
    """One message from stdin, one answer to stdout."""
    signal.alarm(PATIENCE_S)
    for kind, most in _LIMITS.items():
        resource.setrlimit(kind, (most, most))
    asked = json.loads(sys.stdin.buffer.read(_MOST_MESSAGE))
    try:
        import jeepney.io.blocking as bus  # before its files may be out of reach
    except ImportError:
        bus = None
    try:
        become(asked["uid"])
        answer = tell(asked, bus)
    except (OSError, MemoryError, ValueError) as error:
        answer = {"told": "nobody", "why": f"{type(error).__name__}: {error}"[:200]}
    with suppress(OSError):
        os.write(1, json.dumps(answer).encode())


def become(uid: int) -> None:
    """Be that user for good, in no group of anybody's. Raises OSError."""
    if uid == 0:
        return
    if os.getgroups():
        os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getgroups():
        raise PermissionError("the agent's privileges could not be given up")


def tell(asked: dict[str, Any], bus: Any) -> dict[str, Any]:
    """On the desktop, else on the terminals."""
    chosen = language(asked["uid"])
    title, lines = asked["texts"][chosen]
    why = "no library for D-Bus (jeepney)"
    if bus is not None:
        signal.signal(signal.SIGALRM, _enough)  # a bus that says nothing must leave time for the terminal
        signal.setitimer(signal.ITIMER_REAL, _BUS_S)
        told = _on_desktop(asked, title, lines, bus)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_TERMINAL_S)
        if isinstance(told, int):
            return {"told": "desktop", "id": told, "lang": chosen}
        why = told
    count = _on_terminals(asked, chosen)
    if count:
        return {"told": "terminal", "count": count, "why": why, "lang": chosen}
    return {"told": "nobody", "why": why}


def _enough(*_: object) -> None:
    raise TimeoutError


# -- the desktop -----------------------------------------------------------------------------------------------------------


def _on_desktop(asked: dict[str, Any], title: str, lines: list[str], bus: Any) -> int | str:
    """The id of the notification, or why there is none."""
    from jeepney import DBusAddress, new_method_call
    from jeepney.low_level import MessageType

    path = f"{asked['run']}/user/{asked['uid']}/bus"
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 (pathlib costs more than all of this)
            return "no session bus"
    except OSError:
        return "no session bus"
    desktop = DBusAddress("/org/freedesktop/Notifications", "org.freedesktop.Notifications", "org.freedesktop.Notifications")
    try:
        with bus.open_dbus_connection(bus=f"unix:path={path}", auth_timeout=_BUS_S) as connection:
            can = connection.send_and_get_reply(new_method_call(desktop, "GetCapabilities"), timeout=_BUS_S)
            if can.header.message_type != MessageType.method_return:
                return f"no notification service ({_error(can)})"
            markup = not isinstance(can.body[0], list) or "body-markup" in can.body[0]
            body = "\n".join(escape(line) if markup else line for line in lines)
            hints = {"urgency": ("y", asked["urgency"]), "category": ("s", "device")}
            values: tuple[Any, ...] = ("Sekisho", asked["replaces"], "dialog-warning", title, body, [], hints, -1)
            reply = connection.send_and_get_reply(new_method_call(desktop, "Notify", "susssasa{sv}i", values), timeout=_BUS_S)
            if reply.header.message_type != MessageType.method_return:
                return f"not shown ({_error(reply)})"
            shown = reply.body[0]
            return shown if isinstance(shown, int) and 0 <= shown < 1 << 32 else "an answer that is none"
    except Exception as error:  # whatever a hostile bus makes of the library: it must not keep us from the terminal
        return f"the session bus does not answer ({type(error).__name__})"


def escape(text: str) -> str:
    """Text for a body with markup: Desktop Notifications Specification, "Markup"."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;").replace("'", "&#39;")


def _error(reply: Any) -> str:
    from jeepney.low_level import HeaderFields

    return str(reply.header.fields.get(HeaderFields.error_name, ""))[:80]


# -- terminals -------------------------------------------------------------------------------------------------------------


def _on_terminals(asked: dict[str, Any], chosen: str) -> int:
    """How many terminals of the user took the text."""
    names = [asked["tty"], *_sessions(asked["run"], asked["uid"]), *_logged_in(asked["utmp"])]
    names += [] if any(names) else _in_use(asked["uid"])
    count = 0
    for name in list(dict.fromkeys(name for name in names if name))[:_MOST_TERMINALS]:
        if ".." not in name and not name.startswith("/"):
            count += _write(f"{asked['dev']}/{name}", asked, chosen)
    return count


def _write(path: str, asked: dict[str, Any], chosen: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        seen = os.fstat(fd)
        major, minor = os.major(seen.st_rdev), os.minor(seen.st_rdev)
        if not stat.S_ISCHR(seen.st_mode) or seen.st_uid != os.geteuid() or major not in _TTY_MAJORS:
            return False
        plain = major == _VT_MAJOR and minor < _SERIAL_MINOR  # a text console has no Japanese letters
        title, lines = asked["texts"]["en" if plain else chosen]
        text = "\r\n\a" + "".join(f"{line}\r\n" for line in (f"Sekisho: {title}", *lines)) + "\r\n"
        data = text.encode("utf-8", "replace")
        return os.write(fd, data) == len(data)
    except OSError:  # stopped by ^S, or hung up
        return False
    finally:
        os.close(fd)


def _sessions(run: str, uid: int) -> Iterator[str]:
    """Terminals of the user's sessions, as logind keeps them (sd-login(3))."""
    folder = f"{run}/systemd/sessions"
    try:
        names = [name for name in os.listdir(folder) if not name.endswith(".ref")]  # noqa: PTH208
    except OSError:
        return
    for name in names[:_MOST_LOOKED]:
        said = dict(line.split("=", 1) for line in _read(f"{folder}/{name}", 8192).splitlines() if "=" in line)
        if said.get("UID") == str(uid) and said.get("TTY"):
            yield said["TTY"]


def _logged_in(path: str) -> Iterator[str]:
    """Terminals by utmp(5); whose they are is seen when they are opened."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read(_UTMP.size * _MOST_LOOKED)
    except OSError:
        return
    for at in range(0, len(data) - _UTMP.size + 1, _UTMP.size):
        kind, _, line, *_ = _UTMP.unpack_from(data, at)
        if kind == _USER_PROCESS:
            yield line.split(b"\0", 1)[0].decode("ascii", "ignore")


def _in_use(uid: int) -> Iterator[str]:
    """Terminals of the user's own programs, for where neither logind nor utmp knows of any: tty_nr of proc(5)."""
    for name in _own_processes(uid):
        fields = _read(f"/proc/{name}/stat", 4096).rpartition(")")[2].split()
        number = int(fields[4]) if len(fields) > 4 else 0
        major, minor = os.major(number), os.minor(number)
        if major in range(136, 144):
            yield f"pts/{(major - 136) * 256 + minor}"
        elif major == _VT_MAJOR:
            yield f"tty{minor}" if minor < _SERIAL_MINOR else f"ttyS{minor - _SERIAL_MINOR}"


# -- the person's language -------------------------------------------------------------------------------------------------


def language(uid: int) -> str:
    """ "ja" or "en": as the environment of the user's own programs has it, of one with a display first; else the machine's."""
    best = ""
    for environ in _environs(uid):
        if locale := _locale(environ):
            if "DISPLAY" in environ or "WAYLAND_DISPLAY" in environ:
                return _spoken(locale)
            best = best or locale
    for path in () if best else ("/etc/locale.conf", "/etc/default/locale"):
        lines = _read(path, 4096).splitlines()
        best = best or _locale({key: value.strip("\"'") for key, _, value in (line.partition("=") for line in lines)})
    return _spoken(best)


def _environs(uid: int) -> Iterator[dict[str, str]]:
    for name in _own_processes(uid):
        pairs = (pair.partition("=") for pair in _read(f"/proc/{name}/environ", _MOST_ENVIRON).split("\0"))
        yield {key: value for key, _, value in pairs}


def _own_processes(uid: int) -> Iterator[str]:
    """The user's processes, the youngest first."""
    looked = 0
    for name in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int, reverse=True):  # noqa: PTH208
        try:
            if os.stat(f"/proc/{name}").st_uid != uid:  # noqa: PTH116
                continue
        except OSError:
            continue
        looked += 1
        if looked > _MOST_LOOKED:
            return
        yield name


def _locale(environ: dict[str, str]) -> str:
    """locale(7): LANGUAGE and LC_ALL before LC_MESSAGES before LANG."""
    return next((environ[name] for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), "")


def _spoken(locale: str) -> str:
    return "ja" if locale.lower().split(":")[0].startswith("ja") else "en"


def _read(path: str, most: int) -> str:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""
