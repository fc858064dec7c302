"""Administrators' requests: the register of media, and tokens.

Owns: what their bodies may say. Every change is made by one piece of work inside the writer, which also records who did
it. Must not know: what an approval means to an agent, how tokens are kept (`acts`, `auth`).
"""

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from agent.contract import wire
from server_stub import acts, auth
from server_stub.answers import Refused, answer, body_of, decoded
from server_stub.commit import Writer
from server_stub.door import SMALL_BODY, Door


class MediumAsked(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of PUT /v1/media/KEY: see wire.ApprovalEntry; times in ms."""

    owner: str
    approver: str
    purpose: str = ""
    since: int = 0
    until: int | None = None
    machines: list[str] = []
    dirs: list[str] = []
    read_only: bool = False
    revoked: bool = False
    reason: str = ""


class TokenAsked(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/tokens: a role, or "enroll"; `until` in ms."""

    role: str
    note: str = ""
    until: int | None = None
    uses: int | None = None


class AdminDoor(Door):
    """The handlers."""

    async def media(self, request: Request) -> Response:
        """GET /v1/media: every entry of the register, revoked ones too."""
        await self.caller(request, "read")
        body = msgspec.json.decode(self.c.register.body, type=wire.RegisterBody)
        return answer({"version": body.version, "media": [msgspec.to_builtins(entry) for entry in body.approvals]})

    async def medium(self, request: Request) -> Response:
        """GET /v1/media/KEY."""
        await self.caller(request, "read")
        body = msgspec.json.decode(self.c.register.body, type=wire.RegisterBody)
        for entry in body.approvals:
            if entry.key == request.path_params["key"]:
                return answer(entry)
        raise Refused(404, "this medium is not in the register")

    async def approve(self, request: Request) -> Response:
        """PUT /v1/media/KEY."""
        who = await self.caller(request, "register")
        asked: MediumAsked = decoded(await body_of(request, SMALL_BODY), MediumAsked)
        key, by = request.path_params["key"], self.by(request, who)
        if not 1 <= len(key) <= 255 or not asked.owner or not asked.approver:
            raise Refused(422, "an approval needs a medium's key, an owner and an approver")
        if asked.until is not None and asked.until <= (asked.since or self.c.now()):
            raise Refused(422, "the approval would end before it begins; give a later end")
        wanted = wire.ApprovalEntry(id="", key=key, **msgspec.structs.asdict(asked))
        entry, stored = await self.c.change(lambda writer: acts.approve(writer, wanted, by))
        self.c.take_register(stored)
        return answer(entry)

    async def revoke(self, request: Request) -> Response:
        """DELETE /v1/media/KEY?reason=TEXT."""
        who = await self.caller(request, "register")
        key, by, reason = request.path_params["key"], self.by(request, who), request.query_params.get("reason", "")
        if not reason or len(reason) > 1000:
            raise Refused(422, "say why: ?reason=TEXT, at most 1000 characters")
        entry, stored = await self.c.change(lambda writer: acts.revoke(writer, key, reason, by))
        self.c.take_register(stored)
        return answer(entry)

    async def tokens(self, request: Request) -> Response:
        """GET /v1/tokens: all but the tokens themselves."""
        await self.caller(request, "tokens")
        names = ("id", "role", "note", "created_at", "until", "uses", "used")
        rows = await self.c.rows(f"SELECT {', '.join(names)} FROM tokens ORDER BY created_at")  # noqa: S608 - constants
        return answer({"tokens": [dict(zip(names, row, strict=True)) for row in rows]})

    async def create_token(self, request: Request) -> Response:
        """POST /v1/tokens."""
        await self.caller(request, "tokens")
        asked: TokenAsked = decoded(await body_of(request, SMALL_BODY), TokenAsked)
        if asked.role not in (*auth.ROLES, auth.ENROLL):
            raise Refused(422, f"the roles are: {', '.join((*auth.ROLES, auth.ENROLL))}")
        if asked.uses is not None and (asked.uses < 1 or asked.role != auth.ENROLL):
            raise Refused(422, "only enrolment tokens are counted, and from 1 on")
        if asked.until is not None and asked.until <= self.c.now():
            raise Refused(422, "the token would have expired already; give a later end")

        def work(writer: Writer) -> tuple[str, str]:
            return auth.create_token(writer, asked.role, note=asked.note, until=asked.until, uses=asked.uses)

        name, token = await self.c.change(work)
        return answer({"id": name, "token": token}, 201)

    async def revoke_token(self, request: Request) -> Response:
        """DELETE /v1/tokens/ID."""
        await self.caller(request, "tokens")
        name = request.path_params["id"]
        gone = await self.c.change(
            lambda writer: writer.session.execute("DELETE FROM tokens WHERE id = ? RETURNING id", (name,))
        )
        if not gone:
            raise Refused(404, "no token has this id; see: sekisho-collector token list")
        return Response(status_code=204)
