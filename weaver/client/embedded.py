"""The service that runs inside the user's process; `AsyncServiceClient` opens it without a URL."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio.to_thread

from weaver.errors import requiring
from weaver.threads import out_at_exit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from weaver.config import Settings
    from weaver.engine.base import Engine
    from weaver.protocol import Service
    from weaver.server.store import Store

logger = logging.getLogger("weaver")


@asynccontextmanager
async def embedded_service(settings: Settings) -> AsyncIterator[Service]:
    """A `LocalService` on the torch engine, for as long as the context lasts.

    Raises:
        MissingDependencyError: torch, transformers or sqlalchemy is not installed.
        ConfigError: the home cannot be written.
    """
    engine = await anyio.to_thread.run_sync(partial(out_at_exit, partial(_torch_engine, settings)))
    from weaver.server.service import LocalService

    logger.info("running embedded: %s, saving below %s", engine.description, settings.home)
    try:
        async with (
            _database(settings) as store,
            LocalService(
                engine, home=settings.home, store=store, deterministic=settings.deterministic
            ) as service,
        ):
            yield service
    finally:
        engine.close()


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Store]:
    """Where runs are kept, so that another process can go on with them."""
    with requiring("the embedded engine", "engine"):
        from weaver.server.database import open_database
        from weaver.server.step_store import StepStore
    open_it = partial(open_database, settings.home, file="embedded.db")
    database = await anyio.to_thread.run_sync(open_it)
    try:
        yield StepStore(database)
    finally:
        database.dispose()


def _torch_engine(settings: Settings) -> Engine:
    with requiring("the embedded engine", "engine"):
        from weaver.engine.torch.engine import TorchEngine
    return TorchEngine(
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        deterministic=settings.deterministic,
    )
