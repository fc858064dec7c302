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
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

import msgspec

from server_stub.config import Settings, is_loopback, short_path

if TYPE_CHECKING:
    from server_stub.collector import Collector

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
        with short_path(self.path) as path:
            self.sock.connect(path)


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

    def request(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """The body of a good answer. Raises Failed."""
        raise NotImplementedError

    def get(self, target: str) -> Any:
        """A JSON answer."""
        return msgspec.json.decode(self.request("GET", target))

    def lines(self, target: str, headers: dict[str, str]) -> Generator[bytes, None, None]:
        """The lines of a streamed answer, without their ends, as they come. Raises Failed."""
        raise NotImplementedError

    def parts(self, target: str) -> Generator[bytes, None, None]:
        """The bytes of a streamed answer, as they come. Raises Failed."""
        raise NotImplementedError


class Networked(Client):
    """By HTTP, over TCP or the local socket."""

    def __init__(self, url: str, token: str = "", ca_file: str = "", local: Path | None = None) -> None:
        self.url, self.token, self.local = url, token, local
        self.where = str(local) if local else url
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise Failed(f"{url!a} is no URL; its port must be a number, like https://collector.example:8443") from None
        if not (url.isascii() and url.isprintable()):
            raise Failed(f"{url!a} is no URL; write it in plain ASCII, like https://collector.example:8443")
        if not (token.isascii() and token.isprintable()):
            raise Failed("the token holds characters that no token has; give it as it was printed when it was made")
        if not local and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise Failed(f'"{url}" is no URL of a collector; write it like https://collector.example:8443')
        if not local and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            raise Failed(f'"{url}" would send the token unprotected; use https://')
        self.host, self.port = parts.hostname or "", port
        self.tls, self.base = parts.scheme == "https", parts.path.rstrip("/")
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
        except http.client.IncompleteRead:
            raise Failed(f"{self.where}: the answer broke off, what came of it is not all; ask again") from None
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{self.where}: the collector does not answer ({error or type(error).__name__})") from None
        finally:
            connection.close()

    def request(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """See Client."""
        with self._answer(method, target, body, dict(headers or {})) as answer:
            return answer.read()

    def lines(self, target: str, headers: dict[str, str]) -> Generator[bytes, None, None]:
        """See Client."""
        with self._answer("GET", target, None, headers) as answer:
            rest, left = b"", answer.length
            # Not readline(): it takes a chunked body that ends early for whole. read1() does so if there is a length.
            while part := answer.read1(1 << 16):
                left = None if left is None else left - len(part)
                *whole, rest = (rest + part).split(b"\n")
                for line in whole:
                    yield line.rstrip(b"\r")
            if rest or left:
                raise http.client.IncompleteRead(rest, left)

    def parts(self, target: str) -> Generator[bytes, None, None]:
        """See Client."""
        with self._answer("GET", target, None, {}) as answer:
            left = answer.length
            while part := answer.read1(1 << 16):
                left = None if left is None else left - len(part)
                yield part
            if left:
                raise http.client.IncompleteRead(b"", left)


class Direct(Client):
    """On the store, when no collector is served: the same routes, run in this process, with the rights of its owner."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.where = settings, str(settings.state_dir)

    def request(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        """See Client."""
        return b"".join(self._parts(method, target, b"" if body is None else msgspec.json.encode(body), headers or {}))

    def lines(self, target: str, headers: dict[str, str]) -> Generator[bytes, None, None]:
        """See Client."""
        rest = b""
        with contextlib.closing(self._parts("GET", target, b"", headers)) as parts:
            for part in parts:
                *whole, rest = (rest + part).split(b"\n")
                yield from whole

    def parts(self, target: str) -> Generator[bytes, None, None]:
        """See Client."""
        yield from self._parts("GET", target, b"", {})

    def _parts(self, method: str, target: str, body: bytes, headers: dict[str, str]) -> Generator[bytes, None, None]:
        """The body of a good answer, part by part, as the route makes them: a large store is never held in memory."""
        with as_owner(self.settings.state_dir), asyncio.Runner() as runner:
            answer = self._answer(method, target, body, headers)
            try:
                while (part := runner.run(anext(answer, None))) is not None:
                    yield part
            finally:
                runner.run(answer.aclose())

    async def _answer(self, method: str, target: str, body: bytes, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
        from server_stub.app import create_app
        from server_stub.collector import opened

        path, _, query = target.partition("?")
        sent = {name.lower().encode(): value.encode() for name, value in headers.items()}
        if name := person():
            sent[b"sekisho-person"] = quote(name).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": unquote(path), "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": list(sent.items()), "client": None, "server": None,
        }  # fmt: skip
        made: asyncio.Queue[Any] = asyncio.Queue(4)
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop()

        async def run(collector: "Collector") -> None:
            try:
                await create_app(collector, local=True)(scope, receive, made.put)
            except Exception as error:
                # After the first byte of an answer there is no status left to say it with.
                await made.put(error)

        async with opened(self.settings) as collector:
            running = asyncio.create_task(run(collector))
            try:
                status, told, more = 0, b"", True
                while more:
                    message = await made.get()
                    if isinstance(message, Exception):
                        raise Failed(f"{self.where}: the answer broke off, what came of it is not all ({message})")
                    status = message.get("status", status)
                    more = message["type"] == "http.response.start" or message.get("more_body", False)
                    told = message.get("body", b"")
                    if status >= 400 and told:
                        raise _said(status, told)
                    if told:
                        yield told
            finally:
                # Whoever asked has heard enough, perhaps of a stream without end: let it go before the store is closed.
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running


@contextlib.contextmanager
def as_owner(state_dir: Path) -> Iterator[None]:
    """As root, work with the rights of whom the state belongs to: a file made here must be one the service can use."""
    if os.geteuid() != 0 or not state_dir.exists() or (owner := state_dir.stat()).st_uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def served(settings: Settings) -> bool:
    """Whether a collector listens on the local socket. Raises Failed if it does but we may not ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        try:
            with short_path(settings.socket) as path:
                sock.connect(path)
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
