# ruff: noqa: PTH123
# (small files of the machine's own, read as they are)
"""On whose behalf a process runs, by its control group: login session, systemd unit, container and the image of that.

Owns: parsing /proc/PID/cgroup (cgroups(7)) as systemd, Docker, Podman, CRI-O, containerd, LXC and systemd-nspawn name their
groups, and asking the runtimes' own state files for the image. Must not know processes otherwise. A name is what the runtime
wrote: root in a container can't change it. Images of rootless containers and of containerd are not looked up.
"""

import json
import re
from typing import Any, NamedTuple

from agent.contract.event import path_text

_SESSION = re.compile(rb"/session-([^/]+)\.scope")
_ID = re.compile(rb"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?(?:/|$)")
_NAMED = re.compile(rb"/(?:lxc\.payload\.|machine-|systemd-nspawn@)([^/]+?)(?:\.scope|\.service)?(?:/|$)")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_UNIT = re.compile(rb"/([^/]+\.(?:service|scope))(?=/|$)")
_DOCKER = "/var/lib/docker/containers/{}/config.v2.json"
_PODMAN = "/var/lib/containers/storage/overlay-containers/containers.json"
_MOST_BYTES, _MOST_KNOWN = 4 << 20, 256


class Group(NamedTuple):
    """`session` is logind's; `unit` the innermost service or scope of systemd that is neither that nor the container's;
    `container` an id or a machine's name."""

    session: str = ""
    unit: str = ""
    container: str = ""


def parse(raw: bytes) -> Group:
    """What the control group of a process tells; of version 1 the line of systemd's own hierarchy counts, or any."""
    lines = [line.split(b":", 2)[2] for line in raw.splitlines() if line.count(b":") >= 2]
    path = b"\n".join(lines)
    session, units = _SESSION.search(path), _UNIT.findall(path)
    found = next((each for line in lines if (each := _ID.search(line) or _NAMED.search(line))), None)
    container = _ESCAPED.sub(lambda each: bytes([int(each[1], 16)]), found[1]) if found is not None else b""
    unit = (
        units[-1] if units and not (session and units[-1] in session[0]) and not (container and container in units[-1]) else b""
    )
    return Group(path_text(session[1] if session else b""), path_text(unit), path_text(container))


class Images:
    """`of(container)`: the image that a container was made from, as its runtime says; empty if that can't be known."""

    def __init__(self, docker: str = _DOCKER, podman: str = _PODMAN) -> None:
        self._docker, self._podman = docker, podman
        self._known: dict[str, str] = {}

    def of(self, container: str) -> str:
        """Looked up once a container."""
        known = self._known.get(container)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[container] = self._look(container)
        return known

    def _look(self, container: str) -> str:
        if not re.fullmatch("[0-9a-f]{64}", container):
            return ""  # not a runtime's id, and nothing to build a path from
        said = _json(self._docker.format(container))
        if isinstance(said, dict) and isinstance(said.get("Config"), dict):
            return str(said["Config"].get("Image", ""))
        listed = _json(self._podman)
        for each in listed if isinstance(listed, list) else []:
            if isinstance(each, dict) and each.get("id") == container:
                return _named(each)
        return ""


def _named(entry: dict[str, Any]) -> str:
    """Podman keeps the image's name in a JSON text within its JSON."""
    try:
        inner = json.loads(str(entry.get("metadata", "")))
    except (ValueError, RecursionError):
        inner = {}
    name = inner.get("image-name") if isinstance(inner, dict) else None
    return str(name or entry.get("image", ""))


def _json(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
