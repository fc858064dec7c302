"""The table of ways out, read and multiplied out: a way × the disk it starts from × the medium it goes to is a case.

Owns: the form of the table (TOML, one `[[way]]` a row; `ways.toml` explains each key by use) and what is wrong with one. Must
not know how a case is run, nor the agent.
"""

import fnmatch
import tomllib
from pathlib import Path

import msgspec
from msgspec import Struct, field

DISKS = ("disk", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuse")
"""File systems of protected directories; "disk" is a folder on the machine's own."""
MEDIA = ("folder", "ext4", "xfs", "btrfs", "btrfs-subvolume", "tmpfs", "overlay", "fuse")
"""File systems of media; "folder" is a plain folder that plays one."""
SPECIAL = ("early", "device", "large", "none")
""""early": ext4, there before the agent started; "device": a block device that a case mounts itself; "large": ext4 with room
for 300,000 files; "none": the way leads over no medium."""
LINKS = ("process", "pipeline", "lineage", "content")


class TableError(Exception):
    """A table can't be used; str() says where, what and what to do."""


class Way(Struct, kw_only=True, forbid_unknown_fields=True):
    """One row.

    `prepare` and `setup` are shell text run as root without a login, before the agent starts and right before the case;
    `before` starts before the agent and says "ready" on stdout (its stdin is `$GO`); `run` is the case itself. `files` are
    made in $SRC with chance content; `sources` (globs below $SRC, default all files there) are those carried out, `may` those
    that may be told, too. `second`: of the sources, those that the second person carries out. `user`: `person` (user and login
    uid), `root` (login uid of the person, rights of root), `nobody` (root without a login; `run` uses `$FIRST` and `$SECOND`).
    """

    name: str
    group: str
    run: str
    note: str = ""
    needs: list[str] = []
    disk: list[str] = field(default_factory=lambda: ["disk"])
    onto: list[str] = field(default_factory=lambda: ["ext4"])
    files: int = 1
    size: str = "20k-400k"
    prepare: str = ""
    setup: str = ""
    before: str = ""
    clean: str = ""
    user: str = "person"
    sources: list[str] = field(default_factory=lambda: ["*"])
    may: list[str] = []
    second: list[str] = []
    nobody: list[str] = []
    bytes: str = "size"
    copies: int = 1
    links: list[str] = field(default_factory=lambda: list(LINKS))
    way: str = "mount"
    within: int = 5
    quick: bool = False
    innocent: bool = False
    operations: int = 0

    @property
    def id(self) -> str:
        """Its name as a part of a path."""
        return "".join(each if each.isalnum() else "-" for each in self.name.lower()).strip("-")

    def expects(self, rel: str) -> bool:
        """Whether the file `rel` (below $SRC) is carried out."""
        return not self.innocent and _matches(rel, self.sources)

    def allows(self, rel: str) -> bool:
        """Whether it may be told as carried out."""
        return self.expects(rel) or _matches(rel, self.may)

    def person_of(self, rel: str) -> str:
        """Who carries it out: `first`, `second` or `nobody` (then no login may be named)."""
        return "second" if _matches(rel, self.second) else "nobody" if _matches(rel, self.nobody) else "first"

    @property
    def sizes(self) -> tuple[int, int]:
        """The least and the most bytes of a file."""
        least, _, most = self.size.partition("-")
        return _bytes(least), _bytes(most or least)


class Case(Struct, frozen=True):
    """A way from one disk to one medium; `id` is unique in a run."""

    way: Way
    disk: str
    onto: str
    id: str

    @property
    def title(self) -> str:
        """ "cp, xfs → ext4"."""
        return f"{self.way.name}, {self.disk} → {self.onto}"


def read(path: Path) -> list[Way]:
    """The rows of a table. Raises TableError."""
    try:
        raw = tomllib.loads(path.read_text())
        ways = msgspec.convert(raw.get("way", []), list[Way])
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}; name a table of ways out") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise TableError(f"{path}: {error}; see the head of tests/ways_out/ways.toml for the form of a row") from None
    if unknown := set(raw) - {"way"}:
        raise TableError(f'{path}: "{min(unknown)}" is no part of a table; rows are [[way]]')
    for way in ways:
        _check(path, way)
    for way in ways:
        if sum(other.id == way.id for other in ways) > 1:
            raise TableError(f'{path}: "{way.name}" is there twice (or another one that differs in signs only); rename one')
    if not ways:
        raise TableError(f"{path}: has no [[way]]; add one")
    return ways


def cases(ways: list[Way], runs: int = 1, wanted: str = "", quick: bool = False) -> list[Case]:
    """All cases, in the order of the table. `wanted`: only those whose title or group holds this text; `quick`: only such rows,
    each from its first disk to its first medium."""
    found = []
    for number in range(runs):
        for way in ways:
            if quick and not way.quick:
                continue
            pairs = [(disk, onto) for disk in _all(way.disk, DISKS) for onto in _all(way.onto, MEDIA)]
            for disk, onto in pairs[:1] if quick else pairs:
                case = Case(way, disk, onto, f"{way.id}.{disk}.{onto}.{number}")
                if wanted.lower() in case.title.lower() or wanted.lower() in way.group.lower():
                    found.append(case)
    return found


def _all(named: list[str], every: tuple[str, ...]) -> list[str]:
    return list(every) if named == ["*"] else named


def _check(path: Path, way: Way) -> None:
    wrong = [each for each in way.disk if each not in (*DISKS, "*")]
    wrong += [each for each in way.onto if each not in (*MEDIA, *SPECIAL, "*")]
    if wrong:
        known = ", ".join(dict.fromkeys(DISKS + MEDIA + SPECIAL))
        raise TableError(f'{path}: "{way.name}": no disk or medium is called "{wrong[0]}"; there are {known}')
    if way.user not in ("person", "root", "nobody") or way.bytes not in ("size", "any"):
        raise TableError(f'{path}: "{way.name}": user is person, root or nobody, and bytes is size or any')
    if not set(way.links) <= set(LINKS):
        raise TableError(f'{path}: "{way.name}": links are {", ".join(LINKS)}; a join by time is none')
    if way.innocent and not way.operations:
        raise TableError(f'{path}: "{way.name}": an innocent row says in `operations` how many it does')
    try:
        assert way.sizes
    except ValueError:
        raise TableError(f'{path}: "{way.name}": size is like 300k or 20k-400k') from None


def _matches(rel: str, globs: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(rel, glob) for glob in globs)


def _bytes(text: str) -> int:
    unit = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("kMG")) * unit
