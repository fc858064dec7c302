"""Which place a path is: in a protected directory, on a medium, or elsewhere. The deepest that it lies below counts.

Owns: the protected directories as configured, and a cache by directory, as files come in storms from few of them. Must not
know what happens at a place. From `pipeline` (a fact's path) to `pipeline`; mounts are asked of `media`.
"""

from collections.abc import Iterator

from msgspec import Struct

from agent.core.media import Media, Mount

_MOST_CACHED = 8_192


class ProtectedDir(Struct, frozen=True, kw_only=True):
    """A protected directory: `path` without links, spelt by `path_text`."""

    path: str
    label: str


Place = tuple[ProtectedDir | None, Mount | None]
"""(protected directory, None), (None, mount of a medium), or neither"""
ELSEWHERE: Place = (None, None)


class Places:
    """`known.get(folder) or look_up(folder)`, of a directory whose path ends in "/"; `of(path)` for a file."""

    def __init__(self, media: Media) -> None:
        self._media = media
        self._deepest_first: list[tuple[str, ProtectedDir]] = []
        self._by_path: dict[str, ProtectedDir] = {}
        self.known: dict[str, Place] = {}

    def protect(self, roots: list[ProtectedDir]) -> None:
        """These directories are protected from now on."""
        self._deepest_first = sorted(((_under(root.path), root) for root in roots), key=lambda pair: -len(pair[0]))
        self._by_path = {root.path: root for root in roots}
        self.known.clear()

    def of(self, path: str) -> Place:
        """The place of a file."""
        folder = path[: path.rfind("/") + 1]
        return self.known.get(folder) or self.look_up(folder)

    def look_up(self, folder: str) -> Place:
        """The place of all files in a directory; remembered."""
        mount = self._media.at(folder)
        place: Place = (None, mount) if mount is not None else ELSEWHERE
        for under, root in self._deepest_first:
            if folder.startswith(under) and (mount is None or len(under) >= len(mount.under)):
                place = (root, None)
                break
        if len(self.known) >= _MOST_CACHED:
            self.known.clear()
        self.known[folder] = place
        return place

    def root(self, path: str) -> ProtectedDir | None:
        """The protected directory at exactly this path."""
        return self._by_path.get(path)

    def shown(self, mount: str, lies_on: str) -> Iterator[tuple[str, str, ProtectedDir]]:
        """(path there, path here, protected directory) for each protected directory of which a part shows at `mount`, where the
        content of the directory `lies_on` (which ends in "/") is shown once more."""
        for under, root in self._deepest_first:
            if lies_on.startswith(under):
                yield mount, lies_on, root
            elif under.startswith(lies_on):
                yield f"{mount.rstrip('/')}/{under[len(lies_on) :]}", under, root

    def is_protected(self, path: str) -> bool:
        """Whether a file is protected where it is."""
        return self.of(path)[0] is not None

    def forget(self) -> None:
        """Mounts changed."""
        self.known.clear()


def below(root: str, path: str) -> str:
    """The rest of `path` below the directory `root`; all of it if it does not lie there."""
    under = _under(root)
    return path[len(under) :] if path.startswith(under) else path


def _under(path: str) -> str:
    return path.rstrip("/") + "/"
