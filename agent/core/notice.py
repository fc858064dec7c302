"""Which events a person is told of at once, and how a storm of them becomes one notice that grows.

Question: is there something to say to somebody now? Owns: which event codes warn and whom, the merging of what belongs
together (a person, a kind, a medium), and how often a notice may be said anew. Must not know words, desktops or terminals.
Told the time. From the events that `pipeline` made to `agent/notify.py`, which delivers; nothing here names a file.

Of a thousand copies the first is told at once; what follows within UPDATE_MS is added up and told as one notice that takes the
place of the one before. After CALM_MS without any, the next one is new.
"""

from typing import Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import UNSET, Raw, Struct

from agent.contract.codes import HIGH, MEDIUM
from agent.contract.event import LoginInfo, MediumInfo
from agent.contract.form import AnyEvent
from agent.contract.show import medium_text

Kind = Literal[
    "copied",
    "staged",
    "limit",
    "unapproved",
    "disguised",
    "brought_in",
    "refused_copy",
    "refused_mount",
    "refused_device",
    "refused_expired",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
UPDATE_MS, CALM_MS = 3_000, 600_000
_MOST = 256
_BAD = ("unapproved", "expired", "revoked")
_DENIED = 2


class Notice(Struct, kw_only=True, frozen=True):
    """Something to say to the person with the login uid `uid`. `medium` in words, `key` as in the register; `limit` its name.

    `count`: how often it happened so far; `replaces`: it is the same notice as one told before, grown. `tty`: the terminal of
    who did it, if that is known.
    """

    at_ms: int
    uid: int
    kind: Kind
    severity: int
    medium: str = ""
    key: str = ""
    decision: str = ""
    limit: str = ""
    tty: str = ""
    count: int = 1
    replaces: bool = False


class _Medium(Struct):
    key: str = ""


def of_event(event: AnyEvent) -> Notice | None:
    """What a person should be told of an event; None if nothing, or if nobody knows who it was."""
    kind = _kind(event)
    if kind is None:
        return None
    said = event.unmapped.sekisho
    login = _known(said.login, LoginInfo)
    if login is None:
        return None
    medium = _known(said.medium, MediumInfo)
    return Notice(
        at_ms=event.time,
        uid=login.uid,
        kind=kind,
        severity=event.severity_id,
        medium=medium_text(medium) if medium is not None else "",
        key=medium.key if medium is not None else "",
        decision=medium.decision if medium is not None and medium.decision is not UNSET else "",
        limit=said.limit.name if said.limit is not UNSET else "",
        tty=login.tty if login.tty is not UNSET else "",
    )


def _kind(event: AnyEvent) -> Kind | None:
    code = event.code
    if code == "file.copied_out":
        return "copied" if event.severity_id >= HIGH else None
    if code == "file.brought_in":
        return "brought_in" if event.severity_id >= MEDIUM else None
    if code == "medium.unapproved":
        detail = event.unmapped.sekisho.detail
        return _stopped(event, detail) if detail is not UNSET and "act" in detail else "unapproved"
    if code == "file.written":
        return "refused_copy" if getattr(event, "action_id", UNSET) == _DENIED else None
    if code == "device.disguised":
        return "disguised"
    if code == "copy.staged":
        return "staged"
    return "limit" if code.startswith("copy.") else None


def _stopped(event: AnyEvent, detail: dict[str, Any]) -> Kind | None:
    """A medium that was kept from working: how, and whether because its approval ended."""
    if detail["act"] != "stopped":
        return None
    if "deauthorized" in detail.get("did", ()):
        return "refused_device"
    medium = _known(event.unmapped.sekisho.medium, MediumInfo)
    ended = medium is not None and medium.decision in ("expired", "revoked") and medium.mount is not UNSET
    return "refused_expired" if ended else "refused_mount"


def _known(part: Any, kind: type[Any]) -> Any:
    if part is UNSET:
        return None
    return msgspec.json.decode(part, type=kind) if isinstance(part, Raw) else part


class _Told(Struct):
    notice: Notice
    told_ms: int
    told_count: int


class Due(NamedTuple):
    """A notice to be delivered now; what is told under the same `about` later takes its place."""

    about: tuple[int, str, str]
    notice: Notice


class Notices:
    """`add` a notice, `due` what is to be said by now."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str, str], _Told] = {}
        self._waiting: set[tuple[int, str, str]] = set()

    def add(self, notice: Notice) -> Due | None:
        """Something happened: to be said now, or None if it is added to what was said a moment ago."""
        about = (notice.uid, notice.kind, notice.key or notice.limit)
        known = self._told.get(about)
        if known is None or not 0 <= notice.at_ms - known.notice.at_ms < CALM_MS:
            self._told.pop(about, None)
            self._told[about] = _Told(notice, notice.at_ms, notice.count)
            if len(self._told) > _MOST:
                gone = next(iter(self._told))
                del self._told[gone]
                self._waiting.discard(gone)
            return Due(about, notice)
        count, worst = known.notice.count + notice.count, max(known.notice.severity, notice.severity)
        known.notice = msgspec.structs.replace(notice, count=count, severity=worst, replaces=True)
        if 0 <= notice.at_ms - known.told_ms < UPDATE_MS:
            self._waiting.add(about)
            return None
        return self._again(about, known, notice.at_ms)

    def due(self, now_ms: int) -> list[Due]:
        """What grew since it was said, and may be said anew."""
        late = [about for about in self._waiting if not 0 <= now_ms - self._told[about].told_ms < UPDATE_MS]
        return [self._again(about, self._told[about], now_ms) for about in late]

    def _again(self, about: tuple[int, str, str], known: _Told, now_ms: int) -> Due:
        self._waiting.discard(about)
        known.told_ms, known.told_count = now_ms, known.notice.count
        return Due(about, known.notice)
