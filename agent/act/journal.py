"""What was done to media and must be undone some time: kept on disk, so that a killed agent goes on or takes it back.

Owns: the file `acts.json` in the state directory, written whole and durable before the deed, struck out after it was undone.
What was done before the machine booted last is gone with that boot, and forgotten. Must not know how a thing is done or undone.
"""

import os
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

Act = Literal["read_only", "node", "deauthorized"]
NAME = "acts.json"


class Done(Struct, frozen=True):
    """One deed. `target`: a file system's device number, a device file, an `authorized` file; `shown`: for people, the mount
    point; `mount_read_only`: that mount alone was read-only before."""

    act: Act
    target: str
    medium: str
    shown: str = ""
    mount_read_only: bool = False


class _File(Struct):
    boot: str
    done: list[Done]


class Journal:
    """`done` by (act, target). `write` and `strike` are durable when they return; they raise OSError."""

    def __init__(self, state_dir: str, boot: str) -> None:
        self._path, self._boot = Path(state_dir, NAME), boot
        self.done: dict[tuple[Act, str], Done] = {}
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError):
            return  # none yet; or cut off by a full disk: then what was done is found as it is, and left alone
        if kept.boot == boot:
            self.done = {(each.act, each.target): each for each in kept.done}

    def write(self, done: Done) -> None:
        """This is about to be done."""
        self.done[done.act, done.target] = done
        self._keep()

    def strike(self, done: Done) -> None:
        """It is undone, or was not done after all."""
        if self.done.pop((done.act, done.target), None) is not None:
            self._keep()

    def _keep(self) -> None:
        fresh = self._path.with_suffix(".new")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, msgspec.json.encode(_File(self._boot, list(self.done.values()))))
            os.fsync(file)
        finally:
            os.close(file)
        fresh.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
