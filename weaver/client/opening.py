"""The service that the settings choose, opened: here, or on a server. For clients and commands."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from anyio import to_thread

from weaver import errors, protocol
from weaver.config import Settings
from weaver.engine.base import Engine
from weaver.threads import out_at_exit

logger = logging.getLogger("weaver")


def open_service(
    settings: Settings, *, patient: bool = True
) -> AbstractAsyncContextManager[protocol.Service]:
    """That which the settings choose; who is `patient` waits longer for a server to come back."""
    if settings.base_url is None:
        return _embedded(settings)
    from weaver.client.http import FIRST_CONTACT_S, OUTAGE_S, HttpService

    outage_s = OUTAGE_S if patient else FIRST_CONTACT_S
    return HttpService(settings.base_url, api_key=settings.api_key, outage_s=outage_s)


@asynccontextmanager
async def _embedded(settings: Settings) -> AsyncIterator[protocol.Service]:
    """A `LocalService` on the torch engine, for as long as the context lasts.

    Another process can go on with its runs.

    Raises:
        MissingDependencyError: torch, transformers or sqlalchemy is not installed.
        ConfigError: the home cannot be written.
    """
    engine = await to_thread.run_sync(out_at_exit, partial(_torch_engine, settings))
    logger.info("running embedded: %s, saving below %s", engine.description, settings.home)
    try:
        with errors.requiring("the embedded engine", "engine"):
            from weaver.server.database import open_database
            from weaver.server.journal import Journal
            from weaver.server.service import LocalService
        database = await to_thread.run_sync(
            partial(open_database, settings.home, file="embedded.db")
        )
        try:
            async with LocalService(
                engine,
                home=settings.home,
                store=Journal(database, keeps="runs"),
                deterministic=settings.deterministic,
            ) as service:
                yield service
        finally:
            database.dispose()
    finally:
        engine.close()


def _torch_engine(settings: Settings) -> Engine:
    with errors.requiring("the embedded engine", "engine"):
        from weaver.engine.local import open_engine
    return open_engine(settings)
