"""Files whose bytes are protected although their path lies outside: moved-out files and directories, hard links.

Question: is this file a protected one under another name? Owns: file key → where it comes from, bounded, forgetting what was
not seen for 90 days; and the former places of directories that were moved out. Must not know who does what with them.
From `pipeline` (what happened to protected files) to `joins` (reads by another name count as reads of the origin).
"""

import msgspec
from msgspec import Struct

_MOST = 20_000
_MOST_DIRS = 500
_KEPT_MS = 90 * 86_400_000


class Origin(Struct, array_like=True):
    """Where a file comes from: `path` is the protected one, `root` the protected directory, `how` moved | linked."""

    path: str
    root: str
    how: str
    seen_ms: int


class _Kept(Struct, array_like=True):
    files: dict[bytes, Origin]
    dirs: dict[str, Origin]


class Lineage:
    """`of(key, path)` answers for files outside. `changed` tells that there is something new to keep."""

    def __init__(self) -> None:
        self._files: dict[bytes, Origin] = {}
        self._dirs: dict[str, Origin] = {}
        self.changed = False

    def learn(self, key: bytes, path: str, root: str, how: str, at_ms: int) -> None:
        """The file `key`, protected as `path`, can be reached from outside now."""
        if not key:
            return
        known = self._files.pop(key, None)
        self._files[key] = Origin(path, root, how, at_ms)
        self.changed |= known is None or known.path != path
        if len(self._files) > _MOST:
            del self._files[next(iter(self._files))]

    def learn_dir(self, outside: str, path: str, root: str, at_ms: int) -> None:
        """The directory `path` with all below it is now at `outside`."""
        self._dirs[outside.rstrip("/") + "/"] = Origin(path, root, "moved", at_ms)
        self.changed = True
        if len(self._dirs) > _MOST_DIRS:
            del self._dirs[next(iter(self._dirs))]

    @property
    def empty(self) -> bool:
        """Whether nothing protected is known to lie outside."""
        return not self._files and not self._dirs

    def of(self, key: bytes, path: str) -> Origin | None:
        """The origin of a file by its key, else by the moved-out directory it lies in; None if it has nothing protected."""
        known = self._files.get(key)
        if known is None and self._dirs:
            for outside, origin in self._dirs.items():
                if path.startswith(outside):
                    return Origin(f"{origin.path}/{path[len(outside) :]}", origin.root, origin.how, origin.seen_ms)
        return known

    def came_back(self, key: bytes, at_ms: int) -> None:
        """The file lies in a protected directory again, and is reached by no other name."""
        known = self._files.get(key)
        if known is not None and known.how == "moved":
            del self._files[key]
            self.changed = True

    def sweep(self, now_ms: int) -> None:
        """Forget what was not seen for 90 days."""
        files, dirs = len(self._files), len(self._dirs)
        self._files = {key: each for key, each in self._files.items() if now_ms - each.seen_ms <= _KEPT_MS}
        self._dirs = {path: each for path, each in self._dirs.items() if now_ms - each.seen_ms <= _KEPT_MS}
        self.changed |= (files, dirs) != (len(self._files), len(self._dirs))

    def to_bytes(self) -> bytes:
        """What is kept over a restart."""
        return msgspec.msgpack.encode(_Kept(self._files, self._dirs))

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        kept = msgspec.msgpack.decode(data, type=_Kept)
        self._files, self._dirs = kept.files, kept.dirs
