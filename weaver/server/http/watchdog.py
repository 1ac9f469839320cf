"""`watch`: says in the log where the event loop stands, if it stands still; run by `run_server`.

A loop that is held up cannot say so itself, so a thread looks at it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger(__name__)
BEAT_S = 0.25
STILL_S = 1.0
QUIET_S = 60.0
"""Between two reports, however often it stands still."""


@asynccontextmanager
async def watch() -> AsyncIterator[None]:
    """Looks at the loop that runs this, for as long as it is entered."""
    watchdog = _Watchdog()
    threading.Thread(target=watchdog.look, name="watchdog", daemon=True).start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watchdog.beat)
        try:
            yield
        finally:
            watchdog.ended.set()
            tasks.cancel_scope.cancel()


class _Watchdog:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self._loop_thread = threading.get_ident()
        self._beat_at = time.monotonic()
        self._reported_at = -QUIET_S

    async def beat(self) -> None:
        while True:
            self._beat_at = time.monotonic()
            await anyio.sleep(BEAT_S)

    def look(self) -> None:
        while not self.ended.wait(BEAT_S):
            now = time.monotonic()
            still_s = now - self._beat_at
            if still_s > STILL_S and now > self._reported_at + QUIET_S:
                self._reported_at = now
                frame = sys._current_frames().get(self._loop_thread)
                where = "".join(traceback.format_stack(frame))
                logger.warning("the event loop stands still for %.1f s at\n%s", still_s, where)
