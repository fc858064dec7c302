"""The routes. A handler is: parse, call, answer.

Owns: paths, methods, headers, parameters, how many requests of one agent may be under way, and which route asks for
which right.
Must not know: how batches are judged (`intake`), kept (`commit`), queried (`query`), or how anything is signed.
The same routes serve the network, the local socket (`local=True`: whoever can open it is the administrator), and the
command line working directly on the store.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import unquote

import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from agent.contract import wire
from server_stub import acts, auth, fleet, intake, pages, query, tail, tree
from server_stub.answers import REFUSALS, Refused, answer, body_of, decoded, on_crash, on_http, refusal
from server_stub.collector import Collector
from server_stub.commit import Busy, Conflict, Writer
from server_stub.store import StoreError

SMALL_BODY = 64 << 10
POLL_S = 30.0
IN_FLIGHT_AGENT = 4
IN_FLIGHT_ADDRESS = 64
NDJSON = "application/x-ndjson"
"""Bodies being received or judged at once from one agent at one address, and from one address."""

Handler = Callable[[Request], Awaitable[Response]]


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


class Routes:
    """The handlers, over one collector."""

    def __init__(self, collector: Collector, local: bool) -> None:
        self.c, self.local = collector, local

    # Who asks.

    async def caller(self, request: Request, act: str) -> auth.Caller:
        """Who asks, once it is clear that they may `act`."""
        if self.local:
            return auth.LOCAL
        token = auth.bearer(request.headers.get("authorization"))
        who = await self.c.reading(lambda: auth.caller(self.c.store, token, self.c.now()))
        auth.permit(who, act)
        return who

    def by(self, request: Request, who: auth.Caller) -> acts.By:
        """Who acts, for the record. On the local socket the command line says which login user it works for."""
        if not self.local:
            return acts.By(who.name, False, request.client.host if request.client else "unknown")
        person = unquote(request.headers.get("sekisho-person", ""))[:64]
        return acts.By(person or who.name, bool(person), "localhost")

    # Agents.

    async def enroll(self, request: Request) -> Response:
        """POST /v1/enroll."""
        asked: wire.Enrol = decoded(await body_of(request, SMALL_BODY), wire.Enrol)
        try:
            key = base64.b64decode(asked.key, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) != 32 or not 1 <= len(asked.name) <= 255:
            raise Refused(422, "an enrolment needs a name and an Ed25519 public key in base64")
        agent = await self.c.enrol(asked, key)
        register = msgspec.Raw(msgspec.json.encode(self.c.register))
        return answer(wire.Enrolled(agent, base64.b64encode(bytes(self.c.key.verify_key)).decode(), register))

    def _agent(self, request: Request) -> tuple[str, bytes]:
        agent = request.headers.get("sekisho-agent", "")
        known = self.c.agents.get(agent)
        if known is None:
            why = "the header Sekisho-Agent is missing" if not agent else "this agent is not known here"
            raise Refused(401, f"{why}; enrol it with: sekisho-agent enroll URL --token TOKEN", {"Connection": "close"})
        return agent, known.key

    async def batches(self, request: Request) -> Response:
        """POST /v1/batches."""
        agent, key = self._agent(request)
        encoding = request.headers.get("content-encoding", "gzip").lower()
        if encoding not in ("gzip", "identity"):
            raise Refused(415, f'the encoding "{encoding[:20]}" is not known; send gzip', {"Connection": "close"})
        address = request.client.host if request.client else "local"
        mine = f"{agent} {address}"
        flying = self.c.in_flight
        if flying.get(mine, 0) >= IN_FLIGHT_AGENT or flying.get(address, 0) >= IN_FLIGHT_ADDRESS:
            self.c.batches["busy"] += 1
            raise Refused(429, "too many batches of this agent are on their way", {"Retry-After": "1", "Connection": "close"})
        for name in (mine, address):
            flying[name] = flying.get(name, 0) + 1
        try:
            body = await body_of(request, wire.MAX_BODY_BYTES)
            packed = encoding == "gzip" and body[:1] == b"\x1f"
            batch = await self.c.loop.run_in_executor(self.c.verifiers, intake.examine, body, packed, agent, key)
            result, receipt = await self.c.change(lambda writer: writer.take(batch), len(batch.rows))
            self.c.heard(agent)
            self.c.batches[result if batch.rows else "heartbeat"] += 1
            signed = await self.c.loop.run_in_executor(self.c.verifiers, self.c.writer.signed, receipt)
            return answer(signed)
        except Conflict as conflict:
            self.c.heard(agent)
            self.c.batches[conflict.reason] += 1
            raise
        except Busy:
            self.c.batches["busy"] += 1
            raise
        except (intake.Bad, Refused):
            self.c.batches["bad"] += 1
            raise
        finally:
            for name in (mine, address):
                flying[name] -= 1
                if not flying[name]:
                    del flying[name]

    async def register(self, request: Request) -> Response:
        """GET /v1/register?after=VERSION: 200 once newer, 204 if not within POLL_S."""
        agent, key = self._agent(request)
        after = query.parse_number(request.query_params.get("after"), "after", 0, 0, 1 << 53)
        target = request.scope["raw_path"].decode("ascii")
        if request.scope["query_string"]:
            target += "?" + request.scope["query_string"].decode("ascii", "replace")
        head = request.headers
        time_ms, sig = head.get("sekisho-time", ""), head.get("sekisho-signature", "")
        auth.check_request(key, target, agent, time_ms, sig=sig, now_ms=self.c.now())
        deadline = self.c.loop.time() + POLL_S
        while True:
            rung = self.c.register_bell.next()
            if self.c.register_version > after:
                return answer(self.c.register)
            left = deadline - self.c.loop.time()
            if self.c.stopping or left <= 0 or not await tail.Bell.wait(rung, left):
                return Response(status_code=204)

    # Events.

    def _filter(self, request: Request) -> query.Filter:
        return query.parse(request.query_params, self.c.now(), None)

    async def events(self, request: Request) -> Response:
        """GET /v1/events."""
        await self.caller(request, "read")
        wanted, params = self._filter(request), request.query_params
        order = params.get("order") or "asc"
        if order not in ("asc", "desc"):
            raise query.BadQuery('"order" must be asc or desc')
        after = query.parse_number(params["after"], "after", 0, 0, 1 << 53) if params.get("after") else None
        if NDJSON in request.headers.get("accept", ""):
            limit = query.parse_number(params.get("limit"), "limit", 1 << 53, 1, 1 << 53)
            return StreamingResponse(self._all(wanted, after, order == "desc", limit), media_type=NDJSON)
        limit = query.parse_number(params.get("limit"), "limit", query.DEFAULT_LIMIT, 1, query.MAX_LIMIT)
        sql, values = query.sql(wanted, after=after, descending=order == "desc", limit=limit + 1)
        rows = await self.c.rows(sql, values)
        cursor = f'"{rows[limit - 1][0]}"' if len(rows) > limit else "null"
        body = b'{"events":[%s],"next":%s}' % (b",".join(raw for _, raw in rows[:limit]), cursor.encode())
        return Response(body, media_type="application/json")

    async def _all(self, wanted: query.Filter, after: int | None, descending: bool, limit: int) -> AsyncIterator[bytes]:
        while limit > 0:
            page = min(limit, 1000)
            rows = await self.c.rows(*query.sql(wanted, after=after, descending=descending, limit=page))
            if rows:
                yield b"".join(raw + b"\n" for _, raw in rows)
                after = rows[-1][0]
            limit = limit - len(rows) if len(rows) == page else 0

    async def counts(self, request: Request) -> Response:
        """GET /v1/counts?by=FIELD: events and bytes for each value of a field."""
        await self.caller(request, "read")
        rows = await self.c.rows(*query.counts(self._filter(request), request.query_params.get("by", "")))
        return answer({"counts": [{"value": value, "events": n, "bytes": total} for value, n, total in rows]})

    async def stream(self, request: Request) -> Response:
        """GET /v1/events/stream."""
        await self.caller(request, "read")
        wanted, params = self._filter(request), request.query_params
        given = request.headers.get("last-event-id") or params.get("after")
        cursor = query.parse_number(given, "Last-Event-ID", 0, 0, 1 << 53) if given else None
        last = query.parse_number(params.get("last"), "last", 0, 0, query.MAX_LIMIT)
        behind = query.parse_number(params["max_behind"], "max_behind", 0, 1, 1 << 53) if params.get("max_behind") else None
        frames = tail.follow(
            wanted,
            read=self.c.rows,
            size=lambda: self.c.writer.size,
            bell=self.c.bell,
            stopping=lambda: self.c.stopping,
            cursor=cursor,
            last=last,
            max_behind=behind,
        )
        return StreamingResponse(self._counted(frames), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _counted(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.c.tails += 1
        try:
            async for frame in frames:
                yield frame
        finally:
            self.c.tails -= 1

    async def _found(self, request: Request) -> tuple[int, bytes]:
        uid = request.path_params["uid"]
        rows = await self.c.rows("SELECT pos, raw FROM events WHERE uid = ? ORDER BY pos LIMIT 1", (uid,))
        if not rows:
            raise Refused(404, "no event has this uid here")
        return rows[0][0], rows[0][1]

    async def event(self, request: Request) -> Response:
        """GET /v1/events/UID: its exact bytes."""
        await self.caller(request, "read")
        return Response((await self._found(request))[1], media_type="application/json")

    async def proof(self, request: Request) -> Response:
        """GET /v1/events/UID/proof: leaf index, tree size, audit path (base64) and the checkpoint it leads to."""
        await self.caller(request, "read")
        pos, raw = await self._found(request)
        size = self.c.writer.size
        path = await self.c.reading(lambda: tree.inclusion(pos - 1, size, self.c.store.subtree))
        leaf = base64.b64encode(tree.leaf_hash(raw)).decode()
        note = await self.c.reading(lambda: self._checkpoint(size))
        hashes = [base64.b64encode(step).decode() for step in path]
        return answer({"index": pos - 1, "size": size, "leaf": leaf, "path": hashes, "checkpoint": note})

    # The log.

    def _checkpoint(self, size: int) -> str:
        return tree.checkpoint(self.c.origin, size, tree.root_at(size, self.c.store.subtree), self.c.key)

    async def checkpoint(self, request: Request) -> Response:
        """GET /v1/log/checkpoint."""
        await self.caller(request, "read")
        size = self.c.writer.size
        return PlainTextResponse(await self.c.reading(lambda: self._checkpoint(size)))

    async def consistency(self, request: Request) -> Response:
        """GET /v1/log/consistency?from=&to=."""
        await self.caller(request, "read")
        size, params = self.c.writer.size, request.query_params
        new = query.parse_number(params.get("to"), "to", size, 0, size)
        old = query.parse_number(params.get("from"), "from", 0, 0, new)
        path = await self.c.reading(lambda: tree.consistency(old, new, self.c.store.subtree) if old else [])
        return answer({"from": old, "to": new, "path": [base64.b64encode(step).decode() for step in path]})

    # The fleet, the register, tokens.

    async def agents(self, request: Request) -> Response:
        """GET /v1/agents."""
        await self.caller(request, "read")
        enrolled = dict(await self.c.rows("SELECT agent, enrolled_at FROM agents"))
        latest: dict[str, dict[str, bytes]] = {}
        sql = "SELECT latest.agent, latest.code, raw FROM latest JOIN events USING (pos)"
        for agent, code, raw in await self.c.rows(sql):
            latest.setdefault(agent, {})[code] = raw
        rows = []
        for agent, known in sorted(self.c.agents.items(), key=lambda item: item[1].name):
            machine = fleet.Machine(agent, known.name, known.last_seen, known.silent)
            rows.append(fleet.row(machine, enrolled.get(agent, 0), latest.get(agent, {})))
        return answer({"agents": rows})

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

    # Health.

    async def healthz(self, _request: Request) -> Response:
        """GET /healthz: the loop turns and the writer's thread lives."""
        return answer({"status": "ok"})

    async def readyz(self, _request: Request) -> Response:
        """GET /readyz: a commit went through just now."""
        try:
            await asyncio.wait_for(self.c.change(_touch), 5.0)
        except (Busy, StoreError, TimeoutError) as error:
            raise Refused(503, f"the store is not writable: {error or 'no commit within 5 s'}", {"Retry-After": "2"}) from None
        return answer({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        return PlainTextResponse(pages.metrics(self.c), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def home(self, _request: Request) -> Response:
        """GET /."""
        return HTMLResponse(pages.HOME, headers=pages.HOME_HEADERS)


def _touch(writer: Writer) -> None:
    writer.session.execute("INSERT OR REPLACE INTO meta VALUES ('ready', ?)", (str(writer.now()),))


def _guarded(handler: Handler) -> Handler:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except REFUSALS as error:
            return refusal(error)

    return run


def create_app(collector: Collector, local: bool = False) -> Starlette:
    """The routes over `collector`; `local`: for the socket and the command line of its own machine."""
    r = Routes(collector, local)
    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/enroll", r.enroll),
        ("POST", "/v1/batches", r.batches),
        ("GET", "/v1/register", r.register),
        ("GET", "/v1/events", r.events),
        ("GET", "/v1/events/stream", r.stream),
        ("GET", "/v1/events/{uid}", r.event),
        ("GET", "/v1/events/{uid}/proof", r.proof),
        ("GET", "/v1/counts", r.counts),
        ("GET", "/v1/agents", r.agents),
        ("GET", "/v1/media", r.media),
        ("GET", "/v1/media/{key:path}", r.medium),
        ("PUT", "/v1/media/{key:path}", r.approve),
        ("DELETE", "/v1/media/{key:path}", r.revoke),
        ("GET", "/v1/tokens", r.tokens),
        ("POST", "/v1/tokens", r.create_token),
        ("DELETE", "/v1/tokens/{id}", r.revoke_token),
        ("GET", "/v1/log/checkpoint", r.checkpoint),
        ("GET", "/v1/log/consistency", r.consistency),
        ("GET", "/healthz", r.healthz),
        ("GET", "/readyz", r.readyz),
        ("GET", "/metrics", r.metrics),
        ("GET", "/", r.home),
    ]
    paths: dict[str, dict[str, Handler]] = {}
    for method, path, handler in table:
        paths.setdefault(path, {})[method] = _guarded(handler)
    routes = [Route(path, _by_method(handlers), methods=list(handlers)) for path, handlers in paths.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: on_http, Exception: on_crash})


def _by_method(handlers: dict[str, Handler]) -> Handler:
    async def run(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return run
