"""Requests about the log itself: checkpoints, proofs, keys, bundles, cosigning, erasing.

Owns: their parameters, and how many bundles are made at once. Must not know: how proofs are made (`tree`), what is in a bundle
(`bundle`), how a witness is reached (`carry`).
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Generator

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from server_stub import duties, export, query, tree, witness
from server_stub.answers import Refused, answer, body_of
from server_stub.collector import Collector
from server_stub.commit import Writer
from server_stub.door import SMALL_BODY, Door

EXPORTS = 2
"""Bundles made at once, at most: each keeps one of the threads that read."""


class LogDoor(Door):
    """The handlers."""

    async def checkpoint(self, request: Request) -> Response:
        """GET /v1/log/checkpoint: the newest; with ?cosigned=1 the newest that a witness cosigned, with its lines."""
        await self.caller(request, "read")
        if request.query_params.get("cosigned"):
            sql = "SELECT note, line FROM cosigned WHERE size = (SELECT max(size) FROM cosigned) ORDER BY line"
            rows = await self.c.rows(sql)
            if not rows:
                raise Refused(404, "no witness has cosigned a checkpoint yet; see [[collector.witness]]")
            return PlainTextResponse(rows[0][0] + "".join(line for _, line in rows))
        return PlainTextResponse((await self.c.point()).note)

    async def consistency(self, request: Request) -> Response:
        """GET /v1/log/consistency?from=&to=."""
        await self.caller(request, "read")
        size, params = self.c.writer.size, request.query_params
        new = query.parse_number(params.get("to"), "to", size, 0, size)
        old = query.parse_number(params.get("from"), "from", 0, 0, new)
        path = await self.c.reading(lambda: tree.consistency(old, new, self.c.store.subtree) if old else [])
        return answer({"from": old, "to": new, "path": [base64.b64encode(step).decode() for step in path]})

    async def keys(self, _request: Request) -> Response:
        """GET /v1/log/keys: public keys are public; agents ask here when a receipt is signed by a key they do not know."""
        return answer(keys_of(self.c))

    async def export(self, request: Request) -> Response:
        """GET /v1/export: the bundle, as it is made."""
        who = await self.caller(request, "export")
        given = {name: value for name in query.FILTERS if (value := request.query_params.get(name, ""))}
        wanted = query.parse(given, self.c.now(), None)
        newest = self.c.writer.size
        size = query.parse_number(request.query_params.get("size"), "size", newest, 0, newest)
        if not await self.c.reading(lambda: export.is_boundary(self.c.store, size, newest)):
            raise Refused(422, f"no checkpoint has the size {size}; take one that a checkpoint or a receipt names")
        if self.c.exports >= EXPORTS:
            raise Refused(429, "other bundles are being made; try again when they are done", {"Retry-After": "10"})
        await self.looked(request, who, "events.export")
        fixed = _fixed(given, wanted)
        signer = export.Signer(self.c.origin, self.c.key, self.c.writer.keys, self.c.writer.rotations)
        parts = export.chunks(
            self.c.store, export.Asked(wanted, fixed, size), signer, self._key_of, room=self.c.settings.state_dir
        )
        name = f"sekisho-{self.c.writer.id[:8]}-{size}.zip"
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
        return StreamingResponse(self._made(parts), media_type="application/zip", headers=headers)

    def _key_of(self, agent: str) -> bytes | None:
        rows = self.c.store.rows("SELECT key FROM agents WHERE agent = ?", (agent,))
        return bytes(rows[0][0]) if rows else None

    async def _made(self, parts: Generator[bytes, None, None]) -> AsyncGenerator[bytes, None]:
        self.c.exports += 1
        making = None
        try:
            while True:
                making = self.c.readers.submit(next, parts, None)
                if (part := await asyncio.wrap_future(making)) is None:
                    return
                yield part
        finally:
            self.c.exports -= 1
            if making is not None:
                # Whoever asked may be gone while a thread still works on the next part: it is let finish that first.
                making.add_done_callback(lambda _: parts.close())

    async def add_checkpoint(self, request: Request) -> Response:
        """POST /add-checkpoint (C2SP tlog-witness): cosign another log's checkpoint, if that log is configured here."""
        asked = witness.read_body(await body_of(request, SMALL_BODY))
        key = self.c.cosign.get(asked.origin)
        if key is None:
            raise witness.Refused(404, "this log is not in [[collector.cosign]] here")

        def work(writer: Writer) -> str:
            rows = writer.session.execute("SELECT size, root FROM witnessed WHERE origin = ?", (asked.origin,))
            size, root = witness.judge(asked, key, (rows[0][0], bytes(rows[0][1])) if rows else None)
            values = (asked.origin, size, root, writer.now())
            put = (
                "INSERT INTO witnessed VALUES (?, ?, ?, ?) ON CONFLICT (origin)"
                " DO UPDATE SET size = excluded.size, root = excluded.root, at = excluded.at"
            )
            writer.session.execute(put, values)
            return witness.cosign(asked.note, self.c.origin, self.c.key, writer.now() // 1000)

        return PlainTextResponse(await self.c.change(work))

    async def carry(self, request: Request) -> Response:
        """POST /v1/log/witness: give the newest checkpoint to every witness, now."""
        await self.caller(request, "witness")
        return answer({"witnesses": await duties.carry_all(self.c)})

    async def erase(self, request: Request) -> Response:
        """POST /v1/retention?before=TIME: erase the content of what was received before."""
        who = await self.caller(request, "erase")
        before = query.parse_time(request.query_params.get("before", ""), self.c.now(), None)
        if before > self.c.now():
            raise Refused(422, "what is to come can't be erased; give a time that is over")
        return answer({"erased": await duties.erase(self.c, before, self.by(request, who))})


def _fixed(given: dict[str, str], wanted: query.Filter) -> dict[str, str]:
    """The filter for the manifest: times as they came out, so that they mean the same later."""
    times = {name: str(at) for name in ("since", "until") if (at := getattr(wanted, name)) is not None}
    return given | times


def keys_of(collector: Collector) -> dict[str, object]:
    """The log's name, all its keys (oldest first), their rotations, and the newest as a C2SP verifier key."""
    writer = collector.writer
    return {
        "origin": collector.origin,
        "keys": [base64.b64encode(key).decode() for key in writer.keys],
        "rotations": writer.rotations,
        "verifier": witness.vkey(collector.origin, writer.keys[-1]),
        "witness": witness.vkey(collector.origin, writer.keys[-1], witness.COSIGNATURE),
    }
