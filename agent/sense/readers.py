"""Who may read or write below a protected directory: a program of its own, run now and then by `rights`.

Owns: the rights of every file (owner, group, mode, POSIX ACL: acl(5)), of the folders on the way to it, who is meant by them
(NSS), and who gets there by sudo. Stands alone, with nothing but the standard library, as it is run as a file: what NSS loads,
and a directory server that does not answer, are no part of the agent. It opens no file. Must not know what was so before.

Prints one JSON object a line: `{root, grants: [[who, may, names, people, files]…], files, folders, unread, setuid, unknown}`.
`who` is `user:NAME`, `group:NAME`, `everyone` or `sudo:NAME`; `may` is `read`, `write` or `all`; `names` are the first
MOST_NAMES of `people` people, root left out; `unread` counts what could not be looked at, `unknown` lists what nobody could be
asked.
"""

import grp
import json
import os
import pwd
import stat
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MOST_NAMES = 200
READ, WRITE, EXECUTE = 4, 2, 1
_USER, _GROUP_OBJ, _GROUP, _MASK = 2, 4, 8, 16
_ENTRY = struct.Struct("<HHI")
_ACL_HEADER = 4
_ACCESS = "system.posix_acl_access"
NOBODY_IN_PARTICULAR = -1
"""The uid of everyone who is named nowhere."""
_SUDO_S = 20


class Rights(NamedTuple):
    """What one inode says: `named` are the ACL's further (tag, id, permissions), `mask` cuts all but owner and others."""

    uid: int
    gid: int
    mode: int
    named: tuple[tuple[int, int, int], ...] = ()
    mask: int = 7
    group: int = 7


def of(found: os.stat_result, acl: bytes) -> Rights:
    """The rights of an inode by its stat and its access ACL (empty: none), as acl(5) lays it out."""
    mode = stat.S_IMODE(found.st_mode)
    group, mask, named = mode >> 3 & 7, 7, []
    for tag, permissions, number in _ENTRY.iter_unpack(acl[_ACL_HEADER : len(acl) - (len(acl) - _ACL_HEADER) % _ENTRY.size]):
        if tag == _GROUP_OBJ:
            group = permissions
        elif tag == _MASK:
            mask = permissions
        elif tag in (_USER, _GROUP):
            named.append((tag, number, permissions))
    return Rights(found.st_uid, found.st_gid, mode, tuple(named), mask, group)


def granted(rights: Rights, uid: int, groups: frozenset[int], wanted: int) -> str:
    """By which entry `uid`, member of `groups`, is given `wanted`: "user:UID", "group:GID", "everyone", or "" if it is not.

    The order of acl(5), "access check algorithm": the first kind of entry that speaks of somebody decides.
    """
    if uid == rights.uid:
        return f"user:{uid}" if rights.mode >> 6 & wanted else ""
    for tag, number, permissions in rights.named:
        if tag == _USER and number == uid:
            return f"user:{uid}" if permissions & rights.mask & wanted else ""
    meant = [(rights.gid, rights.group), *((number, may) for tag, number, may in rights.named if tag == _GROUP)]
    mine = [(number, may) for number, may in meant if number in groups]
    for number, may in mine:
        if may & rights.mask & wanted:
            return f"group:{number}"
    return "" if mine or not rights.mode & wanted else "everyone"


class Tree:
    """What there is below a directory, each combination of rights on the way and at the end counted once."""

    def __init__(self, root: str) -> None:
        self.ways: list[tuple[int, Rights]] = []
        """Each way to a folder: the way to its parent (-1: none) and the folder's own rights."""
        self._known: dict[tuple[int, Rights], int] = {}
        self.files: Counter[tuple[int, Rights]] = Counter()
        self.folders: Counter[tuple[int, Rights]] = Counter()
        self.unread = self.setuid = 0
        self._walk(root)

    def _way(self, before: int, rights: Rights) -> int:
        at = self._known.setdefault((before, rights), len(self.ways))
        if at == len(self.ways):
            self.ways.append((before, rights))
        return at

    def _walk(self, root: str) -> None:
        way = -1
        for folder in [*reversed(Path(root).parents)]:
            way = self._way(way, _rights(str(folder), os.lstat(folder)))
        found = os.stat(root)  # noqa: PTH116 - a protected directory may be named by a link
        rights = _rights(root, found)
        self.folders[(way, rights)] += 1
        left = [(os.fsencode(root), self._way(way, rights))]
        while left:
            path, way = left.pop()
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        self._take(entry, way, left)
            except OSError:
                self.unread += 1

    def _take(self, entry: "os.DirEntry[bytes]", way: int, left: list[tuple[bytes, int]]) -> None:
        try:
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                return
            rights = _rights(entry.path, found)
        except OSError:
            self.unread += 1
            return
        if stat.S_ISDIR(found.st_mode):
            self.folders[(way, rights)] += 1
            left.append((entry.path, self._way(way, rights)))
        else:
            self.files[(way, rights)] += 1
            self.setuid += bool(found.st_mode & (stat.S_ISUID | stat.S_ISGID))


def _rights(path: str | bytes, found: os.stat_result) -> Rights:
    try:
        acl = os.getxattr(path, _ACCESS, follow_symlinks=False)
    except OSError:  # none, or a file system that has none
        acl = b""
    return of(found, acl)


class People:
    """Who is meant by the numbers in a tree's rights. Whom no directory server lists is known as owner or member only."""

    def __init__(self, numbers: Iterable[Rights]) -> None:
        self.names: dict[int, str] = {}
        self.unknown: set[str] = set()
        uids, gids = set[int](), set[int]()
        for rights in numbers:
            uids.add(rights.uid)
            gids.add(rights.gid)
            for tag, number, _ in rights.named:
                (uids if tag == _USER else gids).add(number)
        self._listed = [each for each in pwd.getpwall() if each.pw_uid]
        self.groups: dict[int, str] = {}
        members: dict[int, set[int]] = {}
        for gid in sorted(gids):
            for uid in self.members(gid):
                members.setdefault(uid, set()).add(gid)
        for uid in uids:
            self._name(uid)
        self.all = {uid: frozenset(members.get(uid, ())) for uid in {*uids, *members} if uid}
        self.all[NOBODY_IN_PARTICULAR] = frozenset()

    def _name(self, uid: int) -> None:
        if uid not in self.names:
            try:
                self.names[uid] = pwd.getpwuid(uid).pw_name
            except KeyError:
                self.names[uid] = str(uid)

    def members(self, gid: int) -> set[int]:
        """Uids of who is in a group, by its list or as their own group."""
        found = {each.pw_uid: each.pw_name for each in self._listed if each.pw_gid == gid}
        try:
            group = grp.getgrgid(gid)
        except KeyError:
            self.groups[gid] = str(gid)
            self.names |= found
            return set(found)
        self.groups[gid] = group.gr_name
        for name in group.gr_mem:
            try:
                found[pwd.getpwnam(name).pw_uid] = name
            except KeyError:
                self.unknown.add("group_members")
        found.pop(0, None)
        self.names |= found
        return set(found)

    def call(self, by: str) -> str:
        """An entry with names for numbers."""
        kind, _, number = by.partition(":")
        if kind == "user":
            return f"user:{self.names[int(number)]}"
        return f"group:{self.groups[int(number)]}" if kind == "group" else by


def grants(tree: Tree, people: People) -> Iterator[list[Any]]:
    """`[who, may, names, people, files]`: by each entry of the rights, whom it lets read or write how many files.

    To write in a folder is to add and remove files there: that is counted as well.
    """
    who: dict[tuple[str, str], set[int]] = {}
    files: Counter[tuple[str, str]] = Counter()
    reach: dict[int, list[bool]] = {}
    for uid, groups in people.all.items():
        through: list[bool] = []
        for before, rights in tree.ways:
            through.append((before < 0 or through[before]) and bool(granted(rights, uid, groups, EXECUTE)))
        reach[uid] = through
    for kind, found in ((READ, tree.files), (WRITE, tree.files), (WRITE, tree.folders)):
        may = "read" if kind == READ else "write"
        for (way, rights), count in found.items():
            given = set()
            for uid, groups in people.all.items():
                if (way < 0 or reach[uid][way]) and (by := granted(rights, uid, groups, kind)):
                    who.setdefault((by, may), set()).add(uid)
                    given.add((by, may))
            files.update(dict.fromkeys(given, count))
    for (by, may), uids in sorted(who.items()):
        if by == "user:0":
            continue
        if by == "everyone":
            yield [by, may, [], 0, files[by, may]]
            continue
        names = sorted(people.names[uid] for uid in uids if uid > 0)
        if names:
            yield [people.call(by), may, names[:MOST_NAMES], len(names), files[by, may]]


def sudoers(people: People) -> Iterator[list[Any]]:
    """Who may become root and so read all, by sudoers(5) by cvtsudoers(1); if it can't be asked, `people.unknown` says so."""
    if not Path("/etc/sudoers").exists():
        return
    try:
        told = subprocess.run(
            ["cvtsudoers", "-e", "-f", "json", "/etc/sudoers"], capture_output=True, timeout=_SUDO_S, check=True
        )
        specs = json.loads(told.stdout).get("User_Specs", [])
    except (OSError, ValueError, subprocess.SubprocessError):
        people.unknown.add("sudoers")
        return
    for spec in specs:
        if not any(_is_all(each) for each in spec.get("Cmnd_Specs", [])):
            continue
        for user in spec.get("User_List", []):
            name, group = user.get("username"), user.get("usergroup")
            if user.get("negated") or name == "root":
                continue
            if group:
                try:
                    names = sorted(people.names[uid] for uid in people.members(grp.getgrnam(group).gr_gid))
                except KeyError:
                    continue  # a group that is not there lets nobody in
                if names:
                    yield [f"sudo:%{group}", "all", names[:MOST_NAMES], len(names), 0]
            elif name:
                yield [f"sudo:{name}" if name != "ALL" else "everyone", "all", [name] * (name != "ALL"), int(name != "ALL"), 0]


def _is_all(spec: dict[str, Any]) -> bool:
    """Whether a rule lets one run everything as root; without a list of users, root is meant."""
    runas = [user.get("username") for user in spec.get("runasusers", [])] or ["root"]
    commands = [each.get("command") for each in spec.get("Commands", []) if not each.get("negated")]
    return bool({"ALL", "root"} & set(runas)) and "ALL" in commands


def look(root: str) -> dict[str, Any]:
    """All of it for one directory. Raises OSError if it is not there."""
    tree = Tree(root)
    people = People({rights for _, rights in (*tree.ways, *tree.files, *tree.folders)})
    found = [*grants(tree, people), *sudoers(people)]
    files, folders = sum(tree.files.values()), sum(tree.folders.values())
    told = {"root": root, "grants": found, "files": files, "folders": folders, "unread": tree.unread, "setuid": tree.setuid}
    return told | {"unknown": sorted(people.unknown)}


def main(roots: list[str]) -> int:
    """Look at each of `roots`, in whatever time nobody else wants."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    for root in roots:
        try:
            told = look(root)
        except OSError as error:
            told = {"root": root, "error": str(error.strerror)}
        sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
