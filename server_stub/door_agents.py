"""Agents' requests: enrolment, batches, the register. They sign; no token opens these but an enrolment's.

Owns: headers, encodings, and how many batches of one agent and one address may be under way, so that none takes the
collector from the others. Must not know: how batches are judged (`intake`) or kept (`commit`).
"""

import asyncio
import base64
import binascii
import gzip

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from agent.contract import wire
from server_stub import auth, intake, ledger, query, tail
from server_stub.answers import Refused, answer, body_of, decoded
from server_stub.collector import Enrolled
from server_stub.commit import Busy, Conflict
from server_stub.door import SMALL_BODY, Door

POLL_S = 30.0
"""How long a request for a newer register is held."""
IN_FLIGHT_AGENT = 4
IN_FLIGHT_ADDRESS = 64
"""Bodies being received or judged at once from one agent at one address, and from one address."""


def _travelling(register: wire.SignedRegister) -> tuple[bytes, bytes]:
    plain = msgspec.json.encode(register)
    return plain, gzip.compress(plain, 6, mtime=0)


class AgentDoor(Door):
    """The handlers."""

    _sent: tuple[int, asyncio.Future[tuple[bytes, bytes]]] | None = None

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

    async def _agent(self, request: Request) -> tuple[str, Enrolled]:
        agent = request.headers.get("sekisho-agent", "")
        known = await self.c.known(agent)
        if known is None:
            why = "the header Sekisho-Agent is missing" if not agent else "this agent is not known here"
            raise Refused(401, f"{why}; enrol it with: sekisho-agent enroll URL --token TOKEN", {"Connection": "close"})
        return agent, known

    async def batches(self, request: Request) -> Response:
        """POST /v1/batches."""
        agent, known = await self._agent(request)
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
            batch = await self.c.loop.run_in_executor(
                self.c.verifiers, intake.examine, body, packed, agent, known.key, known.name
            )
            (result, receipt), register = await self.c.change(
                lambda writer: (writer.take(batch), ledger.note_used(writer, batch.rows, known.name)), len(batch.rows)
            )
            if register is not None:
                self.c.take_register(register)
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

    async def _whole_register(self) -> tuple[bytes, bytes]:
        """The signed register as it travels, plain and gzip (of 10,000 approvals 2 MB, 180 kB); made once for all who wait."""
        if self._sent is None or self._sent[0] != self.c.register_version:
            making = self.c.loop.run_in_executor(self.c.readers, _travelling, self.c.register)
            self._sent = (self.c.register_version, making)
        return await asyncio.shield(self._sent[1])  # one who goes away must not end it for the others

    async def register(self, request: Request) -> Response:
        """GET /v1/register?after=VERSION: 200 once newer, 204 if not within POLL_S."""
        agent, known = await self._agent(request)
        after = query.parse_number(request.query_params.get("after"), "after", 0, 0, 1 << 53)
        target = request.scope["raw_path"].decode("ascii")
        if request.scope["query_string"]:
            target += "?" + request.scope["query_string"].decode("ascii", "replace")
        head = request.headers
        time_ms, sig = head.get("sekisho-time", ""), head.get("sekisho-signature", "")
        auth.check_request(known.key, target, agent, time_ms, sig=sig, now_ms=self.c.now())
        deadline = self.c.loop.time() + POLL_S
        while True:
            rung = self.c.register_bell.next()
            if self.c.register_version > after:
                plain, packed = await self._whole_register()
                if "gzip" in request.headers.get("accept-encoding", ""):
                    return Response(packed, headers={"Content-Encoding": "gzip"}, media_type="application/json")
                return Response(plain, media_type="application/json")
            left = deadline - self.c.loop.time()
            if self.c.stopping or left <= 0 or not await tail.Bell.wait(rung, left):
                return Response(status_code=204)
