"""A server in the test's process: the fake engine behind the HTTP front, without a socket."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

from weaver.client.http import HttpService
from weaver.engine.fake import FakeEngine
from weaver.server.database import open_database
from weaver.server.http.app import create_app
from weaver.server.http.front import Front, ServerLimits
from weaver.server.keys import Keys
from weaver.server.owners import Owners
from weaver.server.scoped import Quotas, Scopes
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.types import ASGIApp

    from weaver.engine.base import Engine

ADDRESS = "http://weaver.test"
LIMITS = ServerLimits()
QUOTAS = Quotas()


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    app: ASGIApp
    front: Front
    service: LocalService
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
    limits: ServerLimits = LIMITS,
    quotas: Quotas = QUOTAS,
) -> AsyncIterator[Server]:
    database = open_database(home)
    keys = Keys(database)
    async with LocalService(engine or FakeEngine(), home=home) as service:
        scopes = Scopes(service, Owners(database), quotas=quotas)
        front = Front(scopes=scopes, keys=keys if auth else None, limits=limits)
        yield Server(app=create_app(front), front=front, service=service, keys=keys)
    database.dispose()
