"""`Kept`: what `await` opens, and keeps open over the cells of a notebook, without `async with`.

`AsyncServiceClient` is one. A context has to be entered and left in the same task, and each cell is
a task of its own: so a task beside them enters it, waits, and leaves it, at `close`, when its event
loop ends (`asyncio.run` cancels it), or as the interpreter exits.
"""

from __future__ import annotations

import asyncio
import atexit
import weakref
from collections.abc import Generator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType

EXIT_S = 5.0
"""How long the interpreter's exit waits for it to be left."""


class Kept:
    """Base of an asynchronous context manager: `client = await Client()`."""

    _keeper: Keeper | None = None

    def __await__(self) -> Generator[Any, Any, Self]:
        """Enters it, unless this event loop has it open; see `close` of the client."""
        return self._keep().__await__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    async def _keep(self) -> Self:
        if self._keeper is None or self._keeper.done:
            self._keeper = await Keeper.enter(self)
        self._keeper.check_loop()
        return self

    async def _let_go(self) -> None:
        """Leaves what was kept, if it was."""
        if self._keeper is not None:
            await self._keeper.leave()


class Keeper:
    """The task in which a context is open."""

    def __init__(self, kept: Kept) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UnsupportedError(
                "only asyncio keeps it open.", field="client", hint="Use it by `async with`."
            ) from None
        self._entered = asyncio.Event()
        self._leave = asyncio.Event()
        # The one task without an owner here: its owner is the event loop, as of notebooks' cells.
        self._task = self._loop.create_task(self._host(kept), name="weaver client")
        self._at_exit = partial(_leave_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)
        self._task.add_done_callback(lambda task: atexit.unregister(self._at_exit))

    @classmethod
    async def enter(cls, kept: Kept) -> Keeper:
        """Raises what entering raises; who is cancelled meanwhile leaves nothing behind."""
        keeper = cls(kept)
        entering = keeper._loop.create_task(keeper._entered.wait())
        try:
            await asyncio.wait([keeper._task, entering], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            keeper._task.cancel()
            raise
        finally:
            entering.cancel()
        if keeper.done:
            keeper._task.result()
        return keeper

    @property
    def done(self) -> bool:
        return self._task.done()

    def check_loop(self) -> None:
        """Raises UnsupportedError: another event loop has it open."""
        if asyncio.get_running_loop() is not self._loop:
            raise UnsupportedError(
                "the client is open in another event loop.",
                field="client",
                hint="Close it there, or make another one for this event loop.",
            )

    async def leave(self) -> None:
        self.check_loop()
        self._leave.set()
        await asyncio.wait([self._task])

    def leave_at_exit(self) -> None:
        """In the main thread, where the loop may have stopped for good without having ended."""
        if self.done or self._loop.is_closed():
            return
        if self._loop.is_running():  # in another thread, which goes on
            with suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self.leave(), self._loop).result(EXIT_S)
            return
        self._leave.set()
        self._loop.run_until_complete(asyncio.wait([self._task], timeout=EXIT_S))

    async def _host(self, kept: Kept) -> None:
        async with kept:
            self._entered.set()
            await self._leave.wait()


def _leave_if_alive(keeper: weakref.ref[Keeper]) -> None:
    if (alive := keeper()) is not None:
        alive.leave_at_exit()
