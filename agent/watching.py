"""What is marked now, and what should be: protected directories that come and go, mounts that the core takes for media.

Owns: carrying the wishes of the configuration and the core to the file sensor and the holder, and keeping book of what was
marked, what could not be, and which media's openers are held. Must not know what is a medium (the core's `watches` say) or
what events mean. Called by `daemon` from its one thread.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Protocol

from agent.contract.event import path_bytes, path_text
from agent.core.facts import Coverage, Fact
from agent.core.pipeline import MountWatch
from agent.sense import SensorError, fusemount, latecomers
from agent.sense.holder import Holder
from agent.sense.mounts import Mounts
from agent.sense.shares import Shares

_SAY_REPLACED_S = 3.0
"""Longer than a tick of the daemon, which asks for `coverage`."""


class FileSensor(Protocol):
    """What `Fanotify` and `Fallback` have in common."""

    want_sizes: bool
    behind: bool

    def watch_tree(self, path: str) -> None:
        """Watch a protected directory. Raises SensorError."""

    def watch_medium(self, mount: str, alone: bool, reads: bool = False) -> None:
        """Watch what is written on a medium, and (`reads`) what is opened there. Raises SensorError."""

    def unwatch(self, mount: str) -> None:
        """Give either up."""


class Watching:
    """`trees` says of each protected path whether it is watched, `media` lists the mounts that are."""

    def __init__(self, files: FileSensor, holder: Holder | None, mounts: Mounts, shares: Shares | None = None) -> None:
        self._files, self._holder, self._mounts, self._shares = files, holder, mounts, shares
        self.trees: dict[str, bool] = {}
        self._media: dict[tuple[int, int], str] = {}
        self._held: set[str] = set()
        self._alone: set[str] = set()
        self._failed: dict[str, str] = {}
        self._identity: dict[str, tuple[int, int]] = {}
        self._replaced: dict[str, float] = {}

    @property
    def media(self) -> list[str]:
        """Mounts of media that are watched."""
        return sorted(set(self._media.values()))

    @property
    def alone(self) -> list[bytes]:
        """Mounts of media with a file system of their own, served by the kernel: what is opened and run there is told."""
        return [os.fsencode(mount) for mount in self.media if mount in self._alone]

    @property
    def all_held(self) -> bool:
        """Whether every watched medium's openers are held while they are looked at."""
        return all(mount in self._held for mount in self._media.values())

    def protect(self, paths: list[str]) -> None:
        """Watch these directories, as far as they are there (autofs, LUKS and NFS come late); give up the others.

        One that is another directory than at the last call (replaced, or mounted over) is watched anew, and `coverage` says
        so for some seconds: what was done in it until now was not seen.
        """
        wanted = [os.path.realpath(path) for path in paths]
        for path in [path for path in self.trees if path not in wanted]:
            del self.trees[path]
            self._identity.pop(path, None)
            self._files.unwatch(path)
        now = time.monotonic()
        self._replaced = {path: since for path, since in self._replaced.items() if now - since < _SAY_REPLACED_S}
        for path in wanted:
            try:
                self._files.watch_tree(path)
                found = os.stat(path)  # noqa: PTH116 (paths are the os module's here)
            except (SensorError, OSError):
                self.trees[path] = False
                continue
            identity = found.st_dev, found.st_ino
            if self.trees.get(path) and self._identity[path] != identity:
                self._replaced[path] = now
            self.trees[path], self._identity[path] = True, identity

    def expect(self, folders: list[str]) -> None:
        """Mark what may become a simulated medium before its descriptor is there, so that its first write is seen."""
        for folder in folders:
            with contextlib.suppress(SensorError):
                self._mark(folder)

    def follow(self, watches: list[MountWatch], now_ms: int, since_ms: int | None) -> Iterator[Fact]:
        """Mark the mounts that the core takes for media; give up those that it does not any more.

        Yields Found for what was written on a new one since `since_ms`, before we came; None: do not look.
        """
        wanted = {(each.namespace, each.mount_id): os.fsdecode(path_bytes(each.reach)) for each in watches}
        unheld = {(each.namespace, each.mount_id) for each in watches if not each.held}
        for key in [key for key in self._media if key not in wanted]:
            mount = self._media.pop(key)
            if mount not in wanted.values():
                if self._shares is None or not self._shares.unwatch(mount):
                    self._files.unwatch(mount)
                self._held.discard(mount)
                self._alone.discard(mount)
                if self._holder is not None:
                    self._holder.unwatch(mount)
        self._failed = {mount: why for mount, why in self._failed.items() if mount in wanted.values()}
        for key, mount in wanted.items():
            if key in self._media:
                continue
            owner = fusemount.owner_at(os.fsencode(mount))
            if (key in unheld or (owner is not None and owner[0])) and self._shares is not None:
                self._shares.watch(mount, owner or (0, 0))  # its server may never answer: it is not asked from here
                self._media[key] = mount
                self._held.add(mount)  # nobody can be held there, and it is not worth a wake at each exec on the machine
                continue
            try:
                self._mark(mount, key not in unheld, owner is None and key not in unheld)
            except (SensorError, OSError) as error:
                self._failed[mount] = str(error)
                continue
            self._media[key] = mount
            self._failed.pop(mount, None)
            if since_ms is not None and key not in unheld:
                yield from latecomers.look(mount, now_ms, since_ms)
        self._files.want_sizes = bool(self._media)

    def coverage(self, now_ms: int) -> Iterator[Coverage]:
        """What should be watched and is not."""
        missing = [path_text(os.fsencode(path)) for path, watched in self.trees.items() if not watched]
        whys = [f"not there or not readable yet: {', '.join(missing)}"] if missing else []
        for path in self._replaced:
            whys.append(f"{path_text(os.fsencode(path))} is another directory now; what was done in it was not seen until now")
        blind = ["protected_missing"] if whys else []
        yield Coverage(at_ms=now_ms, sensor="protected", ok=not whys, blind=blind, why="; ".join(whys))
        blind = ["medium_not_watched"] if self._failed else []
        why = "; ".join(self._failed.values())
        yield Coverage(at_ms=now_ms, sensor="media", ok=not self._failed, blind=blind, why=why)

    def _mark(self, mount: str, hold: bool = True, reads: bool = True) -> None:
        """A file system of its own gets one mark and holding; a folder, or what shares its file system, marks on its tree."""
        elsewhere = mount.startswith("/proc/")  # reached through a process of another mount namespace
        if elsewhere or self._mounts.mount_at(path_text(os.fsencode(mount))) is not None:
            try:
                self._files.watch_medium(mount, True, reads)
            except SensorError:
                self._files.watch_medium(mount, False, reads)
            else:
                if self._holder is not None and hold:
                    self._holder.watch(mount)
                self._held.add(mount)  # a share too: it is not worth a wake at each exec on the machine
                if reads:
                    self._alone.add(mount)
            return
        self._files.watch_medium(mount, False, reads)
        if self._holder is not None and self._holder.holds(os.path.realpath(mount)):
            self._held.add(mount)
