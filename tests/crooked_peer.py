"""A collector on a bad day: it speaks the real protocol on loopback, keeps chains like the real thing, and misbehaves on
demand.

It judges signatures, chains, holes and forks for itself (from `agent.contract` alone), remembers whatever it was asked, and
changes in mid-test: `next("busy", "cut")` is for the coming batches, one each; `mood` for all after them. Moods that say "no"
after having committed are the important ones: the agent can't know, and must neither lose nor double anything.

    good                the real thing
    slow                commits and answers once `gate` is set
    hanging             never answers (until `gate` is set, then closes)
    busy, throttled     503, 429 with Retry-After: 7; nothing committed
    broken              500, nothing committed
    cut, cut_before     half an answer after committing; no answer, nothing committed
    wrong_signature     commits, but the receipt is signed by another key
    last_month          commits, but answers with the first receipt it ever gave
    stranger            commits, but answers with a receipt for another agent
    altered             commits, but the receipt names another hash (signed)
    garbage             commits, answers 200 with bytes that are nothing
    not_http            commits, answers with no HTTP
    endless             answers 200 and never stops sending
    hole_lie            commits nothing and claims to miss what it was just sent
    fork_lie            claims another history
    too_large           413 to any batch of more than one event
    silly_409           409 without a reason
    redirect            302 to elsewhere
    unknown             401
"""

import base64
import gzip
import json
import secrets
import socket
import ssl
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
from nacl.signing import SigningKey

from agent.contract import chain, wire
from agent.contract.event import read


class Asked(msgspec.Struct):
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    head: wire.Head | None = None
    mood: str = "good"


class Chain:
    """What is held of one (agent, epoch)."""

    def __init__(self, agent: str, epoch: int) -> None:
        self.lines: list[bytes] = []
        self.hashes: list[bytes] = [chain.genesis(agent, epoch)]

    @property
    def last(self) -> int:
        return len(self.lines)

    def cut(self, last: int) -> None:
        """Forget what follows `last`: restored from a backup."""
        del self.lines[last:]
        del self.hashes[last + 1 :]


class CrookedPeer:
    """The server. Use as a context manager; `url` is where it is."""

    def __init__(self, token: str = "let-me-in", certificate: str = "") -> None:
        self.key, self.other_key = SigningKey.generate(), SigningKey.generate()
        self.tokens = {token}
        self.agents: dict[str, bytes] = {}
        self.chains: dict[tuple[str, int], Chain] = {}
        self.mood = "good"
        self.coming: deque[str] = deque()
        self.refused_uids: set[str] = set()
        self.refuse_folded = False
        self.asked: list[Asked] = []
        self.receipts: list[wire.Receipt] = []
        self.gate = threading.Event()
        self.changed = threading.Condition()
        self.date: str | None = None
        self.register = self.sign_register(0)
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def log_message(self, *_: object) -> None: ...

            def date_time_string(self, timestamp: float | None = None) -> str:
                return peer.date or super().date_time_string(timestamp)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                peer.post(self, body)

            def do_GET(self) -> None:
                peer.get(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None: ...

        self.server = Server(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' * bool(certificate)}://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "CrookedPeer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()

    # -- what a test does to it

    def next(self, *moods: str) -> None:
        self.coming.extend(moods)

    def held(self, agent: str, epoch: int) -> Chain:
        return self.chains.setdefault((agent, epoch), Chain(agent, epoch))

    def sign_register(self, version: int, **entry: object) -> bytes:
        approvals = [wire.ApprovalEntry(id=f"a{version}", key="usb:1", **entry)] if version else []
        body = msgspec.json.encode(wire.RegisterBody(version=version, issued_at=1, approvals=approvals)).decode()
        signed = wire.SignedRegister(body, chain.sign(f"sekisho/register/v1\n{body}".encode(), self.key))
        return msgspec.json.encode(signed)

    def batches(self) -> list[wire.Head]:
        return [asked.head for asked in self.asked if asked.head]

    # -- what it does

    def post(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = Asked("POST", handler.path, dict(handler.headers))
        with self.changed:
            self.asked.append(asked)
            self.changed.notify_all()
        if handler.path == "/v1/enroll":
            return self.enroll(handler, body)
        asked.mood = mood = self.coming.popleft() if self.coming else self.mood
        if mood in ("slow", "hanging"):
            self.gate.wait(20)
        if mood in ("hanging", "cut_before"):
            return self.drop(handler)
        if mood in ("busy", "throttled", "broken"):
            status = {"busy": 503, "throttled": 429, "broken": 500}[mood]
            return self.problem(handler, status, retry="7" if mood != "broken" else "")
        if mood == "unknown":
            return self.problem(handler, 401)
        if mood == "silly_409":
            return self.problem(handler, 409)
        if mood == "redirect":
            return self.answer(handler, 302, b"", {"Location": "http://127.0.0.1:9/"})
        head, lines = wire.read_batch(gzip.decompress(body))
        asked.head = head
        if mood == "fork_lie":
            return self.problem(handler, 409, reason="fork", expected=head.first, hash="00" * 32)
        if mood == "hole_lie":
            return self.problem(handler, 409, reason="hole", expected=head.first, hash=head.prev)
        if mood == "too_large" and len(lines) > 1:
            return self.problem(handler, 413)
        receipt = self.commit(handler, head, lines)
        if receipt is None:
            return None
        self.receipts.append(receipt)
        return self.tell(handler, mood, receipt)

    def commit(self, handler: BaseHTTPRequestHandler, head: wire.Head, lines: list[bytes]) -> wire.Receipt | None:
        known = self.agents.get(head.agent)
        if known is None or handler.headers["Sekisho-Agent"] != head.agent:
            return self.problem(handler, 401)
        chain.check(chain.head_bytes(head), head.sig, known)
        link, hashes = bytes.fromhex(head.prev), [bytes.fromhex(head.prev)]
        for seq, line in enumerate(lines, head.first):
            folded = wire.folded(line)
            if folded is None:
                seen = read(line)
                assert (seen.unmapped.sekisho.seq, seen.unmapped.sekisho.prev) == (seq, link.hex())
                if seen.metadata.uid in self.refused_uids:
                    return self.problem(handler, 422)
            elif self.refuse_folded:
                return self.problem(handler, 422)
            digest = chain.digest(line) if folded is None else bytes.fromhex(folded.digest)
            link = chain.link(link, digest)
            hashes.append(link)
        assert link.hex() == head.hash, "the head's hash is not that of its events"
        held = self.held(head.agent, head.epoch)
        if head.first > held.last + 1:
            return self.problem(
                handler, 409, reason="hole", epoch=head.epoch, expected=held.last + 1, hash=held.hashes[-1].hex()
            )
        for at, link in enumerate(hashes, head.first - 1):
            if at <= held.last and held.hashes[at] != link:
                return self.problem(handler, 409, reason="fork", expected=held.last + 1, hash=held.hashes[-1].hex())
        new = max(0, head.last - held.last)
        if new:
            held.lines += lines[-new:]
            held.hashes += hashes[-new:]
        last = head.last
        receipt = wire.Receipt(head.agent, head.epoch, last, held.hashes[last].hex(), sum(c.last for c in self.chains.values()))
        receipt.sig = chain.sign(chain.receipt_bytes(receipt), self.key)
        return receipt

    def tell(self, handler: BaseHTTPRequestHandler, mood: str, receipt: wire.Receipt) -> None:
        if mood == "last_month":
            receipt = self.receipts[0]
        elif mood in ("stranger", "altered", "wrong_signature"):
            changes = {"stranger": {"agent": "f" * 32}, "altered": {"hash": "00" * 32}}.get(mood, {})
            receipt = msgspec.structs.replace(receipt, **changes)
            receipt.sig = chain.sign(chain.receipt_bytes(receipt), self.other_key if mood == "wrong_signature" else self.key)
        data = msgspec.json.encode(receipt)
        if mood == "cut":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data[: len(data) // 2])
            return self.drop(handler)
        if mood == "garbage":
            return self.answer(handler, 200, secrets.token_bytes(200))
        if mood == "not_http":
            handler.wfile.write(secrets.token_bytes(400))
            return self.drop(handler)
        if mood == "endless":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            try:
                while not self.gate.is_set():
                    handler.wfile.write(b"x" * 65536)
            except OSError:
                return self.drop(handler)
            return None
        return self.answer(handler, 200, data)

    def enroll(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        asked = msgspec.json.decode(body, type=wire.Enrol)
        if asked.token not in self.tokens:
            return self.problem(handler, 401)
        key = base64.b64decode(asked.key)
        agent = chain.agent_id(key)
        self.agents[agent] = key
        own = base64.b64encode(bytes(self.key.verify_key)).decode()
        return self.answer(handler, 200, msgspec.json.encode(wire.Enrolled(agent, own, msgspec.Raw(self.register))))

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        with self.changed:
            self.asked.append(Asked("GET", handler.path, dict(handler.headers)))
        agent = handler.headers.get("Sekisho-Agent", "")
        if agent not in self.agents:
            return self.problem(handler, 401)
        request = chain.request_bytes("GET", handler.path, agent, handler.headers["Sekisho-Time"])
        chain.check(request, handler.headers["Sekisho-Signature"], self.agents[agent])
        after = int(handler.path.partition("after=")[2] or -1)
        body = json.loads(json.loads(self.register)["body"])
        if body["version"] == after:
            return self.answer(handler, 204, b"")
        return self.answer(handler, 200, self.register)

    def problem(self, handler: BaseHTTPRequestHandler, status: int, *, retry: str = "", **more: object) -> None:
        headers = {"Content-Type": "application/problem+json"} | ({"Retry-After": retry} if retry else {})
        body = msgspec.json.encode(wire.Problem(status=status, detail="not today", **more))
        self.answer(handler, status, body, headers)

    def answer(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def drop(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        try:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
