"""`Budget`: the bytes that requests may take together while they are read; one of a front."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from weaver.wire import LARGE_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Budget:
    def __init__(self, total_bytes: int) -> None:
        self._total = self._free = total_bytes
        self._freed = anyio.Condition()

    @asynccontextmanager
    async def of(self, size_bytes: int) -> AsyncIterator[None]:
        """Waits until so many bytes are free; little always is, and more than all waits for all."""
        size = 0 if size_bytes <= LARGE_BYTES else min(size_bytes, self._total)
        async with self._freed:
            while size > self._free:
                await self._freed.wait()
            self._free -= size
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                async with self._freed:
                    self._free += size
                    self._freed.notify_all()
