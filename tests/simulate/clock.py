"""Virtual time: an event loop whose clock goes on to the next timer when nothing is left to do.

What blocks runs at once, in the same thread, and takes the time that it says with `owe`, so that a
simulation depends on nothing but its seed.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import uuid
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

EPOCH = 1_800_000_000.0
"""Seconds since 1970 at the beginning."""
THREADS = 40
"""That anyio has at most; what blocks waits for one."""

_owed: list[Callable[[], Awaitable[None]]] = []


class StuckError(RuntimeError):
    """Nothing can happen any more: something waits without a deadline for what never comes."""


class _Skipping(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError("nothing is left to do, and something waits")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Sees no sockets: all that it runs is in this thread."""

    def __init__(self) -> None:
        self._clock = _Skipping()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def _write_to_self(self) -> None:
        """Nobody has to wake it."""


def owe(wait: Callable[[], Awaitable[None]]) -> None:
    """Within what blocks: it has taken as long as `wait`."""
    _owed.append(wait)


def run(main: Callable[[], Coroutine[Any, Any, Any]], *, seed: int) -> Any:
    """What `main` answers, in virtual time from 0 on."""
    loop = VirtualLoop()
    with _virtual(loop, random.Random(f"names {seed}")):
        return anyio.run(main, backend_options={"loop_factory": lambda: loop})


@contextmanager
def _virtual(loop: VirtualLoop, names: random.Random) -> Iterator[None]:
    limiter: anyio.CapacityLimiter | None = None

    async def run_sync(
        work: Callable[..., Any],
        *args: Any,
        **how: Any,
    ) -> Any:
        nonlocal limiter
        limiter = limiter or anyio.CapacityLimiter(THREADS)
        async with how.get("limiter") or nullcontext(), limiter:
            try:
                value = work(*args)
                waits = list(_owed)
            finally:
                _owed.clear()
            for wait in waits:
                await wait()
        return value

    with ExitStack() as stack:
        for name, stand_in in {
            "time.monotonic": loop.time,
            "time.time": lambda: EPOCH + loop.time(),
            "anyio.to_thread.run_sync": run_sync,
            "uuid.uuid4": lambda: uuid.UUID(int=names.getrandbits(128), version=4),
        }.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield
