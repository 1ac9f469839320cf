"""The first answer to a changing request, kept so that a resend gets it again.

A client that lost a reply sends the request once more with the same `Idempotency-Key`. Submissions
need none: their ids do the same, durably. Metrics are kept with the key in one commit; whatever
else is done twice, as after a restart, has the same effect as once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from fastapi.routing import APIRoute

from weaver.wire import check_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from fastapi import Request, Response

KEPT = 4096


@dataclass(slots=True, eq=False)
class _Entry:
    done: anyio.Event = field(default_factory=anyio.Event)
    response: Response | None = None


class Replies:
    """The last `KEPT` answers."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    async def once(self, key: bytes, respond: Callable[[], Awaitable[Response]]) -> Response:
        """The answer of the first `respond` for this key that gave one; waits while it runs."""
        while (entry := self._entries.get(key)) is not None:
            await entry.done.wait()
            if entry.response is not None:
                return entry.response
        entry = self._entries[key] = _Entry()
        try:
            entry.response = await respond()
        finally:
            if entry.response is None:
                del self._entries[key]
            entry.done.set()
        if len(self._entries) > KEPT:
            self._entries.popitem(last=False)
        return entry.response


class OnceRoute(APIRoute):
    """A route that answers a resend with the first answer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_once(request: Request) -> Response:
            key = request.headers.get("Idempotency-Key")
            if request.method == "GET":
                return await handle(request)
            check_json(await request.body(), share=2)
            request.state.resend_key = None
            if key is None:
                return await handle(request)
            replies: Replies = request.state.gateway.replies
            place = (request.state.caller.project, request.method, str(request.url), key)
            digest = hashlib.sha256(repr(place).encode())  # headers may be long
            request.state.resend_key = digest.hexdigest()
            return await replies.once(digest.digest(), lambda: handle(request))

        return handle_once
