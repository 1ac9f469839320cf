"""A server in the test's process: the fake engine behind the HTTP gateway, without a socket."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from queue import Queue
from typing import TYPE_CHECKING

import httpx

from tests.fake_engine import FakeEngine
from weaver.client.http import HttpService
from weaver.errors import WeaverError
from weaver.server.adapters import ADAPTERS
from weaver.server.database import open_database
from weaver.server.http.app import App
from weaver.server.http.gateway import Gateway
from weaver.server.journal import Journal
from weaver.server.keys import Keys
from weaver.server.serve import Running, run_server
from weaver.server.service import LocalService
from weaver.server.settings import SERVED, Limits, ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from starlette.types import ASGIApp

    from weaver.engine.base import Engine
    from weaver.protocol import Service
    from weaver.server.view import View

ADDRESS = "http://localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    app: ASGIApp
    gateway: Gateway
    service: View
    keys: Keys

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.app)

    def client(self, api_key: str | None = None) -> HttpService:
        return HttpService(ADDRESS, api_key=api_key, transport=self.transport())

    def http(self, api_key: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(base_url=ADDRESS, headers=headers, transport=transport)


@asynccontextmanager
async def running(
    home: Path,
    *,
    engine: Engine | None = None,
    auth: bool = False,
    url: str | None = None,
    limits: Limits = SERVED,
) -> AsyncIterator[Server]:
    database = open_database(home, url)
    keys = Keys(database)
    store = Journal(database)
    async with LocalService(
        engine or FakeEngine(), home=home, store=store, limits=limits
    ) as service:
        gateway = Gateway(service, keys if auth else None)
        yield Server(app=App(gateway, ADAPTERS), gateway=gateway, service=service, keys=keys)
    database.dispose()


@asynccontextmanager
async def over_asgi(
    engine: FakeEngine, home: Path, url: str | None = None
) -> AsyncIterator[Service]:
    """The client's service, the HTTP front and the local service, in one event loop."""
    async with running(home, engine=engine, url=url) as server, server.client() as service:
        yield service


@asynccontextmanager
async def over_socket(
    engine: FakeEngine, home: Path, url: str | None = None
) -> AsyncIterator[Service]:
    """The same with the server in a thread of its own, on a loopback port."""
    settings = ServerSettings(home=home, port=0, auth=False, database_url=url)
    with serving(engine, settings) as server:
        async with HttpService(server.address) as service:
            yield service


@contextmanager
def serving(engine: Engine, settings: ServerSettings) -> Iterator[Running]:
    """A server in a thread; stopped on leaving."""
    started: Queue[Running | BaseException] = Queue()

    def serve() -> None:
        try:
            asyncio.run(run_server(engine, settings, started=started.put))
        except WeaverError as error:
            started.put(error)

    thread = threading.Thread(target=serve)
    thread.start()
    server = started.get(timeout=20)
    if isinstance(server, BaseException):
        raise server
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
