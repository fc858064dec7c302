"""Readers' requests: events, the the stream, counts, proofs, the fleet. All need the right to "read".

Owns: parameters, pages and streams. A stream ends when its token does: who was let in is asked again while it lasts.
Must not know: how events are found (`query`), framed (`tail`) or proved (`tree`).
"""

import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server_stub import auth, fleet, query, tail, tree
from server_stub.answers import Refused, answer
from server_stub.door import Door
from server_stub.store import StoreError

NDJSON = "application/x-ndjson"
RECHECK_S = 5.0
"""How long a stream's right to read is believed. Idle ones are asked at their keep-alive (`tail.KEEP_ALIVE_S`)."""


class ReaderDoor(Door):
    """The handlers."""

    def _filter(self, request: Request) -> query.Filter:
        return query.parse(request.query_params, self.c.now(), None)

    async def events(self, request: Request) -> Response:
        """GET /v1/events."""
        who = await self.caller(request, "read")
        wanted, params = self._filter(request), request.query_params
        order = params.get("order") or "asc"
        if order not in ("asc", "desc"):
            raise query.BadQuery('"order" must be asc or desc')
        after = query.parse_number(params["after"], "after", 0, 0, 1 << 53) if params.get("after") else None
        streamed = NDJSON in request.headers.get("accept", "")
        most, usual = (1 << 53, 1 << 53) if streamed else (query.MAX_LIMIT, query.DEFAULT_LIMIT)
        limit = query.parse_number(params.get("limit"), "limit", usual, 1, most)
        upto = self.c.writer.size  # the log as it was asked for: without the record of this very look
        await self.looked(request, who, "events.list")
        if streamed:
            lines = self._all(wanted, after, order == "desc", limit, upto)
            return StreamingResponse(self._while_allowed(request, lines, whole=True), media_type=NDJSON)
        sql, values = query.sql(
            wanted, after=after, descending=order == "desc", limit=limit + 1, upto=upto, dialect=self.c.store.dialect
        )
        rows = await self.c.rows(sql, values)
        cursor = f'"{rows[limit - 1][0]}"' if len(rows) > limit else "null"
        body = b'{"events":[%s],"next":%s}' % (b",".join(raw for _, raw in rows[:limit]), cursor.encode())
        return Response(body, media_type="application/json")

    async def _all(
        self, wanted: query.Filter, after: int | None, descending: bool, limit: int, upto: int
    ) -> AsyncGenerator[bytes, None]:
        while limit > 0:
            page = min(limit, 1000)
            rows = await self.c.rows(
                *query.sql(wanted, after=after, descending=descending, limit=page, upto=upto, dialect=self.c.store.dialect)
            )
            if rows:
                yield b"".join(raw + b"\n" for _, raw in rows)
                after = rows[-1][0]
            limit = limit - len(rows) if len(rows) == page else 0

    async def counts(self, request: Request) -> Response:
        """GET /v1/counts?by=FIELD: events and bytes for each value of a field."""
        who = await self.caller(request, "read")
        counted = query.counts(self._filter(request), request.query_params.get("by", ""), self.c.store.dialect)
        await self.looked(request, who, "events.count")
        rows = await self.c.rows(*counted)
        return answer({"counts": [{"value": value, "events": n, "bytes": total} for value, n, total in rows]})

    async def stream(self, request: Request) -> Response:
        """GET /v1/events/stream."""
        who = await self.caller(request, "read")
        wanted, params = self._filter(request), request.query_params
        given = request.headers.get("last-event-id") or params.get("after")
        cursor = query.parse_number(given, "Last-Event-ID", 0, 0, 1 << 53) if given else None
        last = query.parse_number(params.get("last"), "last", 0, 0, query.MAX_LIMIT)
        behind = query.parse_number(params["max_behind"], "max_behind", 0, 1, 1 << 53) if params.get("max_behind") else None
        begin = self.c.writer.size
        await self.looked(request, who, "events.stream")
        frames = tail.follow(
            wanted,
            read=self.c.rows,
            size=lambda: self.c.writer.size,
            bell=self.c.bell,
            stopping=lambda: self.c.stopping,
            cursor=cursor,
            last=last,
            begin=begin,
            max_behind=behind,
            dialect=self.c.store.dialect,
        )
        allowed = self._while_allowed(request, self._counted(frames))
        return StreamingResponse(allowed, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _while_allowed(
        self, request: Request, parts: AsyncGenerator[bytes, None], whole: bool = False
    ) -> AsyncIterator[bytes]:
        """The parts of a stream until its token is revoked or has expired.

        One that has an end of its own (`whole`) is then broken off, not ended: nobody may take the part for all of it.
        """
        asked_at = self.c.loop.time()
        async with aclosing(parts):
            async for part in parts:
                if self.c.loop.time() - asked_at >= RECHECK_S:
                    try:
                        await self.caller(request, "read")
                    except (auth.NotAllowed, StoreError):
                        if whole:
                            raise
                        return
                    asked_at = self.c.loop.time()
                yield part

    async def _counted(self, frames: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        self.c.tails += 1
        try:
            async for frame in frames:
                yield frame
        finally:
            self.c.tails -= 1

    async def _found(self, request: Request) -> tuple[int, bytes]:
        uid = request.path_params["uid"]
        rows = await self.c.rows(*query.by_uid(uid, self.c.store.dialect))
        if not rows:
            raise Refused(404, "no event has this uid here")
        return rows[0][0], rows[0][1]

    async def event(self, request: Request) -> Response:
        """GET /v1/events/UID: its exact bytes."""
        who = await self.caller(request, "read")
        raw = (await self._found(request))[1]
        await self.looked(request, who, "events.get", uid=request.path_params["uid"])
        return Response(raw, media_type="application/json")

    async def proof(self, request: Request) -> Response:
        """GET /v1/events/UID/proof: leaf index, tree size, audit path (base64) and the checkpoint it leads to."""
        await self.caller(request, "read")
        pos, raw = await self._found(request)
        size = self.c.writer.size
        path = await self.c.reading(lambda: tree.inclusion(pos - 1, size, self.c.store.subtree))
        leaf = base64.b64encode(tree.leaf_hash(raw)).decode()
        note = (await self.c.point(size)).note
        hashes = [base64.b64encode(step).decode() for step in path]
        return answer({"index": pos - 1, "size": size, "leaf": leaf, "path": hashes, "checkpoint": note})

    async def agents(self, request: Request) -> Response:
        """GET /v1/agents; with ?only=names, no more than the name of each."""
        await self.caller(request, "read")
        if request.query_params.get("only") == "names":
            return answer({"names": {agent: known.name for agent, known in self.c.agents.items()}})
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
