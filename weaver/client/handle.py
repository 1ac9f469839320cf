"""`OperationHandle[T]`: the result to come of an operation that already has its place in the order.

Made by `weaver.client.session`; users get one from every ordered verb of the async clients. It may
be used only where it was made: sessions, handles and the sync clients' portal check their `Origin`
or `Process` first. A fork has none of its parent's threads, and an event loop is woken only from
within, so what is used elsewhere would wait for ever.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from html import escape
from typing import Any, Generic, Literal, TypeVar

import anyio
from anyio.lowlevel import checkpoint, current_token

from weaver import errors

T = TypeVar("T")
Status = Literal["queued", "running", "done", "failed", "cancelled"]

LOG_WAIT_S = 30.0
"""A wait logs what it is waiting for each time this many seconds have passed."""

logger = logging.getLogger("weaver")


class Process:
    """The process that this is made in."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises UnsupportedError in a fork of the process."""
        if not self.is_here:
            raise errors.UnsupportedError(
                f"the client was made in process {self._pid}, of which this is a fork: what it "
                "needs does not run here.",
                field="client",
                hint="Make a new client in the child.",
            )


class Origin(Process):
    """The process and the running event loop that this is made in."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = current_token().native_token

    def check(self) -> None:
        """Raises UnsupportedError in a fork, and outside of the event loop."""
        super().check()
        try:
            loop = current_token().native_token
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise errors.UnsupportedError(
                "the async client belongs to another event loop than the one that it is used from.",
                field="client",
                hint="Call it where it was entered, make a client of this event loop's own, by "
                "`await` once that one has ended, or use the sync ServiceClient, which serves "
                "every thread.",
            )


class OperationHandle(Generic[T]):
    """The result to come of an operation; `await handle` gives it or raises the operation's error.

    It may be awaited many times and by several tasks. A task that is cancelled while it awaits
    leaves the operation alone; `cancel()` is what withdraws it.
    """

    __slots__ = ("_cancel", "_finished", "_origin", "_sent", "label", "outcome")

    def __init__(self, label: str, *, origin: Origin, cancel: Callable[[], bool]) -> None:
        self.label = label
        """What it is, for logs and messages: `forward_backward (seq 3 of run-1)`."""
        self._cancel = cancel
        self._origin = origin
        self._finished = anyio.Event()
        self._sent = False
        self.outcome: Future[T] = Future()
        """For other threads, which may wait for it."""

    def __await__(self) -> Generator[Any, Any, T]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> T:
        """Waits for the result; `timeout` is in seconds, None waits as long as it takes.

        Raises:
            WaitTimeoutError: not finished in time; the operation goes on.
            OperationCancelledError: it was cancelled.
            UnsupportedError: it is not there yet, and this is a fork or another event loop.
            WeaverError: whatever made the operation fail.
        """
        if not self.done():
            self._origin.check()
            await checkpoint()  # so that polling with timeout 0 lets others run
        for wait_s in self.waits(timeout):
            with anyio.move_on_after(wait_s):
                await self._finished.wait()
        return self.outcome.result()

    def waits(self, timeout: float | None) -> Iterator[float]:
        """Seconds to wait next, again and again until it has finished; long waits are logged.

        Raises:
            InvalidParamsError: `timeout` is not a number of seconds.
            WaitTimeoutError: so many seconds have passed.
        """
        if timeout is not None and not timeout >= 0:
            raise errors.InvalidParamsError(
                f"is {timeout!r}.", field="timeout", hint="Give seconds, at least 0, or None."
            )
        timeout_s = math.inf if timeout is None else timeout
        start = time.monotonic()
        while not self.done():
            waited = time.monotonic() - start
            if waited >= timeout_s:
                raise errors.WaitTimeoutError(
                    f"{self.label} has not finished in {timeout_s:g} s; it goes on.",
                    hint="Wait again, or cancel it.",
                )
            if waited >= LOG_WAIT_S:
                logger.warning("waiting for %s for %.0f s (%s)", self.label, waited, self.status)
            yield min(LOG_WAIT_S, timeout_s - waited)

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.outcome.done()

    def cancel(self) -> bool:
        """Asks to withdraw the operation; False if it has already finished.

        What has not begun ends with `OperationCancelledError`, and so does a sample at any time,
        whose slots are freed. A gradient pass or step that is running finishes. Its place in the
        order is kept, so later operations do not wait for it.
        """
        if self.done():
            return False
        self._origin.check()
        return self._cancel()

    @property
    def status(self) -> Status:
        """As known here: an operation is "running" from when it was sent to the service."""
        if not self.done():
            return "running" if self._sent else "queued"
        error = self.outcome.exception()
        if error is None:
            return "done"
        return "cancelled" if isinstance(error, errors.OperationCancelledError) else "failed"

    def __repr__(self) -> str:
        return f"<OperationHandle {self.label}: {self.status}>"

    def _repr_html_(self) -> str:
        """In notebooks: what it is and how far, and behind that its result or error."""
        text = f"<p>{escape(self.label)}: <b>{self.status}</b></p>"
        if self.status == "done":
            return text + getattr(self.outcome.result(), "_repr_html_", str)()
        error = self.outcome.exception() if self.done() else None
        return text if error is None else f"{text}<pre>{escape(str(error))}</pre>"

    # The session calls the rest; each handle is settled once, later calls change nothing.

    def mark_sent(self) -> None:
        self._sent = True

    def settle(self, value: T) -> None:
        if not self.done():
            self.outcome.set_result(value)
            self._finished.set()

    def fail(self, error: BaseException) -> None:
        if not self.done():
            self.outcome.set_exception(error)
            self._finished.set()
