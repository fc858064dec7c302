"""Answers, and what a request's body may be: every error is RFC 9457 `application/problem+json`, of one shape.

Owns: the table from errors to status codes, reading a body within its limits of size and time, and decoding it. A body
is refused as soon as it is known to be too large: by its announcement, or at the byte that exceeds the limit; the
connection is then closed, so that the rest is never read. Must not know: routes, or what a request asks for.
"""

import asyncio
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from agent.contract import wire
from server_stub import auth, intake, query, rulebook, witness
from server_stub.commit import Busy, Conflict
from server_stub.refusal import Refusal
from server_stub.store import StoreError

BODY_TIMEOUT_S = 60.0


class Refused(Exception):
    """An answer that is a problem."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, headers or {}, more


_TITLES = {
    400: "Bad request", 401: "Not authenticated", 403: "Not allowed", 404: "Not found", 405: "Method not allowed",
    408: "Too slow", 409: "Conflict", 412: "Changed meanwhile", 413: "Too large", 415: "Unsupported encoding",
    422: "Not acceptable as sent",
    429: "Too many at once", 500: "Internal error", 503: "Not ready",
}  # fmt: skip


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """RFC 9457 problem details."""
    body = msgspec.json.encode(wire.Problem(title=_TITLES.get(status, "Error"), status=status, detail=detail, **more))
    return Response(body, status, headers, "application/problem+json")


def answer(value: Any, status: int = 200) -> Response:
    """JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def refusal(error: Exception) -> Response:
    """Every error that a handler may let through → its problem."""
    if isinstance(error, Refused):
        return problem(error.status, error.detail, error.headers, **error.more)
    if isinstance(error, witness.Refused):
        if error.status == 409:  # C2SP tlog-witness wants the bare size
            return Response(f"{error.size}\n", 409, media_type="text/x.tlog.size")
        return problem(error.status, error.why)
    if isinstance(error, auth.NotAllowed):
        return problem(error.status, str(error), {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)
    if isinstance(error, Conflict):
        words = "events before these are missing here" if error.reason == "hole" else "this is not the chain that is held here"
        more: dict[str, Any] = {"reason": error.reason, "epoch": error.epoch, "expected": error.expected, "hash": error.hash}
        return problem(409, f"{words}; send from seq {error.expected} on", **more)
    if isinstance(error, intake.Bad):
        return problem(error.status, error.why)
    if isinstance(error, rulebook.Ruled):
        return problem(error.status, error.why)
    if isinstance(error, Busy | StoreError):
        return problem(503, str(error), {"Retry-After": "2"})
    if isinstance(error, query.BadQuery):
        return problem(400, str(error))
    raise error


def on_http(_request: Request, error: Exception) -> Response:
    """What the router refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    details = {404: "there is nothing at this path", 405: "this path does not take that method"}
    return problem(error.status_code, details.get(error.status_code, str(error.detail)), dict(error.headers or {}))


def on_crash(_request: Request, _error: Exception) -> Response:
    """A fault of ours; the traceback goes to the log, not to the client."""
    return problem(500, "the collector failed on this request; its log says more")


async def body_of(request: Request, limit: int) -> bytes:
    """The request's body. Raises Refused: 413 as soon as it is known to exceed `limit`, 408 if it comes too slowly."""
    too_large = Refused(413, f"the body is larger than {limit} bytes; send less at once", {"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refused(400, "the body ended early") from None
    return b"".join(parts)


def decoded(body: bytes, kind: type[Any]) -> Any:
    """A JSON body as `kind`. Raises Refused 422."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Refused(422, f"the body is not as it must be: {error}") from None


REFUSALS = (Refused, Refusal, witness.Refused, intake.Bad, Busy, StoreError, query.BadQuery)
"""What a handler may raise: `refusal` has an answer to each."""
