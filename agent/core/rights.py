"""Who may get at a protected directory, against who might when it was last looked up: the drift is an event.

Question: who can read it now, since when, and who changed that? Owns: the last account of each directory (kept over restarts),
who touched rights since, and what counts as drift: somebody who may now and might not before, or the reverse. Of files that
came or went with the rights that others have, nothing is said. Must not know how rights are looked up, or events' shape.
From `pipeline` (changes, accounts) to `ocsf` (`access.changed`).
"""

from typing import NamedTuple

import msgspec
from msgspec import Struct

from agent.contract.codes import HIGH, INFO, LOW, MEDIUM
from agent.core.facts import Grant, Rights
from agent.core.people import Entry

_MOST_GRANTS = 200
"""Of one directory, kept and told; thousands would be one owner a file, which says nothing to a reader"""
EVERYONE = "everyone"


class _Kept(Struct, array_like=True):
    grants: list[Grant]
    files: int
    setuid: int


class Touch(NamedTuple):
    """Who changed rights below a directory last, and how many changes were seen since the last account."""

    entry: Entry | None
    pid: int
    changes: int


class Drift(NamedTuple):
    """`gained` and `lost` against the last account: entries that are new, or whose people are (then only those are named).
    `first`: there was no last one. `touch`: whose changes were seen since; None: nobody's."""

    account: Rights
    gained: list[Grant]
    lost: list[Grant]
    first: bool
    setuid: int
    touch: Touch | None


class AccessRights:
    """`touched` for each change, `looked` for each account. `changed`: there is something new to keep."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._touched: dict[str, Touch] = {}
        self.stirred: set[str] = set()
        """Directories in which rights were changed since this was last emptied."""
        self.changed = False

    def touched(self, root: str, entry: Entry | None, pid: int) -> None:
        """Somebody changed owner, mode or ACL of something below `root` (or set its times: the kernel tells both alike)."""
        self.stirred.add(root)
        before = self._touched.get(root)
        self._touched[root] = Touch(entry, pid, before.changes + 1 if before is not None else 1)

    def looked(self, account: Rights) -> Drift | None:
        """What is different now; None: nothing."""
        account.grants = account.grants[:_MOST_GRANTS]
        before, touch = self._kept.get(account.root), self._touched.pop(account.root, None)
        now = _Kept(account.grants, account.files, account.setuid)
        if before == now:
            return None
        self._kept[account.root] = now
        self.changed = True
        if before is None:
            return Drift(account, account.grants, [], True, account.setuid, touch)
        gained, lost = _beyond(now, before), _beyond(before, now)
        setuid = max(account.setuid - before.setuid, 0)
        return Drift(account, gained, lost, False, setuid, touch) if gained or lost or setuid else None

    def forget(self, roots: set[str]) -> None:
        """Only `roots` are protected now."""
        for root in self._kept.keys() - roots:
            del self._kept[root]
            self.changed = True

    def to_bytes(self) -> bytes:
        """The last account of each directory."""
        return msgspec.msgpack.encode(self._kept)

    def from_bytes(self, data: bytes) -> None:
        """Take back what `to_bytes` gave. Raises msgspec.MsgspecError."""
        if data:
            self._kept = msgspec.msgpack.decode(data, type=dict[str, _Kept])


def severity(drift: Drift) -> int:
    """Everybody may now: high. Somebody more than before: medium. The first account of a directory is no news in itself."""
    open_to_all = any(each.who == EVERYONE for each in drift.gained)
    if drift.first:
        return MEDIUM if open_to_all else INFO
    if open_to_all:
        return HIGH
    return MEDIUM if drift.gained or drift.setuid else LOW


def _beyond(now: _Kept, before: _Kept) -> list[Grant]:
    """Of each entry in `now` what `before` did not have: people, or more files to read than came in the meantime."""
    had, came = {(each.who, each.may): each for each in before.grants}, max(now.files - before.files, 0)
    beyond = []
    for each in now.grants:
        known = had.get((each.who, each.may))
        if known is None:
            beyond.append(each)
        elif new := [name for name in each.names if name not in known.names]:
            beyond.append(Grant(each.who, each.may, new, max(each.people - known.people, len(new)), each.files))
        elif each.may == "read" and each.files - known.files > came:
            beyond.append(Grant(each.who, each.may, each.names, each.people, each.files - known.files - came))
    return beyond
