"""What every request goes through: who asks, and may they; and for the record, who acts.

Owns: from a request to a caller, the limit of small bodies, and how long what was allowed once is believed. The handlers
themselves are in `door_agents`, `door_readers` and `door_admins`: each is parse, call, answer. `local=True` serves the
local socket and the command line on the store: whoever can open those is the administrator.
Must not know: routes, batches, SQL.
"""

from urllib.parse import unquote

from starlette.requests import Request

from server_stub import acts, auth, query
from server_stub.collector import Collector

SMALL_BODY = 64 << 10
"""Bytes of any body but a batch, at most."""


class Door:
    """Handlers over one collector share this."""

    def __init__(self, collector: Collector, local: bool) -> None:
        self.c, self.local = collector, local

    async def caller(self, request: Request, act: str) -> auth.Caller:
        """Who asks, once it is clear that they may `act`."""
        if self.local:
            return auth.LOCAL
        token = auth.bearer(request.headers.get("authorization"))
        who = await self.c.reading(lambda: auth.caller(self.c.store, token, self.c.now()))
        auth.permit(who, act)
        return who

    async def looked(self, request: Request, who: auth.Caller, operation: str, **more: str) -> None:
        """Put on record that `who` looks at what the request's filters name; only then may it be answered."""
        given = {name: value for name in query.FILTERS if (value := request.query_params.get(name, ""))} | more
        by = self.by(request, who)
        if not self.c.looks.again(by, operation, given, self.c.now()):
            self.c.looks.opened(await self.c.change(lambda writer: self.c.looks.begin(writer, by, operation, given)))

    def by(self, request: Request, who: auth.Caller) -> acts.By:
        """Who acts, for the record. On the local socket the command line says which login user it works for."""
        if not self.local:
            return acts.By(who.name, False, request.client.host if request.client else "unknown")
        person = unquote(request.headers.get("sekisho-person", ""))[:64]
        return acts.By(person or who.name, bool(person), "localhost")
