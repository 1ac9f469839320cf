"""The outermost layer of the app: what holds for every request before a route sees it.

A request id, the caller's project, the size of the body, one line in the log, the counters.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from weaver.errors import PermissionDeniedError, ServiceConnectionError, TooLargeError, WeaverError
from weaver.server.compat.weaver_rest_ids import PREFIX
from weaver.server.http.errors import error_response

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from weaver.server.http.front import Front

logger = logging.getLogger("weaver.server.http")

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json"})
"""Need no key: they say nothing of anybody's work."""
OPEN_FOLDERS = ("/console/", "/api/v1/downloads/")
"""Nor do the console's files; addresses of downloads carry their own right."""
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Of the request in whose course a log line is written."""


class Edge:
    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app = app
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("X-Request-ID", "")
        current = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(current)
        scope["state"] = {"front": self._front, "request_id": current}
        status = 500
        began = time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = current
            await send(message)

        tracing, method = self._front.tracing, scope["method"]
        span: AbstractContextManager[Span | None] = nullcontext()
        if tracing is not None:
            span = tracing.request(headers, method=method, request_id=current)
        with self._front.metrics.running.track_inprogress(), span as traced:
            try:
                await self._admit(scope, headers)
                limit = self._front.body_bytes(headers.get("Content-Type", ""), scope["path"])
                receive_some = _bounded(receive, limit, headers.get("Content-Length", ""))
            except WeaverError as error:
                await error_response(error, scope)(scope, receive, send_and_note)
            else:
                await self._app(scope, receive_some, send_and_note)
            finally:
                route = self._note(scope, status, time.perf_counter() - began)
                if traced is not None:
                    traced.update_name(f"{method} {route}")
                    traced.set_attribute("http.route", route)
                    traced.set_attribute("http.response.status_code", status)

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        """Finds the caller's project, and the service as that project sees it."""
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDERS):
            return
        if self._front.stopping.is_set():
            raise ServiceConnectionError("the server is stopping.", hint="Try again in a moment.")
        if self._front.keys is None:
            _check_local(headers)
        caller = await self._front.authenticate(headers)
        scope["state"]["caller"] = caller
        scope["state"]["service"] = self._front.service.seen_by(caller)

    def _note(self, scope: Scope, status: int, seconds: float) -> str:
        """Answers the route."""
        method, path = scope["method"], scope["path"]
        route = str(getattr(scope.get("route"), "path", "none"))
        if path.startswith(PREFIX) and route.startswith("/"):  # a router within another has no more
            route = PREFIX + route.removeprefix(PREFIX)
        if path.startswith(OPEN_FOLDERS):  # an address of a download is a right to it
            path = route
        self._front.metrics.answered(method, route, status, seconds)
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
        return route


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
