"""The implementations that the contract suites run over.

A further service joins by an entry in `OPENERS`: a context manager that answers a `Service` which
carries out its operations on the given engine, with checkpoints below the given home and, unless
its third argument is None, on the database of that address.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import over_asgi, over_socket
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.service import LocalService

if TYPE_CHECKING:
    import sqlalchemy as sa

    from weaver.protocol import Service
    from weaver.server.journal import Keeps

Opened = AbstractAsyncContextManager["Service"]
ServiceOpener = Callable[[FakeEngine, Path], Opened]


@asynccontextmanager
async def open_durable(engine: FakeEngine, home: Path, url: str | None) -> AsyncIterator[Service]:
    """With a database, as a server has it."""
    async with _open_on("everything", engine, home, url) as service:
        yield service


@asynccontextmanager
async def open_embedded(engine: FakeEngine, home: Path, url: str | None) -> AsyncIterator[Service]:
    """With a database, as the embedded engine has it."""
    async with _open_on("runs", engine, home, url) as service:
        yield service


@asynccontextmanager
async def _open_on(
    keeps: Keeps, engine: FakeEngine, home: Path, url: str | None
) -> AsyncIterator[Service]:
    database = open_database(home, url)
    async with LocalService(engine, home=home, store=Journal(database, keeps=keeps)) as service:
        yield service
    database.dispose()


@asynccontextmanager
async def open_local(engine: FakeEngine, home: Path, url: str | None) -> AsyncIterator[Service]:
    async with LocalService(engine, home=home) as service:
        yield service


OPENERS: dict[str, Callable[[FakeEngine, Path, str | None], Opened]] = {
    "local": open_local,
    "embedded": open_embedded,
    "durable": open_durable,
    "asgi": over_asgi,
    "socket": over_socket,
}
ON_POSTGRES = ("durable", "asgi", "socket")
POSTGRES = pytest.param("postgresql", marks=pytest.mark.slow)


@pytest.fixture(
    params=[
        *OPENERS,
        *(pytest.param(f"{name}-postgresql", marks=pytest.mark.slow) for name in ON_POSTGRES),
    ]
)
def open_service(request: pytest.FixtureRequest) -> ServiceOpener:
    name, _, kind = request.param.partition("-")
    url = request.getfixturevalue("postgres").emptied() if kind else None
    return lambda engine, home: OPENERS[name](engine, home, url)


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


@pytest.fixture(params=["sqlite", POSTGRES])
def database(request: pytest.FixtureRequest, home: Path) -> Iterator[sa.Engine]:
    """An empty one."""
    url = request.getfixturevalue("postgres").emptied() if request.param == "postgresql" else None
    engine = open_database(home, url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(database: sa.Engine) -> Journal:
    return Journal(database)
