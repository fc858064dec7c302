# ruff: noqa: PTH123
"""Who opens the block devices of media: whoever is about to mount one, perhaps where we can't see it.

Owns: one fanotify group with a mark on each such node in /dev, so that other devices cost nothing. A mount made inside another
mount namespace tells us nothing (see `mounts.py`); but mount(8) opens the node first, to see which file system is on it. Must
not know what is a medium, nor what the opener does with it. Nothing is opened here, so no stick is kept from being pulled.
"""

import os

from agent.sense import SensorError, kernel
from agent.sense.fanotify_events import heads

_READ_BYTES = 4096


class Nodes:
    """`fileno()` is readable when `openers()` has something to say."""

    def __init__(self) -> None:
        flags = kernel.FAN_CLASS_NOTIF | kernel.FAN_CLOEXEC | kernel.FAN_NONBLOCK | kernel.FAN_REPORT_FID
        try:
            self._group = kernel.fanotify_init(flags)
        except OSError as error:
            raise SensorError(f"fanotify: {error.strerror}; it needs CAP_SYS_ADMIN (root)") from None

    def fileno(self) -> int:
        """The group's descriptor, -1 when closed."""
        return self._group

    def watch(self, nodes: list[str]) -> None:
        """Notice who opens these block devices ("major:minor"). What has no node in /dev is passed over."""
        for number in nodes:
            path = _path_of(number)
            try:
                if path:
                    kernel.fanotify_mark(self._group, kernel.FAN_MARK_ADD, kernel.FAN_OPEN, path)
            except OSError:
                continue  # pulled again already; its mark goes with the node

    def openers(self) -> set[int]:
        """Pids of those who opened one since the last call."""
        pids: set[int] = set()
        while self._group >= 0:
            try:
                buffer = os.read(self._group, _READ_BYTES)
            except BlockingIOError:
                break
            pids |= {head[2] for head in heads(buffer)}
        return pids - {os.getpid()}

    def close(self) -> None:
        """Give the group back."""
        if self._group >= 0:
            os.close(self._group)
            self._group = -1


def _path_of(number: str) -> bytes:
    """ "8:17" → b"/dev/sdb1"; empty for what is no block device here."""
    try:
        with open(f"/sys/dev/block/{number}/uevent", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return b""
    return next((b"/dev/" + line.removeprefix(b"DEVNAME=") for line in lines if line.startswith(b"DEVNAME=")), b"")
