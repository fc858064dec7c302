"""Serving: two listeners over one collector (the network and the local socket), the supervisor's pings, a clean end.

Owns: uvicorn's settings and limits, the time a client may take over its request's head, sockets, signals, sd_notify(3).
Must not know: routes, events. SIGTERM and SIGINT stop it: no new requests, live readers are let go, what is being
committed is finished, then the store is closed.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server_stub.app import create_app
from server_stub.collector import Collector, opened
from server_stub.config import ConfigError, Settings, short_path

HEAD_TIMEOUT_S = 15.0
KEEP_ALIVE_S = 75
MAX_HEAD_BYTES = 32 << 10
GRACE_S = 10
WANTED_DESCRIPTORS = 65_536
log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """sd_notify(3): tell the supervisor, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
        except OSError as error:
            log.warning("the supervisor can't be told state=%s error=%s", state, error)


class Protocol(H11Protocol):
    """uvicorn's, with a limit on how long a request's head may take: a slow client holds a connection, not for ever."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected: its first head is awaited."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Bytes came: either they finish a head, or the clock that started with its first byte goes on."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        elif self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def on_response_complete(self) -> None:
        """An answer is out; if the next request has begun already, its head is on the clock."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._too_slow)

    def _too_slow(self) -> None:
        self.head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, without its own signal handlers: there are two of them in one loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None of ours."""
        yield


def _server(collector: Collector, local: bool, **more: Any) -> Server:
    config = uvicorn.Config(
        create_app(collector, local),
        loop="asyncio",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        **more,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f'"tls_cert" or "tls_key" can\'t be used ({error}); give PEM files that belong together') from None
    return Server(config)


def _listen(settings: Settings) -> socket.socket:
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sock = socket.socket(found[0][0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[0][4])
        sock.listen(2048)
        sock.setblocking(False)
        return sock
    except OSError as error:
        raise ConfigError(
            f"can't listen on {settings.host}:{settings.port} ({error.strerror}); choose another address"
        ) from None


def _listen_local(path: Path) -> socket.socket:
    """The local socket, 0600. Only the holder of the lock comes here, so one that is left over is dead."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with short_path(path) as name:
            sock.bind(name)
    except OSError as error:
        raise ConfigError(f"{path}: can't be used as a socket ({error}); choose another state_dir") from None
    finally:
        os.umask(before)
    sock.listen(128)
    sock.setblocking(False)
    return sock


async def _watchdog(collector: Collector) -> None:
    """Ping while the loop turns and the writer lives (systemd.service(5), WatchdogSec)."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    if not wanted.isdecimal() or not int(wanted):
        return
    while True:
        if collector.writer.running():
            notify("WATCHDOG=1")
        await asyncio.sleep(int(wanted) / 2_000_000)


def _raise_descriptor_limit() -> None:
    """Every agent holds a connection open: as many as are allowed to us, and more if we may allow them to ourselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(hard, WANTED_DESCRIPTORS)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (ValueError, OSError):  # raising the hard limit takes CAP_SYS_RESOURCE (setrlimit(2))
        wanted = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("descriptors limit=%d", wanted)


async def serve(settings: Settings, ready: Any = None) -> None:
    """Serve until SIGTERM or SIGINT. `ready(url)` is called once it answers. Raises ConfigError, StoreError."""
    _raise_descriptor_limit()
    tls = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key} if settings.tls_cert else {}
    async with opened(settings, served=True) as collector:
        servers = [
            (_server(collector, False, **tls), _listen(settings)),
            (_server(collector, True), _listen_local(settings.socket)),
        ]
        port = servers[0][1].getsockname()[1]

        def stop() -> None:
            notify("STOPPING=1")
            collector.stop()
            for server, _ in servers:
                server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            collector.loop.add_signal_handler(number, stop)
        running = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
        watchdog = asyncio.create_task(_watchdog(collector))
        try:
            while not all(server.started for server, _ in servers) and not any(task.done() for task in running):
                await asyncio.sleep(0.005)
            notify("READY=1")
            if ready is not None:
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                ready(f"{'https' if tls else 'http'}://{host}:{port}")
            await asyncio.gather(*running)
        finally:
            watchdog.cancel()
            settings.socket.unlink(missing_ok=True)
