"""A process as JSON, in the forms that events need: who it is, and its command line as far as it may be told.

Question: how is a process written down? Owns: the encoding, once a process, as copies come in storms; and privacy in writing:
where names are not recorded, which words of the command line may stay (`masks` knows how, this knows which files). Must not
know events. From `people` (entries) to `ocsf`.
"""

from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType, structs

from agent.contract.event import LoginInfo, ParentInfo, ProcessInfo
from agent.core.masks import discreet
from agent.core.media import Mount
from agent.core.people import Entry

_encode = msgspec.json.encode


class Spoken:
    """A process as JSON, in the forms that events need."""

    __slots__ = ("_bare", "_candidates", "_discreet", "_entry", "_held", "actor", "login", "process", "process_bare")

    def __init__(self, entry: Entry) -> None:
        process = entry.process
        name = process.exe.rpartition("/")[2]
        actor: dict[str, Any] = {"process": {"pid": process.pid}}
        if name:
            actor["process"] |= {"name": name, "path": process.exe}
        uid = entry.login_uid
        self.login: Raw | UnsetType = UNSET
        if uid is not None:
            actor["user"] = user_of(uid, process.login_user)
            self.login = Raw(
                _encode(
                    LoginInfo(
                        uid=uid,
                        user=process.login_user or UNSET,
                        session=process.session or UNSET,
                        tty=process.tty or UNSET,
                        remote=process.remote or UNSET,
                    )
                )
            )
        self.actor = Raw(_encode(actor))
        bare = ProcessInfo(
            pid=process.pid,
            exe=process.exe or UNSET,
            start=process.start or UNSET,
            unit=process.unit or UNSET,
            container=process.container or UNSET,
            image=process.image or UNSET,
        )
        self.process_bare = Raw(_encode(bare))
        bare.argv = process.argv or UNSET
        parents = [ParentInfo(pid=each.pid, exe=known_text(each.exe)) for each in process.parents[:16]]
        bare.parents = parents or UNSET
        self.process = Raw(_encode(bare))
        self._entry, self._bare = entry, bare
        self._candidates: list[str] | None = None
        self._held: set[str] = set()
        self._discreet: tuple[object, Mount | None, list[str], Raw] = (None, None, [], self.process)

    def discreet(self, mount: Mount | None, copied: tuple[str, str], roots: tuple[str, ...]) -> Raw:
        """The process with an argv that names only protected files, what is on `mount`, and `copied` (from, to).

        A relative path counts as one of them if it is a part of it. What was encoded last is kept: copies come in storms.
        """
        argv = self._entry.process.argv
        if self._candidates is None:
            self._held = {each.path.rpartition("/")[2] for each in self._entry.files}
            self._candidates = candidates = []

            def note(place: str) -> bool:
                if not place.startswith("/"):
                    candidates.append(place)
                return False

            discreet(argv, self._held, note)
        parts = self._candidates
        if parts:
            joined = f"{copied[0]}/\n{copied[1]}/"
            parts = [place for place in parts if f"/{place}/" in joined]
        known_roots, known_mount, known_parts, raw = self._discreet
        if known_roots is roots and known_mount is mount and known_parts == parts:
            return raw
        there = (mount.mount, mount.under) if mount is not None else ()
        places = [each.rstrip("/") + "/" for each in (*roots, *there) if each]

        def tell(place: str) -> bool:
            within = place.rstrip("/") + "/"
            if place.startswith("/"):
                return any(within.startswith(each) or each.startswith(within) for each in places)
            return place in parts

        shown = structs.replace(self._bare, argv=discreet(argv, self._held, tell) or UNSET)
        raw = Raw(_encode(shown))
        self._discreet = (roots, mount, parts, raw)
        return raw


def spoken_of(entry: Entry) -> Spoken:
    """The process of an entry in JSON, encoded when it is first asked for."""
    spoken = entry.encoded
    if not isinstance(spoken, Spoken):
        spoken = entry.encoded = Spoken(entry)
    return spoken


def known_text(text: str) -> str | UnsetType:
    """Text that JSON can carry; UNSET if there is none."""
    return text.encode("utf-8", "replace").decode() if text else UNSET


def user_of(uid: int, name: str) -> dict[str, str]:
    """OCSF user."""
    return {"uid": str(uid), **({"name": name} if name else {})}
