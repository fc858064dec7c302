"""The routes, health, and the front page: which path and method goes to which handler.

Owns: the table of routes, HEAD as GET, and turning every refusal into its problem. The handlers are behind four doors:
`door_agents`, `door_readers`, `door_log`, `door_admins`. The same routes serve the network, the local socket and the
command line working directly on the store. Must not know: what is behind the doors.
"""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from server_stub import pages
from server_stub.answers import REFUSALS, Refused, answer, on_crash, on_http, refusal
from server_stub.collector import Collector
from server_stub.commit import Busy, Writer
from server_stub.door_admins import AdminDoor
from server_stub.door_agents import AgentDoor
from server_stub.door_log import LogDoor
from server_stub.door_readers import ReaderDoor
from server_stub.door_register import RegisterDoor
from server_stub.store import StoreError

READY_S = 5.0
"""How long a commit may take before the collector says that it is not ready."""
Handler = Callable[[Request], Awaitable[Response]]


class Health:
    """What anybody may ask: is it alive, is it ready, how much has it done; and the front page."""

    def __init__(self, collector: Collector) -> None:
        self.c = collector

    async def healthz(self, _request: Request) -> Response:
        """GET /healthz: the loop turns and the writer's thread lives."""
        if not self.c.writer.running():
            raise Refused(503, "the thread that writes has ended; restart the collector, its log says more")
        return answer({"status": "ok"})

    async def readyz(self, _request: Request) -> Response:
        """GET /readyz: a commit went through just now; one that is rolled back would not find a full disk."""
        try:
            await asyncio.wait_for(self.c.change(_touch), READY_S)
        except (Busy, StoreError, TimeoutError) as error:
            why = str(error) or f"no commit within {READY_S:.0f} s"
            raise Refused(503, f"the store is not writable: {why}", {"Retry-After": "2"}) from None
        return answer({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        return PlainTextResponse(pages.metrics(self.c), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def home(self, _request: Request) -> Response:
        """GET /."""
        return HTMLResponse(pages.HOME, headers=pages.HOME_HEADERS)


def _touch(writer: Writer) -> None:
    put = "INSERT INTO meta VALUES ('ready', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    writer.session.execute(put, (str(writer.now()),))


def _guarded(handler: Handler) -> Handler:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except REFUSALS as error:
            return refusal(error)

    return run


def table(collector: Collector, local: bool) -> list[tuple[str, str, Handler]]:
    """Every route: method, path, handler."""
    agents, readers = AgentDoor(collector, local), ReaderDoor(collector, local)
    admins, health, log = AdminDoor(collector, local), Health(collector), LogDoor(collector, local)
    register = RegisterDoor(collector, local)
    return [
        ("POST", "/v1/enroll", agents.enroll),
        ("POST", "/v1/batches", agents.batches),
        ("GET", "/v1/register", agents.register),
        ("GET", "/v1/events", readers.events),
        ("GET", "/v1/events/stream", readers.stream),
        ("GET", "/v1/events/{uid}", readers.event),
        ("GET", "/v1/events/{uid}/proof", readers.proof),
        ("GET", "/v1/counts", readers.counts),
        ("GET", "/v1/agents", readers.agents),
        ("GET", "/v1/media", register.media),
        ("POST", "/v1/media", register.act),
        ("GET", "/v1/groups", register.groups),
        ("PUT", "/v1/groups/{name}", register.put_group),
        ("DELETE", "/v1/groups/{name}", register.drop_group),
        ("GET", "/v1/media/{key:path}", register.medium),
        ("PUT", "/v1/media/{key:path}", register.approve),
        ("DELETE", "/v1/media/{key:path}", register.revoke),
        ("GET", "/v1/tokens", admins.tokens),
        ("POST", "/v1/tokens", admins.create_token),
        ("DELETE", "/v1/tokens/{id}", admins.revoke_token),
        ("GET", "/v1/log/checkpoint", log.checkpoint),
        ("GET", "/v1/log/consistency", log.consistency),
        ("GET", "/v1/log/keys", log.keys),
        ("POST", "/v1/log/witness", log.carry),
        ("GET", "/v1/export", log.export),
        ("POST", "/v1/retention", log.erase),
        ("POST", "/add-checkpoint", log.add_checkpoint),
        ("GET", "/healthz", health.healthz),
        ("GET", "/readyz", health.readyz),
        ("GET", "/metrics", health.metrics),
        ("GET", "/", health.home),
    ]


def create_app(collector: Collector, local: bool = False) -> Starlette:
    """The routes over `collector`; `local`: for the socket and the command line of its own machine."""
    paths: dict[str, dict[str, Handler]] = {}
    for method, path, handler in table(collector, local):
        paths.setdefault(path, {})[method] = _guarded(handler)
    routes = [Route(path, _by_method(handlers), methods=list(handlers)) for path, handlers in paths.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: on_http, Exception: on_crash})


def _by_method(handlers: dict[str, Handler]) -> Handler:
    async def run(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return run
