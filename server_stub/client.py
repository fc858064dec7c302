"""How a command reaches the collector: by URL and token, by the local socket, or by the store itself.

Owns: that choice, the HTTP client (the standard library's: it must start quickly and speak to UNIX sockets), reading
Server-Sent Events, and errors as one sentence. All three ways answer the same routes, so a command knows no difference.
Must not know: what the answers mean.
"""

import asyncio
import contextlib
import http.client
import os
import pwd
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from server_stub.config import Settings, is_loopback

TIMEOUT_S = 40.0
"""Above the stream's keep-alive, so a silent line is a dead one."""


class Failed(Exception):
    """The collector can't be reached, or said no: one sentence. `status` is 0 if it gave none."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


class _Local(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self.path))


def person() -> str:
    """The login user behind this command, whom su and sudo do not change; empty if the kernel knows none."""
    try:
        uid = int(Path("/proc/self/loginuid").read_text("ascii"))
        return "" if uid == 0xFFFFFFFF else pwd.getpwuid(uid).pw_name
    except (OSError, ValueError, KeyError):
        return ""


def _said(status: int, body: bytes) -> Failed:
    try:
        detail = msgspec.json.decode(body, type=dict[str, Any]).get("detail")
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        detail = None
    return Failed(str(detail) if detail else f"the collector answered with status {status}", status)


class Client:
    """Asks a collector; made by `reach`."""

    where = ""

    def request(self, method: str, target: str, body: Any = None) -> bytes:
        """The body of a good answer. Raises Failed."""
        raise NotImplementedError

    def get(self, target: str) -> Any:
        """A JSON answer."""
        return msgspec.json.decode(self.request("GET", target))

    def lines(self, target: str, headers: dict[str, str]) -> Iterator[bytes]:
        """The lines of a streamed answer, without their ends, as they come. Raises Failed."""
        raise NotImplementedError


class Networked(Client):
    """By HTTP, over TCP or the local socket."""

    def __init__(self, url: str, token: str = "", ca_file: str = "", local: Path | None = None) -> None:
        self.url, self.token, self.local = url, token, local
        self.where = str(local) if local else url
        parts = urlsplit(url)
        if not local and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise Failed(f'"{url}" is no URL of a collector; write it like https://collector.example:8443')
        if not local and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise Failed(f'"{url}" would send the token unprotected; use https://')
        self.host, self.port, self.tls, self.base = (
            parts.hostname or "",
            parts.port,
            parts.scheme == "https",
            parts.path.rstrip("/"),
        )
        try:
            self.context = ssl.create_default_context(cafile=ca_file or None) if self.tls else None
        except OSError as error:
            raise Failed(f"{ca_file}: can't be used as a CA file ({error}); give one in PEM") from None

    def _connection(self) -> http.client.HTTPConnection:
        if self.local:
            return _Local(self.local)
        if self.tls:
            return http.client.HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=self.context)
        return http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)

    @contextlib.contextmanager
    def _answer(self, method: str, target: str, body: Any, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if self.local and (name := person()):
            headers["Sekisho-Person"] = quote(name)
        data = None if body is None else msgspec.json.encode(body)
        connection = self._connection()
        try:
            connection.request(method, self.base + target, data, headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _said(answer.status, answer.read(1 << 20))
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{self.where}: the collector does not answer ({error or type(error).__name__})") from None
        finally:
            connection.close()

    def request(self, method: str, target: str, body: Any = None) -> bytes:
        """See Client."""
        with self._answer(method, target, body, {}) as answer:
            return answer.read()

    def lines(self, target: str, headers: dict[str, str]) -> Iterator[bytes]:
        """See Client."""
        with self._answer("GET", target, None, headers) as answer:
            while line := answer.readline():
                yield line.rstrip(b"\r\n")


class Direct(Client):
    """On the store, when no collector is served: the same routes, run in this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.where = settings, str(settings.state_dir)

    def request(self, method: str, target: str, body: Any = None) -> bytes:
        """See Client."""
        status, answer = asyncio.run(self._run(method, target, b"" if body is None else msgspec.json.encode(body), {}))
        if status >= 400:
            raise _said(status, answer)
        return answer

    def lines(self, target: str, headers: dict[str, str]) -> Iterator[bytes]:
        """See Client; all at once."""
        status, answer = asyncio.run(self._run("GET", target, b"", headers))
        if status >= 400:
            raise _said(status, answer)
        yield from answer.splitlines()

    async def _run(self, method: str, target: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        from server_stub.app import create_app
        from server_stub.collector import opened

        path, _, query = target.partition("?")
        from urllib.parse import unquote

        sent = {name.lower().encode(): value.encode() for name, value in headers.items()}
        if name := person():
            sent[b"sekisho-person"] = quote(name).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": list(sent.items()), "client": None, "server": None,
        }  # fmt: skip
        got: dict[str, Any] = {"status": 500, "body": []}
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                got["status"] = message["status"]
            else:
                got["body"].append(message.get("body", b""))

        async with opened(self.settings) as collector:
            await create_app(collector, local=True)(scope, receive, send)
        return got["status"], b"".join(got["body"])


def served(settings: Settings) -> bool:
    """Whether a collector listens on the local socket. Raises Failed if it does but we may not ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        try:
            sock.connect(str(settings.socket))
        except PermissionError:
            raise Failed(
                f"{settings.socket}: you may not use it; run this as root or the collector's user, or give --url and --token"
            ) from None
        except OSError:
            return False
        return True


def reach(settings: Settings, url: str, token: str, ca_file: str) -> Client:
    """The way to the collector: a URL wins, then the local socket, then the store. Raises Failed."""
    if url:
        if not token:
            raise Failed(
                "give a token with --token or SEKISHO_TOKEN; make one with: sekisho-collector token create --role viewer"
            )
        return Networked(url, token, ca_file)
    if served(settings):
        return Networked("http://localhost", local=settings.socket)
    if settings.state_dir.exists() and not os.access(settings.state_dir, os.W_OK | os.X_OK):
        raise Failed(
            f"{settings.state_dir}: there is no collector here that you may use; run this as root, or give --url and --token"
        )
    return Direct(settings)
