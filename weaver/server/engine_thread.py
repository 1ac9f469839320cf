"""`EngineThread`: an engine, which takes one call at a time, and the way to it for all who call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from anyio import CapacityLimiter, to_thread

from weaver.server.attempt import attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.base import Engine
    from weaver.errors import WeaverError

T = TypeVar("T")


class EngineThread:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._free = CapacityLimiter(1)

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread while nothing else uses the engine.

        A cancelled caller does not wait for the thread, which runs on to the end of `work`.
        """
        return await to_thread.run_sync(work, limiter=self._free, abandon_on_cancel=True)

    async def attempt(self, work: Callable[[], T]) -> T | WeaverError:
        """What `work` returns, or why it failed."""
        return await self.call(partial(attempt, work))
