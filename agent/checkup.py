"""check and status: what is seen on this machine and what is not, and how to mend it. Reads, never acts.

Owns: the questions that `sekisho-agent check` asks of a configuration and a machine, and the words for a running agent's
status. `check` opens the same sensors as the daemon and asks them; it guesses nothing that a sensor can try.
"""

import json
import os
import platform
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import asdict

from agent.config import Agent, Config

Verdict = Literal["ok", "blind", "error"]
_OLDEST_KERNEL = (5, 17)
_NETWORK_FS = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "afs"}


class NotRunning(Exception):
    """No agent answers; str() is one sentence."""


class Result(Struct):
    """One line of `check`: an error stops the agent or its purpose, `blind` is something it won't see."""

    verdict: Verdict
    subject: str
    says: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def check(config: Config) -> list[Result]:
    """All that can be known before the agent runs, worst last."""
    agent = config.agent
    found = [*_kernel(), *_state(agent), *_protected(agent), *_media(agent), *_sensors(), *_collector(agent), *_limits(agent)]
    return sorted(found, key=lambda result: ("ok", "blind", "error").index(result.verdict))


def ask(state_dir: str) -> dict[str, Any]:
    """The running agent's status. Raises NotRunning."""
    chunks = []
    try:
        folder = os.open(state_dir, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise NotRunning(f"{state_dir}: {error.strerror}; is the agent installed, and are you root?") from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(10)
            peer.connect(f"/proc/self/fd/{folder}/agent.sock")
            while chunk := peer.recv(65536):
                chunks.append(chunk)
        status: dict[str, Any] = json.loads(b"".join(chunks))
    except PermissionError:
        raise NotRunning(f"{state_dir}/agent.sock may not be read; try with sudo") from None
    except (OSError, ValueError):
        raise NotRunning("the agent does not run; start it with `systemctl start sekisho-agent`") from None
    finally:
        os.close(folder)
    return status


def lines(status: dict[str, Any], paint: Callable[[str, str], str]) -> Iterator[str]:
    """A running agent's status for people."""
    word = paint("healthy", "32") if status["healthy"] else paint("degraded", "33")
    yield f"sekisho-agent {status['version']} on {status['name']}: {word} (pid {status['pid']}, {status['memory_kib'] // 1024} MiB)"
    for tree in status["protected"]:
        yield f"  protected  {tree['path']}" + ("" if tree["watched"] else paint("  not there yet", "33"))
    for sensor in status["sensors"]:
        state = (
            paint("ok", "32") if sensor["ok"] and not sensor["blind"] else paint("blind: " + ", ".join(sensor["blind"]), "33")
        )
        yield f"  sensor     {sensor['name']}: {state}" + (f" ({sensor['why']})" if sensor["why"] else "")
    for medium in status["media"]:
        yield f"  medium     {medium['name']} {medium['serial']}: {medium['decision']}"
    spool = status["spool"]
    yield f"  spool      {spool['events']} events, {spool['bytes'] // 1024} KiB, {status['queue']['waiting']} waiting" + (
        f"; {status['queue']['error']}" if status["queue"]["error"] else ""
    )
    sending = status["collector"]
    if not sending["url"]:
        yield "  collector  none configured: events stay on this machine"
        return
    receipt = sending["last_receipt"]
    last = f"receipt for event {receipt['seq']} at {_clock(receipt['at_ms'])}" if receipt else "no receipt yet"
    yield f"  collector  {sending['url']}: {last}, {sending['backlog']} to send" + (
        f"; {sending['last_error']}" if sending["last_error"] else ""
    )


def medium_row(medium: dict[str, Any]) -> tuple[str, ...]:
    """One row of `sekisho-agent media`."""
    return (
        medium["name"],
        medium["serial"] or "-",
        medium["kind"],
        medium["mount"] or "-",
        medium["decision"],
        medium["reason"],
    )


def _clock(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def _kernel() -> Iterator[Result]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < _OLDEST_KERNEL:
        yield Result("error", "kernel", f"Linux {platform.release()} is too old", "use Linux 5.17 or later")
    else:
        yield Result("ok", "kernel", f"Linux {platform.release()}")


def _state(agent: Agent) -> Iterator[Result]:
    path = Path(agent.state_dir)
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Result("error", "state_dir", f"{path} can't be written", "run as root, or choose another agent.state_dir")
        return
    space = os.statvfs(nearest)
    free = space.f_bavail * space.f_frsize
    if free < agent.spool.max_bytes:
        fix = "free some space, or lower agent.spool.max_bytes"
        yield Result(
            "blind", "state_dir", f"{nearest} has {free >> 20} MiB left, the spool may take {agent.spool.max_bytes >> 20}", fix
        )
    else:
        yield Result("ok", "state_dir", f"{path}, {free >> 20} MiB free")
    if path.exists() and path.stat().st_mode & 0o077:
        yield Result(
            "error", "state_dir", f"{path} is open to others (mode {path.stat().st_mode & 0o777:o})", f"chmod 700 {path}"
        )


def _protected(agent: Agent) -> Iterator[Result]:
    from agent.sense.mounts import parse

    if not agent.protect:
        fix = "add [[agent.protect]] with a path and a label"
        yield Result("error", "protect", "no directory is protected, so no copy can be told", fix)
    try:
        table = parse(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        table = []
    for each in agent.protect:
        path = os.path.realpath(each.path)
        subject = f"protect {each.label}"
        on = max(
            (m for m in table if path == m.mount or path.startswith(m.mount.rstrip("/") + "/")),
            key=lambda m: len(m.mount),
            default=None,
        )
        kind = on.fs if on else "unknown"
        try:
            is_dir = Path(path).is_dir()
            os.listdir(path)
        except PermissionError:
            yield Result("error", subject, f"{path} may not be read", "run as root; a user's FUSE mount needs -o allow_root")
            continue
        except OSError:
            is_dir = False
        if not is_dir:
            says = f"{path} is not there; the agent waits for it (encrypted home, automount, network share)"
            yield Result("error", subject, says, "make it, mount it, or mend the path")
        elif kind == "autofs":
            yield Result("blind", subject, f"{path} is an automount point; it is watched once it is mounted", "")
        elif kind in _NETWORK_FS:
            says = f"{path} is on {kind}: what this machine does there is seen, what other clients or the server do is not"
            yield Result("blind", subject, says, "run an agent on the file server, too")
        elif kind.startswith("fuse"):
            says = f"{path} is on {kind}: reads are seen by name at best, and the daemon behind it reads for others"
            yield Result("blind", subject, says, "protect the directory below it")
        else:
            yield Result("ok", subject, f"{path} on {kind}")


def _media(agent: Agent) -> Iterator[Result]:
    if not agent.media.simulated_dir:
        return
    root = Path(agent.media.simulated_dir)
    if not root.is_dir():
        yield Result("error", "simulated_dir", f"{root} is not there", f"mkdir -p {root}, or clear agent.media.simulated_dir")
        return
    yield Result("ok", "simulated_dir", str(root))
    for each in agent.protect:
        if os.path.realpath(root).startswith(os.path.realpath(each.path) + "/"):
            yield Result("error", "simulated_dir", f"{root} lies in the protected {each.path}", "put it elsewhere")


def _sensors() -> Iterator[Result]:
    from agent.sense import Sensor, SensorError
    from agent.sense.fanotify import Fanotify
    from agent.sense.holder import Holder
    from agent.sense.processes import Processes
    from agent.sense.sessions import Sessions
    from agent.sense.udev import Udev

    now_ms = time.time_ns() // 1_000_000
    unprivileged = "run as root (the unit in packaging/ has just what is needed)"
    trials: list[tuple[str, Callable[[], Sensor], str]] = [
        ("files", Fanotify, unprivileged),
        ("short-lived writers", Holder, unprivileged),
        ("processes", lambda: Processes(now_ms), unprivileged),
        ("devices", Udev, "install and start systemd-udevd"),
        ("sessions", Sessions, "install systemd-logind (libpam-systemd)"),
    ]
    for subject, make, fix in trials:
        try:
            sensor = make()
        except (SensorError, OSError) as error:
            yield Result("blind", subject, f"can't be watched here ({error})", fix)
            continue
        said = sensor.coverage(now_ms)
        sensor.close()
        if said.ok and not said.blind:
            yield Result("ok", subject, f"seen by {said.sensor}")
        else:
            yield Result("blind", subject, said.why or ", ".join(said.blind), fix)
    try:
        set_login = Path("/proc/self/loginuid").read_text().strip()
    except OSError:
        yield Result(
            "blind", "login user", "this kernel keeps no login uid (CONFIG_AUDIT)", "boot a kernel with audit compiled in"
        )
        return
    if set_login == "4294967295" and not _sets_loginuid():
        fix = "add `session required pam_loginuid.so` to the login services in /etc/pam.d"
        yield Result(
            "blind", "login user", "no login service here sets the login uid, so people can't be named through sudo", fix
        )
    else:
        yield Result("ok", "login user", "the kernel's login uid names the person")


def _sets_loginuid() -> bool:
    """Whether any PAM service asks for pam_loginuid."""
    for file in Path("/etc/pam.d").glob("*"):
        try:
            if "pam_loginuid.so" in file.read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


def _collector(agent: Agent) -> Iterator[Result]:
    link = agent.collector
    if not link.url:
        yield Result("blind", "collector", "none is configured: events stay on this machine only", "set agent.collector.url")
        return
    if link.ca_file and not Path(link.ca_file).is_file():
        yield Result("error", "collector", f"ca_file {link.ca_file} is not there", "copy the collector's CA certificate to it")
        return
    if link.token_file and not link.token and not os.access(link.token_file, os.R_OK):
        yield Result("blind", "collector", f"token_file {link.token_file} can't be read", "it is needed once, to enrol")
    parts = urlsplit(link.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=5) as peer:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=link.ca_file or None)
                context.wrap_socket(peer, server_hostname=parts.hostname).close()
    except ssl.SSLError as error:
        yield Result(
            "error", "collector", f"{link.url}: its certificate is refused ({error.reason})", "set agent.collector.ca_file"
        )
    except OSError as error:
        says = f"{link.url} can't be reached ({error.strerror or error}); events wait in the spool"
        yield Result("blind", "collector", says, "start the collector, or mend the address or the firewall")
    else:
        yield Result("ok", "collector", link.url)


def _limits(agent: Agent) -> Iterator[Result]:
    if not agent.limit:
        yield Result("blind", "limit", "no limit is set: no burst or drip is found", "remove `limit = []` for the defaults")
