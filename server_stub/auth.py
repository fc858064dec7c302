"""Who asks, and may they: an agent by its signature, a program or person by a bearer token, the machine's own root.

Owns: the roles and what each may do, how tokens are made, hashed and compared, and the check of an agent's signed
request. A token is 256 random bits; only its SHA-256 is kept, so a stolen store holds no usable token.
Must not know: routes. Looks up tokens and keys through the store that is handed in.
"""

import hashlib
import secrets
from typing import Literal

from msgspec import Struct

from agent.contract import chain, wire
from server_stub.commit import Writer
from server_stub.refusal import Refusal
from server_stub.store import Store

Role = Literal["viewer", "reviewer", "admin", "auditor"]
ROLES: tuple[Role, ...] = ("viewer", "reviewer", "admin", "auditor")
ENROLL = "enroll"

MAY: dict[str, frozenset[str]] = {
    "read": frozenset(ROLES),
    "export": frozenset({"admin", "auditor"}),
    "erase": frozenset({"admin"}),
    "witness": frozenset({"admin", "auditor"}),
    "request": frozenset({"viewer", "reviewer", "admin"}),
    "register": frozenset({"reviewer", "admin"}),
    "bulk": frozenset({"admin"}),
    "tokens": frozenset({"admin"}),
}
"""What may be done → by which roles."""


class NotAllowed(Refusal):
    """`status` 401 (not known who asks) or 403 (known, but may not); the sentence says what to do."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Caller(Struct, frozen=True):
    """Who asks: a role, and the name that goes into records ("token 3f…", "local")."""

    role: str
    name: str
    token: str = ""


LOCAL = Caller("admin", "local administrator")
"""Whoever can open the 0600 socket or the store on the collector's own machine."""


def token_hash(token: str) -> bytes:
    """What is kept of a token. It has 256 random bits, so a plain SHA-256 can't be guessed back."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def bearer(authorization: str | None) -> str:
    """The token in an `Authorization: Bearer` header (RFC 6750). Raises NotAllowed."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotAllowed(401, "no token was sent; make one with: sekisho-collector token create --role viewer")
    return token.strip()


def caller(store: Store, token: str, now_ms: int) -> Caller:
    """Whose API token this is. Raises NotAllowed."""
    rows = store.rows("SELECT id, role, until, note FROM tokens WHERE hash = ?", (token_hash(token),))
    if not rows or rows[0][1] == ENROLL:
        raise NotAllowed(401, "this token is not known here; make one with: sekisho-collector token create --role viewer")
    name, role, until, note = rows[0]
    if until is not None and now_ms >= until:
        raise NotAllowed(401, "this token has expired; make a new one with: sekisho-collector token create")
    return Caller(role, f"token {note or name}", name)


def permit(who: Caller, act: str) -> None:
    """Raise NotAllowed unless the caller's role may do `act`."""
    if who.role not in MAY[act]:
        needed = " or ".join(sorted(MAY[act]))
        raise NotAllowed(403, f'the role "{who.role}" may not do this; ask with a token of the role {needed}')


def create_token(
    writer: Writer, role: str, *, note: str = "", until: int | None = None, uses: int | None = None
) -> tuple[str, str]:
    """Inside the writer: make a token; its id and the token itself, which is shown this once."""
    token, name = secrets.token_urlsafe(32), secrets.token_hex(4)
    while token.startswith("-"):  # a command line would take it for an option
        token = secrets.token_urlsafe(32)
    values = (name, token_hash(token), role, note, writer.now(), until, uses)
    writer.session.execute(
        "INSERT INTO tokens (id, hash, role, note, created_at, until, uses) VALUES (?, ?, ?, ?, ?, ?, ?)", values
    )
    return name, token


def enrol(writer: Writer, asked: wire.Enrol, key: bytes, fixed: str) -> str:
    """Inside the writer: admit an agent with its public `key`; its id. Raises NotAllowed.

    `fixed` is the configured `enroll_token`, if any. Whoever repeats an enrolment with the token and key it was done
    with (its answer may have been lost) is admitted again and uses up nothing.
    """
    agent, now = chain.agent_id(key), writer.now()
    by = "enroll_token"
    if not (fixed and secrets.compare_digest(token_hash(asked.token), token_hash(fixed))):
        sql = "SELECT id, until, uses, used FROM tokens WHERE hash = ? AND role = ?"
        rows = writer.session.execute(sql, (token_hash(asked.token), ENROLL))
        if not rows:
            raise NotAllowed(
                401, "this enrolment token is not known here; make one with: sekisho-collector token create --enroll"
            )
        by, until, uses, used = rows[0]
        again = writer.session.execute("SELECT 1 FROM agents WHERE agent = ? AND enrolled_by = ?", (agent, by))
        if until is not None and now >= until:
            raise NotAllowed(401, "this enrolment token has expired; make a new one with: token create --enroll")
        if uses is not None and used >= uses and not again:
            raise NotAllowed(401, "this enrolment token was used already; make a new one with: token create --enroll")
        if not again:
            writer.session.execute("UPDATE tokens SET used = used + 1 WHERE id = ?", (by,))
    writer.session.execute(
        "INSERT INTO agents (agent, key, name, enrolled_at, enrolled_by, last_seen) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (agent) DO UPDATE SET name = excluded.name, enrolled_by = excluded.enrolled_by",
        (agent, key, asked.name, now, by, now),
    )
    return agent


def check_request(public_key: bytes, target: str, agent: str, time_ms: str, *, sig: str, now_ms: int) -> None:
    """Raise NotAllowed unless an agent's signed GET is its own and of now."""
    if not time_ms.isdecimal() or len(time_ms) > 15:
        raise NotAllowed(401, "the header Sekisho-Time must be the time in milliseconds since 1970")
    off = int(time_ms) - now_ms
    if abs(off) > wire.MAX_SKEW_MS:
        raise NotAllowed(401, f"the request's time is {abs(off) // 1000} s off the collector's clock; set the machine's clock")
    try:
        chain.check(chain.request_bytes("GET", target, agent, time_ms), sig, public_key)
    except chain.NotWhole:
        raise NotAllowed(401, "the request is not signed by the key this agent enrolled with") from None
