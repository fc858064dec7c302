"""Requests about the register of media: who asks for an approval, who gives it, who takes it back; lists, groups, codes.

Owns: what their bodies may say, which role may do which act, and the version of a medium's record as an ETag (RFC 9110), so
that two who decide at once do not overwrite each other. Every change is one piece of work inside the writer, which also
records who did it. Must not know: the rules (`rulebook`), how a record is kept (`ledger`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from server_stub import acts, auth, bulk, ledger, query, rulebook
from server_stub.answers import Refused, answer, body_of, decoded
from server_stub.door import SMALL_BODY, Door
from server_stub.records import STATES, Approval, Change, Record, Wish, same_person, state_of
from server_stub.rulebook import Actor

BULK_BODY = 4 << 20
MAX_ROWS = 1_000
"""Rows of one list, at most, so that the writer is not kept from events for long; the command line sends several."""


class _Wished(Struct, kw_only=True, forbid_unknown_fields=True):
    """What may be filled in. Times in ms."""

    owner: str | None = None
    department: str | None = None
    purpose: str | None = None
    machines: list[str] | None = None
    dirs: list[str] | None = None
    read_only: bool | None = None
    once: bool | None = None
    since: int | None = None
    until: int | None = None
    requester: str = ""
    approver: str = ""

    def wish(self) -> Wish:
        """For the rules."""
        return msgspec.convert(self, Wish, from_attributes=True)


class MediumAsked(_Wished, kw_only=True, forbid_unknown_fields=True):
    """Body of PUT /v1/media/KEY. `beside`: do not replace what stands for it."""

    beside: bool = False


class _Act(_Wished, kw_only=True, forbid_unknown_fields=True, tag_field="act"):
    """Body of POST /v1/media: `key` or `from_event` name the medium, `id` the request; `version`: the record's, as seen."""

    key: str = ""
    from_event: str = ""
    id: str = ""
    version: int | None = None
    reason: str = ""


class Ask(_Act, tag="request"):
    """Ask for an approval."""


class Grant(_Act, tag="approve"):
    """Grant the request `id`."""


class Deny(_Act, tag="deny"):
    """Refuse the request `id`."""


class Revoke(_Act, tag="revoke"):
    """Take back the approval `id`, or all of the medium's."""


class Lose(_Act, tag="lost"):
    """Report the medium lost."""


class Find(_Act, tag="found"):
    """Say that it was found."""


class Unlock(_Act, tag="unlock"):
    """Make a break-glass code for `machine`, a name or agent id, for `for_ms`."""

    machine: str = ""
    for_ms: int = 0


class Load(Struct, tag="import", tag_field="act", kw_only=True, forbid_unknown_fields=True):
    """Put a list into the register, or only say what that would change."""

    rows: list[bulk.Row]
    dry_run: bool = False


Acts: Any = Ask | Grant | Deny | Revoke | Lose | Find | Unlock | Load
_MAY: dict[type[Any], str] = {Ask: "request", Load: "bulk"}


class GroupAsked(Struct, forbid_unknown_fields=True):
    """Body of PUT /v1/groups/NAME."""

    machines: list[str]


class RegisterDoor(Door):
    """The handlers."""

    def _actor(self, who: auth.Caller, by: acts.By) -> Actor:
        """Under which name people know who acts: of a token, what it was made for."""
        return Actor(by.name if by.person else by.name.removeprefix("token "), who.role == "admin")

    def _view(self, record: Record, each: Approval) -> dict[str, Any]:
        """One approval as readers get it: with its medium, its state as of now, and whether it still counts."""
        state = state_of(record, each, self.c.now(), self.c.settings.expiring_ms)
        more = {"reason": record.lost.reason} if state == "lost" and record.lost else {}
        gone = {"revoked": True} if state in ("revoked", "lost") else {}
        return {"key": record.key, **msgspec.to_builtins(each), "state": state, "version": record.revision, **more, **gone}

    async def media(self, request: Request) -> Response:
        """GET /v1/media: approvals and requests, filtered."""
        await self.caller(request, "read")
        held = await self.c.reading(lambda: ledger.records(self.c.store.rows))
        wanted = _Wanted(request.query_params)
        rows = [row for record in held for row in self._rows(record) if wanted.fits(row, self.c.now())]
        return answer({"version": self.c.register_version, "media": rows})

    def _rows(self, record: Record) -> list[dict[str, Any]]:
        rows = [self._view(record, each) for each in record.approvals]
        if record.lost is not None and not rows:
            rows = [{"key": record.key, "state": "lost", "reason": record.lost.reason, "version": record.revision, "id": ""}]
        return rows

    async def medium(self, request: Request) -> Response:
        """GET /v1/media/KEY: the newest approval, and all of them."""
        await self.caller(request, "read")
        key = request.path_params["key"]
        record = await self.c.reading(lambda: ledger.record(self.c.store.rows, key))
        rows = self._rows(record)
        if not rows:
            raise Refused(404, "this medium is not in the register")
        return _tagged(record, {**rows[-1], "approvals": rows})

    async def approve(self, request: Request) -> Response:
        """PUT /v1/media/KEY."""
        who = await self.caller(request, "register")
        asked: MediumAsked = decoded(await body_of(request, SMALL_BODY), MediumAsked)
        by, seen = self.by(request, who), _if_match(request)
        actor, wish = self._actor(who, by), asked.wish()

        def act(record: Record, now_ms: int) -> Change:
            return rulebook.approve(record, ledger.new_id(), wish, actor, now_ms, beside=asked.beside)

        return await self._done(request.path_params["key"], seen, by, act)

    async def revoke(self, request: Request) -> Response:
        """DELETE /v1/media/KEY?reason=TEXT."""
        who = await self.caller(request, "register")
        by, reason = self.by(request, who), request.query_params.get("reason", "")
        actor, id = self._actor(who, by), request.query_params.get("id", "")
        act = _later(rulebook.revoke, reason, actor, id=id)
        return await self._done(request.path_params["key"], _if_match(request), by, act)

    async def act(self, request: Request) -> Response:
        """POST /v1/media: what is done to the register but putting and deleting."""
        who = await self.caller(request, "request")
        asked: Any = decoded(await body_of(request, BULK_BODY), Acts)
        auth.permit(who, _MAY.get(type(asked), "register"))
        by = self.by(request, who)
        actor = self._actor(who, by)
        if isinstance(asked, Load):
            return await self._load(asked, actor, by)
        if asked.from_event:
            asked.key = await self._key_of(asked.from_event)
        if asked.id and not asked.key:
            held = await self.c.reading(lambda: ledger.record_of_request(self.c.store.rows, asked.id))
            asked.key = held.key
        if isinstance(asked, Unlock):
            return await self._unlock(asked, by)
        return await self._done(asked.key, asked.version, by, self._rule(asked, actor))

    def _rule(self, asked: Any, actor: Actor) -> ledger.Act:
        """The rule that an act follows."""
        wish = asked.wish()
        match asked:
            case Ask():
                id = ledger.new_id()
                return lambda record, now: rulebook.request(record, id, wish, actor, now)
            case Grant():
                return lambda record, now: rulebook.approve_request(record, asked.id, wish, actor, now)
            case Deny():
                return lambda record, now: rulebook.deny(record, asked.id, asked.reason, actor, now)
            case Revoke():
                return lambda record, now: rulebook.revoke(record, asked.reason, actor, now, id=asked.id)
            case Lose():
                return lambda record, now: rulebook.lost(record, asked.reason, actor, now)
            case _:
                return lambda record, now: rulebook.found(record, asked.reason, actor, now)

    async def _done(self, key: str, seen: int | None, by: acts.By, act: ledger.Act) -> Response:
        done, stored = await self.c.change(lambda writer: ledger.change(writer, key, seen, by, act))
        self.c.take_register(stored)
        view = self._view(done.record, done.after) if done.after else self._rows(done.record)[-1:] or [{"key": key}]
        return _tagged(done.record, view[0] if isinstance(view, list) else view)

    async def _key_of(self, uid: str) -> str:
        found = await self.c.rows("SELECT raw FROM events WHERE uid = ?", (query.uid_key(uid),))
        if not found:
            raise Refused(404, f'there is no event "{uid[:64]}" here; take the uid from: sekisho-collector query -o json')
        event = msgspec.json.decode(bytes(found[0][0]))
        key = event.get("unmapped", {}).get("sekisho", {}).get("medium", {}).get("key")
        if not key:
            raise Refused(422, "that event is about no medium; take one like medium.attached or file.copied_out")
        return str(key)

    async def _load(self, asked: Load, actor: Actor, by: acts.By) -> Response:
        if len(asked.rows) > MAX_ROWS:
            raise Refused(413, f"more than {MAX_ROWS} rows at once; send them in parts")
        if asked.dry_run:
            told, _ = await self.c.reading(lambda: ledger.plan(self.c.store.rows, asked.rows, actor, self.c.now()))
        else:
            told, stored = await self.c.change(lambda writer: ledger.load(writer, asked.rows, actor, by), len(asked.rows))
            self.c.take_register(stored)
        return answer({"rows": told})

    async def _unlock(self, asked: Unlock, by: acts.By) -> Response:
        named = [agent for agent, it in self.c.agents.items() if asked.machine in (agent, it.name)]
        if len(named) != 1:
            why = "no machine has" if not named else "more than one machine has"
            raise Refused(404, f'{why} the name "{asked.machine[:64]}"; take the id that sekisho-collector agents shows')
        if not asked.reason:
            raise Refused(422, "say why a code is needed: --reason TEXT")
        machine = (named[0], self.c.agents[named[0]].key, self.c.agents[named[0]].name)
        read_only = bool(asked.read_only)
        code, made = await self.c.change(
            lambda writer: ledger.unlock_code(writer, asked.key, machine, asked.for_ms, asked.reason, by, read_only=read_only)
        )
        return answer({"code": code, "id": made.id, "key": made.key, "agent": named[0], "until": made.until_ms}, 201)

    async def groups(self, request: Request) -> Response:
        """GET /v1/groups: machines by the name of their group."""
        await self.caller(request, "read")
        return answer({"groups": await self.c.reading(lambda: ledger.groups(self.c.store.rows))})

    async def put_group(self, request: Request) -> Response:
        """PUT /v1/groups/NAME."""
        who = await self.caller(request, "bulk")
        asked: GroupAsked = decoded(await body_of(request, BULK_BODY), GroupAsked)
        return await self._group(request, who, asked.machines)

    async def drop_group(self, request: Request) -> Response:
        """DELETE /v1/groups/NAME."""
        return await self._group(request, await self.caller(request, "bulk"), None)

    async def _group(self, request: Request, who: auth.Caller, machines: list[str] | None) -> Response:
        name, by = request.path_params["name"], self.by(request, who)
        self.c.take_register(await self.c.change(lambda writer: ledger.set_group(writer, name, machines, by)))
        return answer({"name": name, "machines": machines or []})


def _later(rule: Callable[..., Change], *given: Any, **more: Any) -> ledger.Act:
    return lambda record, now: rule(record, *given, now, **more)


def _if_match(request: Request) -> int | None:
    """The version that the caller has seen; None if any will do (RFC 9110, 13.1.1)."""
    text = request.headers.get("if-match", "*").strip()
    if text == "*":
        return None
    found = re.fullmatch(r'"?(\d{1,15})"?', text)
    if not found:
        raise Refused(400, 'If-Match takes the ETag of GET /v1/media/KEY, like "3"')
    return int(found[1])


def _tagged(record: Record, value: Any) -> Response:
    made = answer(value)
    made.headers["ETag"] = f'"{record.revision}"'
    return made


class _Wanted:
    """Filters of GET /v1/media: `state`, `owner`, `department`, `requester`, `approver`, `machine`, `key` (its beginning),
    `within` (approvals in force that end within so many ms)."""

    def __init__(self, params: Mapping[str, str]) -> None:
        self.params = params
        self.state = params.get("state", "")
        if self.state and self.state not in STATES:
            raise Refused(400, f"the states are: {', '.join(STATES)}")
        self.within = query.parse_number(params.get("within"), "within", 0, 0, 1 << 45)

    def fits(self, row: Mapping[str, Any], now_ms: int) -> bool:
        """Whether a row is wanted."""
        for name in ("owner", "department", "requester", "approver"):
            if (text := self.params.get(name)) and not same_person(str(row.get(name, "")), text):
                return False
        if self.state and row["state"] != self.state and not (self.state == "approved" and row["state"] == "expiring"):
            return False
        machine = self.params.get("machine")
        if machine and row.get("machines") and machine not in row["machines"]:
            return False
        if self.within:
            until = row.get("until")
            in_force = row["state"] in ("approved", "expiring")
            if not in_force or until is None or not now_ms <= until < now_ms + self.within:
                return False
        return str(row["key"]).startswith(self.params.get("key", ""))
