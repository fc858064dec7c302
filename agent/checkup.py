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

from msgspec import Struct, field

from agent.config import Agent, Config
from agent.contract.columns import size_text
from agent.contract.show import display_width, harmless, pad
from agent.contract.words import DISGUISED
from agent.words import SUBJECTS, WORDS, Language, say

_OLD_REGISTER_DAYS = 7
"""From then on `check` says that revocations did not arrive for long."""
Verdict = Literal["ok", "blind", "error"]
_OLDEST_KERNEL = (5, 17)
_NETWORK_FS = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "afs"}


class NotRunning(Exception):
    """No agent answers; str() is one sentence."""


class Result(Struct):
    """One line of `check`. `verdict`: an error stops the agent or its purpose, `blind` is something it won't see.

    `key` and `values` name the sentence in `words`; `fix` the key of what to do about it, empty if nothing can be done.
    """

    verdict: Verdict
    subject: str
    key: str
    values: dict[str, Any] = field(default_factory=dict)
    fix: str = ""

    def says(self, lang: Language) -> str:
        """What was found. Of what a sensor does not see the codes have words; its own sentence, if any, says why."""
        if "blind" in self.values:
            lacks, why = _list(self.values["blind"], lang), self.values["why"]
            return f"{lacks} ({why})" if lacks and why else lacks or why
        return say(lang, self.key, **self.values)

    def about(self, lang: Language) -> str:
        """What it is about."""
        if lang == "en" or self.subject in SUBJECTS:
            return self.subject if lang == "en" else SUBJECTS[self.subject]
        kind, _, name = self.subject.partition(" ")
        return f"{SUBJECTS[kind]} {name}"

    def advice(self, lang: Language) -> str:
        """What to do; empty if nothing."""
        return say(lang, self.fix, **self.values) if self.fix else ""

    def as_dict(self) -> dict[str, str]:
        """For `--json`, in English."""
        said = {"verdict": self.verdict, "subject": self.subject, "code": self.key, "says": self.says("en")}
        return {**said, "fix": self.advice("en")} if self.fix else said


def _list(codes: list[str], lang: Language) -> str:
    return (", " if lang == "en" else "、").join(say(lang, code) for code in codes)


def _found(verdict: Verdict, subject: str, key: str, **values: Any) -> Result:
    """A result whose advice, if there is one, stands in `words` under `key`.fix."""
    return Result(verdict, subject, key, values, f"{key}.fix" if f"{key}.fix" in WORDS else "")


def check(config: Config) -> list[Result]:
    """All that can be known before the agent runs, worst last."""
    agent = config.agent
    found = [*_kernel(), *_state(agent), *_protected(agent), *_media(agent), *_sensors(agent)]
    found += [*_ways_off(agent), *_collector(agent), *_register(agent), *_mode(agent), *_limits(agent)]
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


def lines(status: dict[str, Any], lang: Language, paint: Callable[[str, str], str]) -> Iterator[str]:
    """A running agent's status for people."""
    health = paint(say(lang, "healthy"), "32") if status["healthy"] else paint(say(lang, "degraded"), "33")
    memory = status["memory_kib"] // 1024
    name = harmless(status["name"])
    yield say(lang, "status.head", **{**status, "name": name, "health": health, "memory": memory})
    rows: list[tuple[str, str]] = []
    for tree in status["protected"]:
        lack = "" if tree["watched"] else "  " + paint(say(lang, "status.waiting"), "33")
        rows.append(("protected", harmless(tree["path"]) + lack))
    for sensor in status["sensors"]:
        blind = _list(sensor["blind"], lang)
        state = paint(say(lang, "ok"), "32") if sensor["ok"] else paint(harmless(sensor["why"]) or say(lang, "blind"), "33")
        rows.append(("sensor", f"{harmless(sensor['name'])}: {state}" + (f"; {say(lang, 'blind')}: {blind}" if blind else "")))
    for each in status["media"]:
        stopped = _list([each["decision"], *(f"stopped.{code}" for code in each.get("stopped", []))], lang)
        rows.append(("medium", f"{harmless(each['name'])} {harmless(each['serial'])}: {stopped}"))
    spool, queue = status["spool"], status["queue"]
    kept = say(lang, "status.spool_says", events=spool["events"], kib=spool["bytes"] // 1024, waiting=queue["waiting"])
    rows.append(("spool", kept + (f"; {harmless(queue['error'])}" if queue["error"] else "")))
    sending = {**status["collector"], "url": harmless(status["collector"]["url"])}
    receipt = sending["last_receipt"]
    if not sending["url"]:
        sent = say(lang, "status.no_collector")
    elif receipt:
        sent = say(lang, "status.receipt", **sending, seq=receipt["seq"], at=_clock(receipt["at_ms"]))
    else:
        sent = say(lang, "status.no_receipt", **sending)
    rows.append(("collector", sent + (f"; {harmless(sending['last_error'])}" if sending["last_error"] else "")))
    if (held := sending.get("register", {})).get("confirmed"):
        rows.append(("register", say(lang, "status.register_says", **held, at=_clock(held["confirmed"]))))
    if told := status.get("notices"):
        why = f"; {harmless(told['last_why'])}" if told["last_why"] else ""
        rows.append(("notices", say(lang, "status.notices_say", **told) + why))
    headings = {key: say(lang, f"status.{key}") for key, _ in rows}
    width = max(map(display_width, headings.values()))
    yield from (f"  {pad(headings[key], width)}  {text}" for key, text in rows)


def media_table(media: list[dict[str, Any]], lang: Language) -> Iterator[str]:
    """The rows of `sekisho-agent media`, in columns."""
    columns = ("medium", "serial", "kind", "mount", "decision", "reason", "stopped")
    rows = [tuple(say(lang, f"col.{column}") for column in columns)]
    for each in media:
        decision = say(lang, each["decision"])
        stopped = _list([f"stopped.{code}" for code in each.get("stopped", [])], lang)
        cells = (each["name"], each["serial"], each["kind"], each["mount"], decision, each["reason"], stopped)
        rows.append(tuple(harmless(cell or "-") for cell in cells))
    widths = [max(display_width(row[at]) for row in rows) for at in range(len(columns))]
    for row in rows:
        yield "  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip()


def media_stories(media: list[dict[str, Any]], lang: Language) -> Iterator[str]:
    """What is known of each device beside its row in the table: one heading and a line for each thing."""
    for each in {(row["key"], row.get("story")): row for row in media if row.get("story")}.values():
        lines = list(_story(each, lang))
        width = max(display_width(say(lang, f"story.{key}")) for key, _ in lines)
        yield ""
        yield harmless(f"{each['name']} {each['serial']}".strip())
        for key, text in lines:
            yield f"  {pad(say(lang, f'story.{key}'), width)}  {harmless(text, 400)}"


def _story(row: dict[str, Any], lang: Language) -> Iterator[tuple[str, str]]:
    by = ", ".join(say(lang, f"by.{each}") for each in row.get("identity_by", []))
    yield "identity", say(lang, f"identity.{row['identity']}") + (f" ({by})" if by else "")
    came = say(lang, f"since.{row['since']}") if row.get("since") else ""
    yield "since", " ".join(filter(None, (_clock(row["since_ms"]), came)))
    if row.get("port"):
        yield "port", " ← ".join([row["port"], *row.get("hubs", [])])
    if row.get("interfaces"):
        yield "interfaces", " ".join([*row["interfaces"], *(f"[{mode}]" for mode in row.get("modes", []))])
    for block in row.get("blocks", []):
        size = size_text(block["size"]) if "size" in block else ""
        texts = (block["name"], block.get("kind", ""), size, *(block.get(name, "") for name in ("fs", "fs_uuid", "label")))
        yield "block", " ".join(filter(None, texts)) + (f" → {block['on']}" if block.get("on") else "")
    if row.get("networks"):
        yield "network", " ".join(row["networks"])
    if "bytes_in" in row:
        yield "amounts", say(lang, "story.moved", read=size_text(row["bytes_in"]), written=size_text(row["bytes_out"]))
    if row.get("disguised"):
        yield "disguised", "; ".join(DISGUISED[each][lang == "ja"] for each in row["disguised"])


def _clock(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_ms / 1000))


def _kernel() -> Iterator[Result]:
    release = platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < _OLDEST_KERNEL:
        yield _found("error", "kernel", "kernel_old", release=release)
    else:
        yield _found("ok", "kernel", "kernel", release=release)


def _state(agent: Agent) -> Iterator[Result]:
    path = Path(agent.state_dir)
    try:
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    except PermissionError:
        yield _found("error", "state_dir", "state_unwritable", path=path)
        return
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield _found("error", "state_dir", "state_unwritable", path=path)
        return
    space = os.statvfs(nearest)
    free = space.f_bavail * space.f_frsize
    if free < agent.spool.max_bytes:
        wanted = agent.spool.max_bytes >> 20
        yield _found("blind", "state_dir", "state_small", path=nearest, free=free >> 20, wanted=wanted)
    else:
        yield _found("ok", "state_dir", "state", path=path, free=free >> 20)
    if path.exists() and path.stat().st_mode & 0o077:
        yield _found("error", "state_dir", "state_open", path=path, mode=f"{path.stat().st_mode & 0o777:o}")


def _protected(agent: Agent) -> Iterator[Result]:
    from agent.sense.mounts import parse

    if not agent.protect:
        yield _found("error", "protect", "protect_none")
    try:
        table = parse(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        table = []
    for each in agent.protect:
        path = os.path.realpath(each.path)
        raw = os.fsencode(path)
        over = [mount for mount in table if raw == mount.mount or raw.startswith(mount.mount.rstrip(b"/") + b"/")]
        on = max(over, key=lambda mount: len(mount.mount), default=None)
        yield _judge_tree(f"protect {each.label}", path, on.fs if on else "?")


def _judge_tree(subject: str, path: str, fs: str) -> Result:
    try:
        with os.scandir(path):
            pass
    except PermissionError:
        return _found("error", subject, "protect_unreadable", path=path)
    except OSError:
        return _found("error", subject, "protect_missing", path=path)
    if fs == "autofs":
        return _found("blind", subject, "protect_autofs", path=path)
    if fs in _NETWORK_FS:
        return _found("blind", subject, "protect_network", path=path, fs=fs)
    if fs.startswith("fuse"):
        return _found("blind", subject, "protect_fuse", path=path, fs=fs)
    return _found("ok", subject, "protect", path=path, fs=fs)


def _media(agent: Agent) -> Iterator[Result]:
    if not agent.media.simulated_dir:
        return
    root = os.path.realpath(agent.media.simulated_dir)
    if not Path(root).is_dir():
        yield _found("error", "simulated_dir", "simulated_missing", path=root)
        return
    yield _found("ok", "simulated_dir", "simulated", path=root)
    for each in agent.protect:
        if root.startswith(os.path.realpath(each.path) + "/"):
            yield _found("error", "simulated_dir", "simulated_inside", path=root, tree=each.path)


def _sensors(agent: Agent) -> Iterator[Result]:
    from agent.sense import Sensor, SensorError
    from agent.sense.fanotify import Fanotify
    from agent.sense.holder import Holder
    from agent.sense.processes import Processes
    from agent.sense.sessions import Sessions
    from agent.sense.sockets import Sockets
    from agent.sense.udev import Udev
    from agent.sense.usbfs import Usbfs

    now_ms = time.time_ns() // 1_000_000
    trials: list[tuple[str, Callable[[], Sensor], str]] = [
        ("files", Fanotify, "files.fix"),
        ("writers", Holder.trial, "files.fix"),
        ("processes", lambda: Processes(now_ms), "files.fix"),
        ("devices", Udev, "devices.fix"),
        ("phones", Usbfs, "files.fix"),
        ("sessions", Sessions, "sessions.fix"),
    ]
    if agent.ways.network == "watch":
        trials.append(("uploads", lambda: Sockets(now_ms), "files.fix"))
    yield from _staging(agent)
    for subject, make, fix in trials:
        try:
            sensor = make()
        except (SensorError, OSError) as error:
            yield Result("blind", subject, "sensor_refused", {"why": str(error)}, fix)
            continue
        said = sensor.coverage(now_ms)
        sensor.close()
        if said.ok and not said.blind:
            yield _found("ok", subject, "sensor", sensor=said.sensor)
        else:
            yield Result("blind", subject, "sensor_part", {"blind": said.blind, "why": said.why}, fix if said.why else "")
    try:
        login = Path("/proc/self/loginuid").read_text().strip()
    except OSError:
        yield _found("blind", "login user", "login_absent")
        return
    unset = login == "4294967295" and not _sets_loginuid()
    yield _found("blind", "login user", "login_unset") if unset else _found("ok", "login user", "login")


def _staging(agent: Agent) -> Iterator[Result]:
    """Copies made elsewhere: on which of the file systems mounted now their making can't be watched."""
    from agent.sense import SensorError
    from agent.sense.arming import Arming
    from agent.sense.fanotify import Fanotify
    from agent.sense.mounts import Mounts

    if not agent.staging.watch:
        yield _found("blind", "copies elsewhere", "staging_off")
        return
    try:
        files = Fanotify()
    except (SensorError, OSError) as error:
        yield Result("blind", "copies elsewhere", "sensor_refused", {"why": str(error)}, "files.fix")
        return
    mounts, arming = Mounts(), Arming(files.marks, files.paths, None, lambda _: 0, [])
    list(mounts.drain(0))  # its first look
    arming.watch(mounts.local([]))
    said = arming.coverage(0)
    for sensor in (arming, mounts, files):
        sensor.close()
    if said.blind:
        where = said.why.partition("; ")[2]  # before it: how many are watched, and how it was done for this trial
        yield Result("blind", "copies elsewhere", "sensor_part", {"blind": said.blind, "why": where})
    else:
        yield _found("ok", "copies elsewhere", "staging_hold" if agent.staging.hold else "staging_standing")


def _ways_off(agent: Agent) -> Iterator[Result]:
    for way in ("network", "print", "bluetooth"):
        if getattr(agent.ways, way) == "off":
            yield _found("blind", f"way {way}", "way_off", way=way)


def _sets_loginuid() -> bool:
    """Whether any PAM service asks for pam_loginuid."""
    for file in Path("/etc/pam.d").glob("*"):
        try:
            if "pam_loginuid.so" in file.read_text(errors="replace"):
                return True
        except OSError:
            continue
    return False


def _register(agent: Agent) -> Iterator[Result]:
    """How old the register of media is that this machine would decide by: when the collector last confirmed it."""
    try:
        confirmed_s = Path(agent.state_dir, "register.json").stat().st_mtime
    except OSError:
        return  # none came yet, or the directory is said to be unreadable already
    age_s = max(time.time() - confirmed_s, 0)
    days = int(age_s // 86_400)
    verdict: Verdict = "ok" if days < _OLD_REGISTER_DAYS else "blind"
    yield _found(verdict, "register", "register_old" if days else "register", days=days)


def _collector(agent: Agent) -> Iterator[Result]:
    link = agent.collector
    if not link.url:
        yield _found("blind", "collector", "collector_none")
        return
    if link.ca_file and not Path(link.ca_file).is_file():
        yield _found("error", "collector", "collector_ca", path=link.ca_file)
        return
    if link.token_file and not link.token and not os.access(link.token_file, os.R_OK):
        yield _found("blind", "collector", "collector_token", path=link.token_file)
    parts = urlsplit(link.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=5) as peer:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=link.ca_file or None)
                context.wrap_socket(peer, server_hostname=parts.hostname).close()
    except ssl.SSLError as error:
        yield _found("error", "collector", "collector_refused", url=link.url, why=error.reason)
    except OSError as error:
        yield _found("blind", "collector", "collector_away", url=link.url, why=error.strerror or error)
    else:
        yield _found("ok", "collector", "collector", url=link.url)


def _mode(agent: Agent) -> Iterator[Result]:
    """What the mode does on this machine. An error is said where nothing could be stopped that should be."""
    if agent.mode != "enforce":
        yield _found("ok", "mode", "mode", mode=agent.mode)
        return
    from agent.act import usbports

    said = agent.enforce
    yield _found("ok", "mode", "mode_enforce", unapproved=said.unapproved, unknown=said.unknown, on_failure=said.on_failure)
    if not agent.media.require_approval:
        yield _found("error", "mode", "enforce_no_approval")
    if said.directories == "refuse" and not (agent.staging.watch and agent.staging.hold):
        yield _found("blind", "mode", "enforce_directories")
    if usbports.usbguard_runs():
        yield _found("blind", "mode", "enforce_usbguard")


def _limits(agent: Agent) -> Iterator[Result]:
    if not agent.limit:
        yield _found("blind", "limit", "limit_none")
