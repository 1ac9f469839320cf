"""`Front`: the HTTP server of all endpoints of a process, in a thread and an event loop of its own.

It lives as long as the process, so that who asks an agent that has ended is told so.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import anyio
import uvicorn
from anyio.lowlevel import current_token
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from weaver.errors import (
    AuthenticationError,
    NotFoundError,
    TooLargeError,
    WeaverError,
)
from weaver.server.adapters.openai.answers import failed, model_json
from weaver.server.adapters.openai.bodies import ChatBody
from weaver.server.http.body import json_of
from weaver.server.http.errors import STATUS
from weaver.server.http.streaming import until_gone
from weaver.threads import call_soon
from weaver_rl.endpoint.desk import THEIRS, Asked, Desk, ended

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

BODY_BYTES = 32 * 2**20
MOST_ENDED = 2**16
"""Addresses of agents that have ended, the last of which are remembered."""
ROUTES = "POST .../v1/chat/completions, GET .../v1/models"


@cache
def _front(process: int) -> Front:
    return Front()


def front() -> Front:
    """The one of this process, which begins with the first endpoint; a fork has its own."""
    return _front(os.getpid())


class Front:
    """An ASGI application and its server on a free port of 127.0.0.1. Its state is its loop's."""

    def __init__(self) -> None:
        self._desks: dict[str, Desk] = {}
        self._ended: dict[str, None] = {}
        self._waiting: dict[Asked, str] = {}
        """Requests on their way, and the addresses that they were sent to."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ready = threading.Event()
        self._loop: object = None
        work = threading.Thread(target=self._run, name="weaver-endpoints", daemon=True)
        work.start()
        self._ready.wait(10)

    @contextmanager
    def opened(self, desk: Desk) -> Iterator[str]:
        """Requests to this address go to the desk, until this is left. In the desk's loop."""
        key = secrets.token_urlsafe(32)
        call_soon(self._loop, lambda: self._desks.update({key: desk}))
        port = self._listener.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/{key}/v1"
        finally:
            call_soon(self._loop, lambda: self._end(key))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            answer = await self._respond(request)
        except WeaverError as error:
            status = STATUS.get(error.code)
            if status is None:
                status = 422 if isinstance(error, THEIRS) else 500
            # some clients would try again, and the agent would have another turn
            again = {"x-should-retry": "false"}
            answer = JSONResponse(failed(error, status=status), status_code=status, headers=again)
        await answer(scope, receive, send)

    def _run(self) -> None:
        anyio.run(self._serve, backend="asyncio")

    async def _serve(self) -> None:
        self._loop = current_token().native_token
        self._ready.set()
        config = uvicorn.Config(
            self,
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        await uvicorn.Server(config).serve(sockets=[self._listener])

    async def _respond(self, request: Request) -> Response:
        """
        Raises:
            AuthenticationError, ClosedError, NotFoundError: not the address of an agent that plays.
            WeaverError: the request is refused.
        """
        _, key, *names = request.url.path.split("/")
        desk = self._desks.get(key)
        if desk is None:
            if key in self._ended:
                raise ended()
            hint = "Take the address of rl.endpoint(agent) as a whole."
            raise AuthenticationError("there is no such endpoint.", hint=hint)
        match request.method, names:
            case "POST", ["v1", "chat", "completions"]:
                return await self._chat(request, desk, key)
            case "GET", ["v1", "models"]:
                models = [model_json(desk.agent.base_model, created=0)]
                return JSONResponse({"object": "list", "data": models})
            case "GET", ["v1", "models", *_]:
                return JSONResponse(model_json(desk.agent.base_model, created=0))
        what = f"{request.method} /{'/'.join(names)}"
        raise NotFoundError(f"{what} is not answered here.", hint=f"There are {ROUTES}.")

    async def _chat(self, request: Request, desk: Desk, key: str) -> Response:
        body = ChatBody.of(json_of(await _read(request)))
        asked = Asked(body)
        self._waiting[asked] = key
        desk.ask(asked)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(until_gone, request.receive, tasks.cancel_scope)
                await asked.done.wait()
                tasks.cancel_scope.cancel()
        finally:
            del self._waiting[asked]
            if not asked.done.is_set():
                desk.leave(asked)
        if isinstance(asked.answer, WeaverError):
            raise asked.answer
        kind = "text/event-stream" if body.stream else "application/json"
        return Response(asked.answer, media_type=kind)

    def _end(self, key: str) -> None:
        del self._desks[key]
        self._ended[key] = None
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        for asked, address in self._waiting.items():
            if address == key:
                asked.told(ended())


async def _read(request: Request) -> bytes:
    """Raises TooLargeError, before the rest is read."""
    size, pieces = int(request.headers.get("Content-Length", 0)), []
    if size <= BODY_BYTES:
        size = 0
        async for piece in request.stream():
            size += len(piece)
            pieces.append(piece)
            if size > BODY_BYTES:
                break
    if size > BODY_BYTES:
        raise TooLargeError(f"has more than {BODY_BYTES} bytes.", field="body", hint="Send less.")
    return b"".join(pieces)
