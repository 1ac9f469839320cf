"""`create_app`: the ASGI application over a service; run by `weaver serve` and by tests.

It finds the adapter whose request it is, and does what holds for every request: a request id, the
caller's project, the size of the body, one line in the log, the counters.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from weaver.errors import PermissionDeniedError, ServiceConnectionError, TooLargeError, WeaverError
from weaver.server.http.adapter import Adapter, Found
from weaver.server.http.errors import add_error_handlers, error_response, native_envelope
from weaver.server.http.gateway import BODY_LIMITS, GatewayDep
from weaver.server.http.telemetry import request_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from weaver.server.http.gateway import Gateway

logger = logging.getLogger("weaver.server.http")

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CLIENT_GONE = 499
"""In the log, of a request whose client did not wait for the answer."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


def create_app(gateway: Gateway, adapters: Sequence[Adapter]) -> ASGIApp:
    """The application; whoever calls it opens and closes the service and the database."""
    return App(gateway, adapters)


class App:
    """Hands each request to the adapter that has a route for it."""

    def __init__(self, gateway: Gateway, adapters: Sequence[Adapter]) -> None:
        self._gateway = gateway
        own = _own_routes(adapters)
        self._adapters = sorted([own, *adapters], key=lambda one: -len(one.prefix))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _framework()(scope, receive, send)
            return
        adapter, found = self._find(scope)
        headers = Headers(scope=scope)
        given = headers.get("X-Request-ID", "")
        current = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(current)
        scope["state"] = {
            "gateway": self._gateway,
            "request_id": current,
            "envelope": adapter.envelope,
        }
        status = 0
        began = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = current
            await send(message)

        tracing, method = self._gateway.tracing, scope["method"]
        span: AbstractContextManager[Span | None] = nullcontext()
        if tracing is not None:
            span = tracing.request(headers, method=method, request_id=current)
        with self._gateway.metrics.running.track_inprogress(), span as traced:
            try:
                if not adapter.opens(scope["path"]):
                    await self._admit(scope, headers)
                limit = self._gateway.body_bytes(
                    adapter.body_limit(headers.get("Content-Type", ""))
                )
                receive_some = _bounded(receive, limit, headers.get("Content-Length", ""))
            except WeaverError as error:
                await error_response(error, scope)(scope, receive, send_and_note)
            else:
                scope["found"] = found
                await _framework()(scope, receive_some, send_and_note)
                status = status or CLIENT_GONE
            finally:
                status = status or 500
                route = str(getattr(scope.get("route"), "path", "none"))
                path = route if adapter.hides(scope["path"]) else scope["path"]
                self._note(scope, path, route, status, time.perf_counter() - began)
                if traced is not None:
                    traced.update_name(f"{method} {route}")
                    traced.set_attribute("http.route", route)
                    traced.set_attribute("http.response.status_code", status)

    def _find(self, scope: Scope) -> tuple[Adapter, Found]:
        """The adapter that the request is for: by its routes; by its prefix if nobody has one."""
        otherwise: tuple[Adapter, Found] | None = None
        for adapter in self._adapters:
            if scope["path"].startswith(adapter.prefix):
                found = adapter.match(scope)
                if found[0] is Match.FULL:
                    return adapter, found
                if otherwise is None or found[0].value > otherwise[1][0].value:
                    otherwise = adapter, found
        assert otherwise is not None  # the server's own routes begin with anything
        return otherwise

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
        if method == "GET" and status < 400:  # clients, pages and probes poll; all are counted
            level = logging.DEBUG
        logger.log(level, "%s %s %s", method, path, status, extra={"fields": fields})


class _Found(BaseRoute):
    """The route that `App` has found for the request."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if "found" in scope else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, route, child_scope = scope["found"]
        if route is None:
            raise HTTPException(404)
        scope["route"] = route
        scope.update(child_scope)
        await route.handle(scope, receive, send)


@cache
def _framework() -> FastAPI:
    """What turns errors into answers around a route, the same for all servers of a process."""
    app = FastAPI(routes=[_Found()], openapi_url=None, redirect_slashes=False)
    add_error_handlers(app)
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


def _bounded(receive: Receive, limit: int, declared: str) -> Receive:
    """`receive` that ends a body above the limit, before it has been read if its length is given.

    Raises:
        TooLargeError: by its Content-Length; later an HTTPException, which frameworks let through.
    """
    hint = "Send less at once."
    if declared.isdecimal() and int(declared) > limit:
        raise TooLargeError(f"the body has {declared} bytes, the limit is {limit}.", hint=hint)
    received = 0

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


def _own_routes(adapters: Sequence[Adapter]) -> Adapter:
    """Is the server well, and what is there; also answers what nobody has a route for."""
    router = APIRouter(include_in_schema=False)
    router.add_api_route("/healthz", healthz)
    router.add_api_route("/readyz", readyz)
    router.add_api_route("/metrics", metrics)

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def openapi() -> Response:
        document = await to_thread.run_sync(_document, tuple(adapters))
        return Response(document, media_type="application/json")

    return Adapter(
        routes=router.routes,
        prefix="",
        envelope=native_envelope,
        body_limits=BODY_LIMITS,
        open_paths=("/healthz", "/readyz", "/openapi.json"),
    )


async def healthz() -> dict[str, str]:
    return {"status": "alive"}


async def readyz(gateway: GatewayDep, response: Response) -> dict[str, str]:
    if gateway.stopping.is_set():
        response.status_code = 503
    return {"status": "stopping" if gateway.stopping.is_set() else "ready"}


async def metrics(gateway: GatewayDep, request: Request) -> Response:
    if not request.state.caller.admin:
        raise PermissionDeniedError("metrics of the server need an administrator's key.")
    return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4")


@cache
def _document(adapters: tuple[Adapter, ...]) -> bytes:
    """OpenAPI's, of all routes that are in its schema; slow, the first time."""
    document = get_openapi(
        title="Weaver",
        version="0.1.0",
        description="Ordered operations on language models in training. See docs/wire.md.",
        routes=[route for adapter in adapters for route in adapter.routes],
    )
    document["components"]["securitySchemes"] = SECURITY
    document["security"] = [{name: []} for name in SECURITY]
    return bytes(JSONResponse(document).body)
