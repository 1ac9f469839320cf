"""`EngineThread`: an engine, which takes one call at a time, and the way to it for all who call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from weaver.server.attempt import attempt
from weaver.threads import DaemonThread

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.base import Engine
    from weaver.errors import WeaverError

T = TypeVar("T")


class EngineThread:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = DaemonThread("weaver-engine")

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in the engine's thread, behind what was called before.

        A cancelled caller does not wait for the thread; `work` that has begun runs on to its end.
        """
        return await self._thread.run(work)

    async def attempt(self, work: Callable[[], T]) -> T | WeaverError:
        """What `work` returns, or why it failed."""
        return await self.call(partial(attempt, work))

    def stop(self) -> None:
        """Ends the thread behind what was called."""
        self._thread.stop()
