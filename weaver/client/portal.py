"""An event loop in a thread, in which the sync clients run the async ones; and their `Handle`."""

from __future__ import annotations

import atexit
import threading
import weakref
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from anyio.from_thread import start_blocking_portal

from weaver.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from weaver.client.handle import OperationHandle, Status
    from weaver.client.service import AsyncServiceClient

T = TypeVar("T")


class Handle(Generic[T]):
    """The result to come of an operation that was queued with `wait=False`."""

    def __init__(self, inner: OperationHandle[T], portal: Portal) -> None:
        self._inner = inner
        self._portal = portal

    def result(self, timeout: float | None = None) -> T:
        """Blocks until the result is there; `timeout` is in seconds, None waits for good.

        Raises:
            WaitTimeoutError: not finished in time; the operation goes on.
            OperationCancelledError: it was cancelled.
            WeaverError: whatever made the operation fail.
        """
        return self._portal.call(partial(self._inner.result, timeout))

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._inner.done()

    def cancel(self) -> bool:
        """Asks to withdraw the operation; see `OperationHandle.cancel`."""
        return not self.done() and self._portal.call_soon(self._inner.cancel)

    @property
    def status(self) -> Status:
        return self._inner.status

    def __repr__(self) -> str:
        return f"<Handle {self._inner.label}: {self.status}>"


class Portal:
    """Opens an `AsyncServiceClient` in a thread of its own, until `close`, exit or collection."""

    def __init__(self, client: AsyncServiceClient) -> None:
        with ExitStack() as stack:
            self._loop = stack.enter_context(start_blocking_portal(name="weaver"))
            stack.enter_context(self._loop.wrap_async_context_manager(client))
            self._stack = stack.pop_all()
        self._collected = weakref.finalize(self, _close_elsewhere, self._stack)
        self._collected.atexit = False
        # At exit the engine must stop first: a thread inside torch would crash the interpreter.
        self._at_exit = partial(_close_if_alive, weakref.ref(self))
        atexit.register(self._at_exit)

    def close(self) -> None:
        """Leaves the client and ends the thread; a second call does nothing."""
        if self._collected.detach():
            atexit.unregister(self._at_exit)
            self._stack.close()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs an async function and waits; an interrupted wait cancels only the waiting."""
        if not self._collected.alive:
            raise ClosedError("the client was closed.", hint="Make a new ServiceClient.")
        future = self._loop.start_task_soon(function)
        try:
            return future.result()
        finally:
            future.cancel()  # what is done cannot be cancelled

    def call_soon(self, function: Callable[[], T]) -> T:
        """Runs a plain function in the loop's thread; its result is not awaited."""

        async def run() -> T:
            return function()

        return self.call(run)


def _close_elsewhere(stack: ExitStack) -> None:
    # Garbage may be collected in any thread, the loop's own included, where closing would block.
    threading.Thread(target=stack.close, name="weaver-close", daemon=True).start()


def _close_if_alive(portal: weakref.ref[Portal]) -> None:
    if (alive := portal()) is not None:
        alive.close()
