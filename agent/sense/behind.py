# ruff: noqa: PTH115, PTH208
# (a Path for each descriptor of each process would cost thrice as much)
"""What the server of a FUSE file system holds open: on that its content may lie, if its source says nothing of it.

Owns: reading a server's descriptors (dislocker, VeraCrypt and the like): block devices by their number, files by their path,
as far as they may hold content: not those that are only written (logs), nor files of the file system that "/" is on. Nothing
is opened, and nothing but nodes in /dev is asked for its attributes, since a file may lie on a file system whose server sleeps.
Must not know which of it is a medium's. A part of `mounts.py`.
"""

import os
import stat

from agent.contract.event import path_text
from agent.sense import procfs

_MOST = 16
_WRITE_ONLY, _APPEND = os.O_WRONLY, os.O_APPEND
_OWN = 3


def held(pid: int, devices: dict[int, str]) -> list[str]:
    """Block devices ("major:minor") and files (paths) that a process holds. `devices` is the device of each mount by its id."""
    try:
        numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []
    found: list[str] = []
    for number in sorted(numbers):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}".encode())
        except OSError:
            continue  # closed meanwhile
        if number < _OWN or not link.startswith(b"/") or len(found) >= _MOST:
            continue
        if link.startswith(b"/dev/"):
            found += _block(link)
        elif _may_hold(pid, number, devices):
            found.append(path_text(link))
    return list(dict.fromkeys(found))


def _block(node: bytes) -> list[str]:
    try:
        seen = os.stat(node)  # noqa: PTH116 (as above)
    except OSError:
        return []
    return [f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"] if stat.S_ISBLK(seen.st_mode) else []


def _may_hold(pid: int, number: int, devices: dict[int, str]) -> bool:
    lines = dict(line.split(b":", 1) for line in procfs.read(f"/proc/{pid}/fdinfo/{number}").splitlines() if b":" in line)
    try:
        flags, mount = int(lines[b"flags"], 8), int(lines[b"mnt_id"])
    except (KeyError, ValueError):
        return False
    root = devices.get(0, "")
    return flags & os.O_ACCMODE != _WRITE_ONLY and not flags & _APPEND and devices.get(mount, root) != root
