"""The implementations that the contract suites run over.

A further service joins by an entry in `OPENERS`: a context manager that answers a `Service` which
carries out its operations on the given engine, with checkpoints below the given home.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import Caller
from tests.server.http.helpers import over_asgi, over_socket
from weaver.engine.fake import FakeEngine
from weaver.server.service import LocalService
from weaver.server.store import MemoryStore

if TYPE_CHECKING:
    from weaver.protocol import Service
    from weaver.server.store import Store

ServiceOpener = Callable[[FakeEngine, Path], AbstractAsyncContextManager["Service"]]


@asynccontextmanager
async def open_local(engine: FakeEngine, home: Path) -> AsyncIterator[Service]:
    async with LocalService(engine, home=home) as service:
        yield service


OPENERS: dict[str, ServiceOpener] = {
    "local": open_local,
    "asgi": over_asgi,
    "socket": over_socket,
}
STORES: dict[str, Callable[[], Store]] = {"memory": MemoryStore}


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


@pytest.fixture(params=list(STORES))
def store(request: pytest.FixtureRequest) -> Store:
    return STORES[request.param]()
