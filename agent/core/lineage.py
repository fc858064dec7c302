"""Files whose bytes are protected although their path lies outside: moved-out files and directories, hard links, copies.

Question: is this file a protected one under another name, or made of protected ones? Owns: file key → where it comes from,
bounded in files and in sources, forgetting what was not seen for `keep_ms`; and the former places of directories that were
moved out. What is dropped for room is counted (`dropped`). Must not know who does what with them, nor how it was found that
a file is a copy (`staging`). From `pipeline` (what happened to protected files) to `joins` (reads by another name count as
reads of the origin) and back to `pipeline` (a read of a copy is a read of each of its sources).

A key names an inode with its generation, so that another file in its place has another key. What is known of a copy is kept
as bytes and read when it is asked for, as whoever copies a tree makes thousands: 20,000 copies take some 9 MiB, not 17.
"""

from itertools import islice

import msgspec
from msgspec import Raw, Struct, structs

_MOST = 20_000
_MOST_DIRS = 500
MOST_STAGED = 20_000
MOST_SOURCES = 40_000
MOST_OF_ONE = 2_000
_MOST_LEFT_BEHIND = 1_000
_MOST_VIA = 4
_KEPT_MS = 90 * 86_400_000
_GONE_MS = 900_000
"""A copy that was removed is known for a while: whoever read it before may still be writing."""
_SEEN_EVERY_MS = 60_000


class Origin(Struct, array_like=True):
    """Where a file comes from: `path` is the protected one, `root` the protected directory, `how` moved | linked."""

    path: str
    root: str
    how: str
    seen_ms: int


class Source(Struct, array_like=True, frozen=True, gc=False):
    """A protected file of which a copy was made, and its size in bytes then, None if that was not seen."""

    path: str
    root: str
    size: int | None = None


class Staged(Struct, array_like=True, frozen=True, gc=False):
    """A copy of protected content elsewhere. `via`: the copies it was made of, first to last; `uid`: that of its event;
    `part`: it is one piece of its source, so that its bytes are not the source's."""

    path: str
    size: int
    sources: tuple[Source, ...]
    via: tuple[str, ...]
    uid: str
    seen_ms: int
    part: bool = False


_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Staged).decode


class _Kept(Struct, array_like=True):
    files: dict[bytes, Origin]
    dirs: dict[str, Origin]
    staged: dict[bytes, Raw] = {}


class Lineage:
    """`of(key, path)` answers for files outside. `changed` tells that there is something new to keep."""

    def __init__(self) -> None:
        self._files: dict[bytes, Origin] = {}
        self._dirs: dict[str, Origin] = {}
        self._views: dict[tuple[int, int], tuple[str, Origin]] = {}
        self._staged: dict[bytes, bytes] = {}
        self._gone: dict[bytes, int] = {}
        self._at: dict[str, bytes] = {}
        self._left_behind: dict[str, None] = {}
        self._sources = 0
        self.keep_ms = _KEPT_MS
        self.dropped = self._swept_ms = 0
        self.changed = False

    def learn(self, key: bytes, path: str, root: str, how: str, at_ms: int) -> None:
        """The file `key`, protected as `path`, can be reached from outside now."""
        if not key:
            return
        known = self._files.pop(key, None)
        self._files[key] = Origin(path, root, how, at_ms)
        if known is None or known.path != path:
            self.changed = True
        if len(self._files) > _MOST:
            del self._files[next(iter(self._files))]

    def learn_dir(self, outside: str, path: str, root: str, at_ms: int) -> None:
        """The directory `path` with all below it is now at `outside`."""
        self._dirs[outside.rstrip("/") + "/"] = Origin(path, root, "moved", at_ms)
        self.changed = True
        if len(self._dirs) > _MOST_DIRS:
            del self._dirs[next(iter(self._dirs))]

    def show(self, mount: tuple[int, int], outside: str, path: str, root: str, at_ms: int) -> None:
        """As long as this is mounted (namespace, mount id), a server shows the protected directory `path` at `outside`, too."""
        self._views[mount] = outside.rstrip("/") + "/", Origin(path.rstrip("/"), root, "shown", at_ms)

    def hide(self, mount: tuple[int, int]) -> None:
        """It was unmounted."""
        self._views.pop(mount, None)

    @property
    def empty(self) -> bool:
        """Whether nothing protected is known to lie outside."""
        return not self._files and not self._dirs and not self._staged and not self._views

    @property
    def no_copies(self) -> bool:
        """Whether no staged copy is known."""
        return not self._staged

    def of(self, key: bytes, path: str) -> Origin | None:
        """The origin of a file by its key, else by the moved-out directory it lies in; None if it has nothing protected."""
        known = self._files.get(key)
        if known is None and (self._dirs or self._views):
            for outside, origin in (*self._views.values(), *self._dirs.items()):
                if path.startswith(outside):
                    return Origin(f"{origin.path}/{path[len(outside) :]}", origin.root, origin.how, origin.seen_ms)
        return known

    def came_back(self, key: bytes, at_ms: int) -> None:
        """The file lies in a protected directory again, and is reached by no other name."""
        known = self._files.get(key)
        if known is not None and known.how == "moved":
            del self._files[key]
            self.changed = True
        self.end(key)

    # -- copies --------------------------------------------------------------------------------------------------------

    def stage(self, key: bytes, copy: Staged, gone_ms: int = 0) -> bool:
        """The file `key` is a copy, removed at `gone_ms` if not 0. False if that was known already, with the same sources."""
        if len(copy.sources) > MOST_OF_ONE:
            self.dropped += len(copy.sources) - MOST_OF_ONE
        sources = copy.sources[:MOST_OF_ONE]
        copy = structs.replace(copy, sources=sources, via=copy.via[:1] + copy.via[1:][-(_MOST_VIA - 1) :])
        known = self.staged(key)
        same = known is not None and set(known.sources) == set(sources)
        if known is not None:
            copy = structs.replace(copy, uid=known.uid, sources=known.sources) if same else copy
            self.end(key)
        self._staged[key] = _pack(copy)
        self._at[copy.path] = key
        self._left_behind.pop(copy.path, None)
        self._sources += len(copy.sources)
        if gone_ms:
            self._gone[key] = gone_ms
            self._leave(copy.path)
        self.changed = True
        while len(self._staged) > 1 and (len(self._staged) > MOST_STAGED or self._sources > MOST_SOURCES):
            oldest = next(iter(self._staged))
            self.dropped += oldest not in self._gone
            self.end(oldest)
        return not same

    def told(self, key: bytes, uid: str) -> None:
        """The first event that tells of a copy is this one."""
        copy = self.staged(key)
        if copy is not None and not copy.uid:
            self._staged[key] = _pack(structs.replace(copy, uid=uid))
            self.changed = True

    def staged(self, key: bytes) -> Staged | None:
        """The copy that this file is."""
        packed = self._staged.get(key)
        return None if packed is None else _unpack(packed)

    def staged_at(self, path: str) -> Staged | None:
        """The copy that lies, or lately lay, at this path."""
        key = self._at.get(path)
        return None if key is None else self.staged(key)

    def left_behind(self, path: str) -> bool:
        """Whether a copy lay at this path until it was overwritten, removed or moved: what lies there now is something else."""
        return path in self._left_behind

    def _leave(self, path: str) -> None:
        self._left_behind[path] = None
        if len(self._left_behind) > _MOST_LEFT_BEHIND:
            del self._left_behind[next(iter(self._left_behind))]

    def opened(self, key: bytes, path: str, at_ms: int) -> Staged | None:
        """A file was opened by this path: the copy that it is, which counts as seen about now."""
        copy = self.staged(key)
        if copy is not None and at_ms - copy.seen_ms >= _SEEN_EVERY_MS:
            copy = structs.replace(copy, seen_ms=at_ms)
            self._staged[key] = _pack(copy)
        if copy is not None and copy.path != path:
            self.moved(key, path)
        return copy

    def moved(self, key: bytes, path: str) -> None:
        """A copy has another path now."""
        copy = self.staged(key)
        if copy is not None and path and copy.path != path:
            if self._at.get(copy.path) == key:
                del self._at[copy.path]
                self._leave(copy.path)
            self._staged[key] = _pack(structs.replace(copy, path=path))
            self._gone.pop(key, None)
            self._at[path] = key
            self._left_behind.pop(path, None)
            self.changed = True

    def gone(self, key: bytes, at_ms: int) -> None:
        """A copy was removed."""
        copy = self.staged(key) if key not in self._gone else None
        if copy is not None:
            self._gone[key] = at_ms
            if self._at.get(copy.path) == key:
                self._leave(copy.path)
            self.changed = True

    def end(self, key: bytes) -> None:
        """A file is no copy any more: it was overwritten with something else."""
        copy = self.staged(key)
        if copy is not None:
            del self._staged[key]
            self._gone.pop(key, None)
            self._sources -= len(copy.sources)
            if self._at.get(copy.path) == key:
                del self._at[copy.path]
                self._leave(copy.path)
            self.changed = True

    def copies(self) -> list[tuple[bytes, str]]:
        """Key and path of every copy that is there."""
        return [(key, _unpack(packed).path) for key, packed in self._staged.items() if key not in self._gone]

    # -- time and restarts ---------------------------------------------------------------------------------------------

    def sweep(self, now_ms: int) -> None:
        """Forget what was not seen for `keep_ms`, and copies that were removed a while ago."""
        files, dirs = len(self._files), len(self._dirs)
        self._files = {key: each for key, each in self._files.items() if now_ms - each.seen_ms <= self.keep_ms}
        self._dirs = {path: each for path, each in self._dirs.items() if now_ms - each.seen_ms <= self.keep_ms}
        if (files, dirs) != (len(self._files), len(self._dirs)):
            self.changed = True
        for key in [key for key, gone_ms in self._gone.items() if now_ms - gone_ms > _GONE_MS]:
            self.end(key)
        if not 0 <= now_ms - self._swept_ms < _SEEN_EVERY_MS:
            self._swept_ms = now_ms
            for key in [key for key, each in self._staged.items() if now_ms - _unpack(each).seen_ms > self.keep_ms]:
                self.end(key)

    def to_bytes(self) -> bytes:
        """What is kept over a restart."""
        there = {key: Raw(packed) for key, packed in self._staged.items() if key not in self._gone}
        return msgspec.msgpack.encode(_Kept(self._files, self._dirs, there))

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        kept = msgspec.msgpack.decode(data, type=_Kept)
        staged = [(key, bytes(packed), _unpack(packed)) for key, packed in islice(kept.staged.items(), MOST_STAGED)]
        self._files, self._dirs = kept.files, kept.dirs
        self._staged = {key: packed for key, packed, _ in staged}
        self._gone, self._at = {}, {copy.path: key for key, _, copy in staged}
        self._sources = sum(len(copy.sources) for *_, copy in staged)

    def __len__(self) -> int:
        """How many copies are known."""
        return len(self._staged)
