"""The implementations that the contract suites run over.

A further service joins by an entry in `OPENERS`: a context manager that answers a `Service` which
carries out its operations on the given engine, with checkpoints below the given home.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.contracts.caller import Caller
from tests.server.http.helpers import over_asgi, over_socket
from weaver.engine.fake import FakeEngine
from weaver.server.database import open_database
from weaver.server.service import LocalService
from weaver.server.sql_store import SqlStore
from weaver.server.step_store import StepStore
from weaver.server.tables import metadata

if TYPE_CHECKING:
    from weaver.protocol import Service
    from weaver.server.store import Store

ServiceOpener = Callable[[FakeEngine, Path], AbstractAsyncContextManager["Service"]]


@asynccontextmanager
async def open_durable(engine: FakeEngine, home: Path) -> AsyncIterator[Service]:
    """With a database, as a server has it."""
    database = open_database(home)
    async with LocalService(engine, home=home, store=SqlStore(database)) as service:
        yield service
    database.dispose()


@asynccontextmanager
async def open_embedded(engine: FakeEngine, home: Path) -> AsyncIterator[Service]:
    """With a database, as the embedded engine has it."""
    database = open_database(home)
    async with LocalService(engine, home=home, store=StepStore(database)) as service:
        yield service
    database.dispose()


@asynccontextmanager
async def open_local(engine: FakeEngine, home: Path) -> AsyncIterator[Service]:
    async with LocalService(engine, home=home) as service:
        yield service


OPENERS: dict[str, ServiceOpener] = {
    "local": open_local,
    "durable": open_durable,
    "embedded": open_embedded,
    "asgi": over_asgi,
    "socket": over_socket,
}
POSTGRES = os.environ.get("WEAVER_TEST_POSTGRES_URL")
"""Of a database whose tables may be dropped; tests/postgres.sh starts one."""
DATABASES = ["sqlite", *(["postgresql"] if POSTGRES else [])]


@pytest.fixture(params=list(OPENERS))
def open_service(request: pytest.FixtureRequest) -> ServiceOpener:
    return OPENERS[request.param]


@pytest.fixture
def engine() -> FakeEngine:
    """Tests set its hook."""
    return FakeEngine(models=("fake", "other"), context_length=64, slots=4)


@pytest.fixture
async def service(
    open_service: ServiceOpener, engine: FakeEngine, home: Path
) -> AsyncIterator[Service]:
    async with open_service(engine, home) as service:
        yield service


@pytest.fixture
async def caller(service: Service) -> Caller:
    return await Caller.open(service)


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, home: Path) -> Iterator[sa.Engine]:
    """An empty one."""
    url = POSTGRES if request.param == "postgresql" else None
    if url is not None:
        empty = sa.create_engine(url)
        metadata.drop_all(empty)
        empty.dispose()
    engine = open_database(home, url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: sa.Engine) -> Store:
    return SqlStore(database)
