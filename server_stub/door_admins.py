"""Administrators' requests: tokens.

Owns: what their bodies may say. Every change is made by one piece of work inside the writer. Must not know: how tokens are kept
(`auth`).
"""

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from server_stub import auth
from server_stub.answers import Refused, answer, body_of, decoded
from server_stub.commit import Writer
from server_stub.door import SMALL_BODY, Door


class TokenAsked(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/tokens: a role, or "enroll"; `until` in ms."""

    role: str
    note: str = ""
    until: int | None = None
    uses: int | None = None


class AdminDoor(Door):
    """The handlers."""

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
