"""The rules of the register of media: how an approval comes and goes, and who may not decide.

Question: may this be done to the register, and what stands in it afterwards? Owns: how one state follows the other, what may be
filled in, and the rules of people: nobody approves what is theirs or what they asked for. Each act takes a record and gives a
`Change` with before and after. Pure: ids, time and who acts are handed in. Must not know: SQL, HTTP, roles (who may is settled
before), how a record is kept.
"""

import unicodedata
from typing import Any

import msgspec
from msgspec import Struct

from server_stub.records import Approval, Change, Lost, Record, Wish, same_person, state_of
from server_stub.refusal import Refusal

MAX_TEXT, MAX_REASON, MAX_LIST = 200, 1000, 8000
MAX_TIME_MS = 253_402_300_800_000
"""10000-01-01, UTC."""
_KEPT_ENDED = 10
"""Approvals of one medium that ended (denied, revoked), kept in its record; the log has them all."""


class Ruled(Refusal):
    """The rules say no; `status` is HTTP's (404 not there, 409 not in this state, 412 changed meanwhile, 422 not allowed)."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Actor(Struct, frozen=True):
    """Who acts: the name they are known by. `may_record`: also what others decided, on paper (an administrator)."""

    name: str
    may_record: bool = False


# -- rules -----------------------------------------------------------------------------------------------------------------


def decider(given: str, actor: Actor) -> tuple[str, str]:
    """Who decided and, if that is somebody else, who recorded it. Raises Ruled."""
    if not given or same_person(given, actor.name):
        return actor.name, ""
    if not actor.may_record:
        raise Ruled(
            422,
            f'you are "{actor.name}" and decide in your own name; leave out the approver, or have an administrator record'
            " what was decided on paper",
        )
    return given, actor.name


def _two_people(approval: Approval, actor: Actor) -> None:
    if same_person(approval.owner, approval.approver):
        raise Ruled(422, f'"{approval.approver}" would approve a medium of their own; have somebody else approve it')
    if approval.recorded_by and same_person(approval.owner, actor.name):
        raise Ruled(422, f'"{actor.name}" would record an approval of a medium of their own; have somebody else record it')
    if same_person(approval.requester, approval.approver):
        raise Ruled(422, f'"{approval.approver}" asked for this approval; have somebody else decide')


def _clean(name: str, text: str, most: int = MAX_TEXT) -> str:
    text = text.strip()
    if len(text) > most:
        raise Ruled(422, f"{name}: is longer than {most} characters; shorten it")
    if any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in text):
        raise Ruled(422, f"{name}: holds a line break or a control character; write it in one line")
    return text


def _calendar(since: int, until: int | None) -> None:
    """Raise Ruled for times that no calendar has: an agent could not keep them."""
    for name, at in (("since", since), ("until", until or 0)):
        if not 0 <= at < MAX_TIME_MS:
            raise Ruled(422, f"{name}: is no time of this calendar; write milliseconds since 1970, before the year 10000")


def _filled(approval: Approval, wish: Wish, now_ms: int) -> Approval:
    """`approval` with what `wish` says. Raises Ruled."""
    said: dict[str, Any] = {}
    for name, most in (("owner", MAX_TEXT), ("department", MAX_TEXT), ("purpose", MAX_REASON)):
        if (text := getattr(wish, name)) is not None:
            said[name] = _clean(name, text, most)
    for name in ("machines", "dirs"):
        if (many := getattr(wish, name)) is not None:
            said[name] = list(dict.fromkeys(filter(None, (_clean(name, each, 4096) for each in many))))
            if sum(map(len, said[name])) > MAX_LIST:
                raise Ruled(422, f"{name}: are more than {MAX_LIST} characters together; name a group of machines instead")
    said |= {name: got for name in ("read_only", "once", "since", "until") if (got := getattr(wish, name)) is not None}
    made = msgspec.structs.replace(approval, **said)
    _calendar(made.since, made.until)
    if not made.owner:
        raise Ruled(422, "owner: is missing; say who may use the medium")
    if made.until is not None and made.until <= (made.since or now_ms):
        raise Ruled(422, "until: the approval would end before it begins; give a later end")
    return made


def valid_key(key: str) -> str:
    """A medium's key as it may stand in the register. Raises Ruled."""
    if not _clean("key", key, 255):
        raise Ruled(422, "key: an approval needs a medium's key; events carry it, and `sekisho-agent media` shows it")
    return key.strip()


def held_at(record: Record, revision: int | None) -> None:
    """Raise Ruled unless the record is as whoever acts has seen it (`revision`; None: they did not say)."""
    if revision is not None and revision != record.revision:
        raise Ruled(
            412,
            f"the medium {record.key} was changed meanwhile (it is at version {record.revision}, you saw {revision});"
            " look at it again",
        )


def _found(record: Record, id: str) -> Approval:
    for each in record.approvals:
        if each.id == id:
            return each
    raise Ruled(404, f'the medium {record.key} has no approval "{id}"; see: sekisho-collector media list')


def _changed(record: Record, approvals: list[Approval], **more: Any) -> Record:
    ended = [each.id for each in approvals if each.state in ("denied", "revoked")]
    dropped = set(ended[:-_KEPT_ENDED])
    kept = [each for each in approvals if each.id not in dropped]
    return msgspec.structs.replace(record, approvals=kept, revision=record.revision + 1, **more)


def _with(record: Record, approval: Approval) -> list[Approval]:
    """The approvals with this one in the place of the one of its id, or at the end."""
    there = [approval if each.id == approval.id else each for each in record.approvals]
    return there if any(each is approval for each in there) else [*there, approval]


def _not_lost(record: Record) -> None:
    if record.lost is not None:
        raise Ruled(409, f"the medium {record.key} was reported lost ({record.lost.reason}); if it was found: media found KEY")


# -- acts ------------------------------------------------------------------------------------------------------------------


def request(record: Record, id: str, wish: Wish, actor: Actor, now_ms: int) -> Change:
    """Somebody asks for an approval. Raises Ruled."""
    _not_lost(record)
    requester, recorded_by = decider(_clean("requester", wish.requester), actor)
    for each in record.approvals:
        if each.state == "requested" and same_person(each.requester, requester):
            raise Ruled(
                409, f'"{requester}" asked for the medium {record.key} already (request {each.id}); wait for the answer'
            )
    asked = Approval(id=id, state="requested", requester=requester, recorded_by=recorded_by, asked_at=now_ms)
    if wish.owner is None:
        wish.owner = requester
    asked = _filled(asked, wish, now_ms)
    return Change(
        record=_changed(record, [*record.approvals, asked]),
        operation="media.request",
        message=f"{actor.name} asked for an approval of the medium {record.key}",
        after=asked,
    )


def approve_request(record: Record, id: str, wish: Wish, actor: Actor, now_ms: int) -> Change:
    """A request is granted, as asked or with what `wish` says otherwise. Raises Ruled."""
    _not_lost(record)
    asked = _found(record, id)
    if asked.state != "requested":
        by = f' by "{asked.approver}"' if asked.approver else ""
        raise Ruled(409, f"request {id} was decided already: {asked.state}{by}; see: media history {record.key}")
    approver, recorded_by = decider(_clean("approver", wish.approver), actor)
    made = _filled(asked, wish, now_ms)
    made = msgspec.structs.replace(
        made,
        state="approved", approver=approver, recorded_by=recorded_by, decided_at=now_ms, since=made.since or now_ms, reason="",
    )  # fmt: skip
    _two_people(made, actor)
    return Change(
        record=_changed(record, _with(record, made)),
        operation="media.approve",
        message=f"{actor.name} approved the medium {record.key}, as {made.requester} asked",
        before=asked,
        after=made,
    )


def approve(record: Record, id: str, wish: Wish, actor: Actor, now_ms: int, *, beside: bool = False) -> Change:
    """Approve a medium, in place of what stood for it (open requests stay), or `beside` that. Raises Ruled."""
    _not_lost(record)
    approver, recorded_by = decider(_clean("approver", wish.approver), actor)
    made = Approval(
        id=id, approver=approver, recorded_by=recorded_by, decided_at=now_ms, requester=_clean("requester", wish.requester)
    )
    made = _filled(made, wish, now_ms)
    made.since = made.since or now_ms
    _two_people(made, actor)
    stay = [each for each in record.approvals if beside or each.state == "requested"]
    before = next((each for each in reversed(record.approvals) if each not in stay), None)
    return Change(
        record=_changed(record, [*stay, made]),
        operation="media.approve",
        message=f"{actor.name} put the medium {record.key} in the register",
        before=before,
        after=made,
    )


def deny(record: Record, id: str, reason: str, actor: Actor, now_ms: int) -> Change:
    """A request is refused. Raises Ruled."""
    asked = _found(record, id)
    if asked.state != "requested":
        raise Ruled(409, f"request {id} was decided already: {asked.state}; see: media history {record.key}")
    reason = _reason(reason)
    made = msgspec.structs.replace(asked, state="denied", approver=actor.name, reason=reason, decided_at=now_ms)
    message = f"{actor.name} denied the request for the medium {record.key}"
    return Change(
        record=_changed(record, _with(record, made)), operation="media.deny", message=message, before=asked, after=made
    )


def revoke(record: Record, reason: str, actor: Actor, now_ms: int, *, id: str = "") -> Change:
    """Take back an approval, or all of the medium's. Raises Ruled."""
    reason = _reason(reason)
    if id and _found(record, id).state != "approved":
        raise Ruled(409, f"{id} is no approval in force; see: media list")
    gone = [each for each in record.approvals if (each.id == id if id else each.state == "approved")]
    if not gone and not any(each.state == "revoked" for each in record.approvals):
        raise Ruled(404, f'no medium "{record.key}" with an approval is in the register; see: sekisho-collector media list')
    gone = gone or [each for each in record.approvals if each.state == "revoked"]
    ids = {each.id for each in gone}
    ended = [
        msgspec.structs.replace(each, state="revoked", reason=reason, decided_at=now_ms) if each.id in ids else each
        for each in record.approvals
    ]
    after = next(each for each in reversed(ended) if each.id in ids)
    return Change(
        record=_changed(record, ended),
        operation="media.revoke",
        message=f"{actor.name} revoked the medium {record.key}",
        before=_found(record, after.id),
        after=after,
    )


def lost(record: Record, reason: str, actor: Actor, now_ms: int) -> Change:
    """The medium was lost: from now on it is a finding wherever it turns up. Raises Ruled."""
    if record.lost is not None:
        raise Ruled(409, f"the medium {record.key} was reported lost already, by {record.lost.by}")
    made = _changed(record, record.approvals, lost=Lost(now_ms, actor.name, _reason(reason)))
    message = f"{actor.name} reported the medium {record.key} lost"
    newest = record.approvals[-1] if record.approvals else None
    return Change(record=made, operation="media.lost", message=message, before=newest, after=newest)


def found(record: Record, reason: str, actor: Actor, now_ms: int) -> Change:
    """A lost medium was found. Its approvals stay taken back: what was on it meanwhile nobody knows. Raises Ruled."""
    if record.lost is None:
        raise Ruled(409, f"the medium {record.key} was not reported lost")
    reason = _reason(reason)
    ended = [
        msgspec.structs.replace(each, state="revoked", reason=record.lost.reason) if each.state == "approved" else each
        for each in record.approvals
    ]
    made = _changed(record, ended, lost=None)
    newest, before = ended[-1] if ended else None, record.approvals[-1] if ended else None
    message = f"{actor.name} says that the medium {record.key} was found: {reason}"
    return Change(record=made, operation="media.found", message=message, before=before, after=newest)


def used(record: Record, id: str, agent: str, machine: str, now_ms: int) -> Change | None:
    """An agent saw the medium plugged in with this approval: a one-time pass is used up. None if it is none, or was before."""
    passed = next((each for each in record.approvals if each.id == id and each.once and not each.used_by), None)
    if passed is None:
        return None
    after = msgspec.structs.replace(passed, used_by=agent, used_at=now_ms)
    message = f"the one-time pass for the medium {record.key} was used up on {machine}"
    return Change(
        record=_changed(record, _with(record, after)), operation="media.used", message=message, before=passed, after=after
    )


def ending(record: Record, now_ms: int, warn_ms: int) -> Change | None:
    """An approval that is about to end, or ended, and of which that is not on record yet."""
    for each in record.approvals:
        state = state_of(record, each, now_ms, warn_ms)
        if state in ("expiring", "expired") and each.told != state:
            after = msgspec.structs.replace(each, told=state)
            what = "ends soon" if state == "expiring" else "ended"
            message = f"the approval of the medium {record.key} for {each.owner} {what}"
            return Change(
                record=_changed(record, _with(record, after)),
                operation=f"media.{state}",
                message=message,
                before=each,
                after=after,
            )
    return None


def _reason(text: str) -> str:
    if not (text := _clean("reason", text, MAX_REASON)):
        raise Ruled(422, "say why: a reason of at most 1000 characters")
    return text


def entered(held: Approval | None, row: Any, actor: Actor, now_ms: int, id: str) -> Approval:
    """An approval as a row of a list says (`bulk.Row`), in the place of `held`. The same rules of people hold. Raises Ruled."""
    made = held or Approval(id=id, state=row.state)
    wish = Wish(
        owner=row.owner, department=row.department, purpose=row.purpose, machines=row.machines, dirs=row.dirs,
        read_only=row.read_only, once=row.once, since=row.since or made.since,
    )  # fmt: skip
    made = _filled(made, wish, now_ms)
    _calendar(made.since, row.until)
    if row.until is not None and row.until <= made.since:
        raise Ruled(422, "until: the approval would end before it begins; give a later end")
    approver, recorded_by = "", actor.name
    if row.state != "requested":
        if not row.approver:
            raise Ruled(422, "approver: is missing; say who approved it")
        approver, recorded_by = decider(_clean("approver", row.approver), actor)
    requester, reason = _clean("requester", row.requester), _clean("reason", row.reason, MAX_REASON)
    since = made.since or (now_ms if row.state != "requested" else 0)
    made = msgspec.structs.replace(
        made, until=row.until, since=since, approver=approver, requester=requester, state=row.state, reason=reason,
        recorded_by=made.recorded_by if held and held.approver == approver else recorded_by,
        decided_at=made.decided_at or now_ms, told="" if held and held.until != row.until else made.told,
    )  # fmt: skip
    if row.state == "approved":
        _two_people(made, actor)
    return made


def changed(record: Record, approval: Approval) -> Record:
    """The record with this approval in the place of the one of its id, or besides."""
    return _changed(record, _with(record, approval))
