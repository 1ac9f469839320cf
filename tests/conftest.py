"""Fixtures that all tests share."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.postgres import Postgres
    from tests.zoo import Zoo
    from weaver.server.view import View


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    if not find_spec(request.param):
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """A tiny model's step takes 6 ms on one thread and up to 660 ms on two."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this session's own."""
    from tests.postgres import Postgres, programs

    found = programs()
    if found is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    server = Postgres(found)
    yield server
    server.close()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny models and tokenizers of every kind."""
    from tests.zoo import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder for a service's runs."""
    return tmp_path / "home"


@pytest.fixture
async def fake_service(home: Path) -> AsyncIterator[View]:
    from tests.fake_engine import FakeEngine
    from weaver.server.service import LocalService

    async with LocalService(FakeEngine(), home=home) as service:
        yield service
