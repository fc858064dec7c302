"""A small agent for tests of the collector: real keys, real chains, real signed batches, and every way to spoil one."""

import base64
import gzip
import http.client
import json
import time
import uuid
from typing import Any

import msgspec
from nacl.signing import SigningKey

from agent.contract import chain, codes, event, wire

PRODUCT = msgspec.Raw(b'{"name":"Sekisho","version":"0.1.0"}')


def draft(
    code: str = "file.copied_out", *, agent: str = "", name: str = "ws-1", at: int | None = None, **ours: Any
) -> event.Event:
    """An event of `code`, not sealed; `ours` goes into unmapped.sekisho."""
    row = codes.code_of(code)
    return event.Event(
        class_uid=row.class_uid,
        category_uid=row.class_uid // 1000,
        activity_id=row.activity_id,
        activity_name=row.activity_name,
        type_uid=row.type_uid,
        severity_id=row.severity,
        time=int(time.time() * 1000) if at is None else at,
        metadata=event.Metadata(version=codes.OCSF_VERSION, product=PRODUCT, uid=str(uuid.uuid4()), event_code=code),
        unmapped=event.Unmapped(event.Sekisho(**ours)),
        device=msgspec.Raw(json.dumps({"type_id": 0, "uid": agent, "hostname": name}).encode()),
        actor=msgspec.Raw(b'{"app_name":"test"}'),
    )


def copied(rel: str, size: int = 4_200_000, user: str = "sato", **more: Any) -> dict[str, Any]:
    """What unmapped.sekisho says of a copy of customers/REL onto the usual stick."""
    return {
        "protected": event.ProtectedInfo(path="/srv/customers", label="customers", rel=rel),
        "medium": event.MediumInfo(
            key="usb:0951:1666:60A44C413F8CF320",
            vendor="Kingston",
            model="DataTraveler 3.0",
            serial="60A44C413F8CF320",
            decision="unapproved",
        ),
        "bytes": size,
        "way": "mount",
        "login": event.LoginInfo(uid=1000, user=user),
        "process": event.ProcessInfo(pid=4242, exe="/usr/bin/cp", argv=["cp", rel]),
        **more,
    }


class Client:
    """One agent. Keeps its chain in memory, so any part can be sent again."""

    def __init__(self, port: int, name: str = "ws-1", key: SigningKey | None = None, epoch: int = 1) -> None:
        self.port, self.name, self.epoch = port, name, epoch
        self.key = key or SigningKey.generate()
        self.public = bytes(self.key.verify_key)
        self.id = chain.agent_id(self.public)
        self.lines: list[bytes] = []
        self.hashes = [chain.genesis(self.id, epoch)]

    def ask(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request on a connection of its own: status, and the JSON answered (None if there was no body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target, body, headers or {})
            answer = connection.getresponse()
            text = answer.read()
            self.content_type = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def enrol(self, token: str = "house-token") -> Any:
        body = {"token": token, "name": self.name, "key": base64.b64encode(self.public).decode()}
        return self.ask("POST", "/v1/enroll", json.dumps(body).encode())

    def append(self, made: event.Event) -> bytes:
        """Seal an event as the next of this agent's chain."""
        raw = event.seal(made, len(self.lines) + 1, self.epoch, self.hashes[-1])
        self.lines.append(raw)
        self.hashes.append(chain.link(self.hashes[-1], chain.digest(raw)))
        return raw

    def append_some(self, count: int, code: str = "file.copied_out", **ours: Any) -> None:
        for _ in range(count):
            given = ours or copied(f"2014-{len(self.lines):02}.csv")
            self.append(draft(code, agent=self.id, name=self.name, **given))

    def head(self, first: int, last: int) -> wire.Head:
        head = wire.Head(
            self.id, self.epoch, first, last, self.hashes[first - 1].hex(), self.hashes[last].hex(), int(time.time() * 1000)
        )
        head.sig = chain.sign(chain.head_bytes(head), self.key)
        return head

    def batch(self, first: int = 1, last: int | None = None) -> bytes:
        """The signed, packed body for events `first`..`last` (default: the newest)."""
        last = len(self.lines) if last is None else last
        return gzip.compress(wire.batch_body(self.head(first, last), self.lines[first - 1 : last]), 6, mtime=0)

    def post(self, body: bytes, **headers: str) -> tuple[int, Any]:
        given = {"Sekisho-Agent": self.id, "Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"}
        return self.ask("POST", "/v1/batches", body, given | {name.replace("_", "-"): value for name, value in headers.items()})

    def send(self, first: int = 1, last: int | None = None) -> tuple[int, Any]:
        return self.post(self.batch(first, last))

    def signed(self, target: str, at_ms: int | None = None) -> dict[str, str]:
        at = str(int(time.time() * 1000) if at_ms is None else at_ms)
        sig = chain.sign(chain.request_bytes("GET", target, self.id, at), self.key)
        return {"Sekisho-Agent": self.id, "Sekisho-Time": at, "Sekisho-Signature": sig}
