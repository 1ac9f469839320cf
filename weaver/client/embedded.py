"""The service that runs inside the user's process; `AsyncServiceClient` opens it without a URL."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio.to_thread

from weaver.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from weaver.config import Settings
    from weaver.engine.base import Engine
    from weaver.protocol import Service

logger = logging.getLogger("weaver")


@asynccontextmanager
async def embedded_service(settings: Settings) -> AsyncIterator[Service]:
    """A `LocalService` on the torch engine, for as long as the context lasts.

    Raises:
        MissingDependencyError: torch or transformers is not installed.
    """
    engine = await anyio.to_thread.run_sync(_torch_engine, settings)
    from weaver.server.service import LocalService

    logger.info("running embedded: %s, saving below %s", engine.description, settings.home)
    try:
        async with LocalService(
            engine, home=settings.home, deterministic=settings.deterministic
        ) as service:
            yield service
    finally:
        engine.close()


def _torch_engine(settings: Settings) -> Engine:
    try:
        from weaver.engine.engine import TorchEngine
    except ImportError as error:
        raise MissingDependencyError(
            f"the embedded engine needs {error.name}.",
            hint='Run: pip install "weaver-post-training[engine]"',
        ) from error
    return TorchEngine(
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        deterministic=settings.deterministic,
    )
