"""`run_server`: a service and its HTTP front on a socket, until they are told to stop.

Called by `weaver serve`. Stopping takes at most `GRACE_S`: long polls end, new requests are told to
come back, requests that run are waited for, then the service is closed.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from weaver.server.adapters import ADAPTERS
from weaver.server.database import open_database
from weaver.server.http.app import App
from weaver.server.http.gateway import Gateway
from weaver.server.http.telemetry import watch
from weaver.server.journal import Journal
from weaver.server.keys import Keys
from weaver.server.preflight import check_keys, listen
from weaver.server.service import LocalService
from weaver.server.totals import tell_totals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weaver.engine.base import Engine
    from weaver.server.settings import ServerSettings

GRACE_S = 10
MAX_HEAD_BYTES = 2**16
"""What the request line and header fields may have, and as much between two pieces of a body. What
is read at once, at most 256 KiB, may be above it."""
REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


GARBAGE = 50_000, 20, 100
"""When Python looks for circles: with ten thousand samples that wait, it stops the event loop for
tenths of a second each time, and by default it does so at every thousand of them."""

SWITCH_S = 0.001
"""How long the engine's thread may keep the event loop, where both run Python: by default 5 ms, at
each of its calls that lets go of the interpreter, such as a send."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers; `stop` may be called from any thread."""

    address: str
    stop: Callable[[], None]


async def run_server(
    engine: Engine, settings: ServerSettings, *, started: Callable[[Running], None]
) -> None:
    """Serves until SIGINT, SIGTERM or `stop`.

    Raises:
        ConfigError: it cannot listen there, or would be open to others without keys.
        ConflictError: another server has its home or its database.
    """
    gc.set_threshold(*GARBAGE)
    sys.setswitchinterval(SWITCH_S)
    check_keys(settings)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(settings.host, settings.port))
        # Connections inherit it. asyncio sets it only on sockets it has made itself, and without it
        # each reply waits 40 ms for the client's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        database = open_database(settings.home, settings.database_url)
        stack.callback(database.dispose)
        store = Journal(database)
        stack.enter_context(store.writer.alone())
        async with LocalService(
            engine,
            home=settings.home,
            store=store,
            deterministic=settings.deterministic,
            durability=settings.durability,
            limits=settings.limits,
        ) as service:
            keys = Keys(database) if settings.auth else None
            gateway = Gateway(service, keys, folder=settings.home)
            if settings.otel_endpoint:
                from weaver.server.http.tracing import Tracing, to_collector

                gateway.tracing = Tracing(to_collector(settings.otel_endpoint))
                stack.callback(gateway.tracing.close)
                service.parts.activity.on_end = gateway.tracing.operation
            await _serve(gateway, listener, started)


async def _serve(
    gateway: Gateway, listener: socket.socket, started: Callable[[Running], None]
) -> None:
    config = uvicorn.Config(
        App(gateway, ADAPTERS),
        http=Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit  # asked twice: leave at once
        server.should_exit = True
        gateway.stop()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    loop.call_soon(started, Running(address, lambda: _call(loop, stop)))
    async with watch(), anyio.create_task_group() as tasks:
        tasks.start_soon(tell_totals, gateway.service.parts.activity)
        await server.serve(sockets=[listener])
        tasks.cancel_scope.cancel()


class Connection(HttpToolsProtocol):
    """HTTP/1.1 on one socket, as uvicorn reads it, with a bound on what is not a body.

    The parser below it has no limit of its own: without this one, header fields that never end
    would fill the memory before anybody has shown a key.
    """

    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(REFUSAL)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone: uvicorn would raise them again before the service has closed."""
        yield


def _call(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(stop)
