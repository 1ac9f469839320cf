"""`App`: the ASGI application over a service; run by `weaver serve` and by tests.

It finds the adapter whose request it is, and does what holds for every request: a request id, the
caller's project, the size of the body, one line in the log, the counters.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from weaver.errors import PermissionDeniedError, ServiceConnectionError, TooLargeError, WeaverError
from weaver.server.http.errors import answer, error_response
from weaver.server.http.gateway import Adapter, Gateway, GatewayDep
from weaver.server.http.telemetry import request_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.trace import Span
    from starlette.types import Message, Receive, Scope, Send

logger = logging.getLogger("weaver.server.http")

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CLIENT_GONE = 499
"""In the log, of a request whose client did not wait for the answer."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

QUIET = re.compile(
    r"/(samples|asample|logprobs|completions|tokenize|retrieve_futures?"
    r"|(session_)?heartbeat|telemetry)$"
)
"""Routes that are asked all the time, as are those that only read: samples have lines of their own,
and all requests are counted."""


class App:
    """Hands each request to the adapter that has a route for it.

    Whoever makes it opens and closes the service and the database.
    """

    def __init__(self, gateway: Gateway, adapters: Sequence[Adapter]) -> None:
        self._gateway = gateway
        self._adapters = sorted([_own(adapters), *adapters], key=lambda one: -len(one.prefix))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _framework()(scope, receive, send)
            return
        adapter, *found = self._find(scope)
        scope["found"] = found
        hidden = scope["path"].startswith(adapter.open_below)
        headers, method = Headers(scope=scope), scope["method"]
        given = headers.get("X-Request-ID", "")
        current = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(current)
        gateway, began, status = self._gateway, time.perf_counter(), 0
        scope["state"] = {"gateway": gateway, "request_id": current, "envelope": adapter.envelope}

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = current
            await send(message)

        span: AbstractContextManager[Span | None] = nullcontext()
        if gateway.tracing is not None:
            span = gateway.tracing.request(headers, method=method, request_id=current)
        with gateway.metrics.running.track_inprogress(), span as traced:
            try:
                if not hidden and scope["path"] not in adapter.open_paths:
                    await self._admit(scope, headers)
                limit = gateway.body_bytes(adapter, headers.get("Content-Type", ""))
                bounded = _bounded(receive, limit, headers)
            except WeaverError as error:
                await error_response(error, scope)(scope, receive, send_and_note)
            else:
                await _framework()(scope, bounded, send_and_note)
                status = status or CLIENT_GONE
            finally:
                status = status or 500
                route = str(getattr(scope.get("route"), "path", "none"))
                path = route if hidden else scope["path"]
                self._note(scope, path, route, status, time.perf_counter() - began)
                if traced is not None:
                    traced.update_name(f"{method} {route}")
                    traced.set_attribute("http.route", route)
                    traced.set_attribute("http.response.status_code", status)

    def _find(self, scope: Scope) -> tuple[Adapter, BaseRoute | None, Scope]:
        """The adapter that the request is for, its route, and what that adds to the scope.

        It has a route for the path and the method, or else for the path, or else the prefix.
        """
        below = [one for one in self._adapters if scope["path"].startswith(one.prefix)]
        best: tuple[Adapter, BaseRoute | None, Scope] = below[0], None, {}
        for adapter in below:
            for route in adapter.routes:
                match, child_scope = route.matches(scope)
                if match is Match.FULL:
                    return adapter, route, child_scope
                if match is Match.PARTIAL and best[1] is None:
                    best = adapter, route, child_scope
        return best

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        """Finds the caller's project, and the service as that project sees it."""
        if self._gateway.stopping.is_set():
            raise ServiceConnectionError("the server is stopping.", hint="Try again in a moment.")
        if self._gateway.keys is None:
            _check_local(headers)
        caller = await self._gateway.authenticate(headers)
        scope["state"]["caller"] = caller
        scope["state"]["service"] = self._gateway.service.seen_by(caller)

    def _note(self, scope: Scope, path: str, route: str, status: int, seconds: float) -> None:
        method = scope["method"]
        self._gateway.metrics.answered(method, route, status, seconds)
        caller = scope["state"].get("caller")
        fields = {
            "method": method,
            "path": path,
            "status": status,
            "milliseconds": round(1000 * seconds, 1),
            "project": caller.project if caller else None,
            **scope["state"].get("logged", {}),
        }
        level = logging.WARNING if status >= 500 else logging.INFO
        quiet = method == "GET" or QUIET.search(route) or scope["state"].get("quiet")
        if status < 400 and quiet:
            level = logging.DEBUG
        logger.log(level, "%s %s %s", method, path, status, extra={"fields": fields})


class _Found(BaseRoute):
    """The route that `App` has found for the request."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if "found" in scope else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        route, child_scope = scope["found"]
        if route is None:
            raise HTTPException(404)
        scope.update(child_scope, route=route)
        await route.handle(scope, receive, send)


@cache
def _framework() -> FastAPI:
    """What turns errors into answers around a route, the same for all servers of a process."""
    app = FastAPI(routes=[_Found()], openapi_url=None, redirect_slashes=False)
    for kind in (WeaverError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    return app


def _check_local(headers: Headers) -> None:
    """Without keys, whatever runs in the user's browser must not reach the server.

    Raises:
        PermissionDeniedError: another site's page asks, or a name that was bent to this machine.
    """
    host = urlsplit(f"//{headers.get('Host', '')}")
    origin = headers.get("Origin")
    if host.hostname in LOCAL_NAMES and origin in (None, f"http://{host.netloc}"):
        return
    raise PermissionDeniedError(
        "a server without keys answers only to this machine.",
        hint="Use http://127.0.0.1, or start the server with keys.",
    )


def _bounded(receive: Receive, limit: int, headers: Headers) -> Receive:
    """`receive` that ends a body above the limit, before it has been read if its length is given.

    Raises:
        TooLargeError: by its Content-Length; later an HTTPException, which frameworks let through.
    """
    received, declared = 0, headers.get("Content-Length", "")
    if declared.isdecimal() and int(declared) > limit:
        message = f"the body has {declared} bytes, the limit is {limit}."
        raise TooLargeError(message, hint="Send less at once.")

    async def receive_some() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"The body has more than {limit} bytes, which is the limit")
        return message

    return receive_some


# --- the server's own routes --------------------------------------------------------------------

SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-WEAVER-API-KEY"},
}
"""For the OpenAPI page only: the key has been checked before a route is reached."""


def _own(adapters: Sequence[Adapter]) -> Adapter:
    """Is the server well, and what is there; also answers what nobody has a route for."""
    router = APIRouter(include_in_schema=False)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz")
    async def readyz(gateway: GatewayDep, response: Response) -> dict[str, str]:
        if not gateway.stopping.is_set():
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "stopping"}

    @router.get("/metrics")
    async def metrics(gateway: GatewayDep, request: Request) -> Response:
        if not request.state.caller.admin:
            raise PermissionDeniedError("metrics of the server need an administrator's key.")
        return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4")

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def openapi() -> Response:
        document = await to_thread.run_sync(_document, tuple(adapters))
        return Response(document, media_type="application/json")

    open_paths = ("/healthz", "/readyz", "/openapi.json")
    return Adapter(routes=router.routes, prefix="", open_paths=open_paths)


@cache
def _document(adapters: tuple[Adapter, ...]) -> bytes:
    """OpenAPI's, of all routes that are in its schema; slow, the first time."""
    document = FastAPI(
        title="Weaver",
        description="Ordered operations on language models in training. See docs/wire.md.",
        routes=[route for adapter in adapters for route in adapter.routes],
    ).openapi()
    document["components"]["securitySchemes"] = SECURITY
    document["security"] = [{name: []} for name in SECURITY]
    return bytes(JSONResponse(document).body)
