"""Server-sent events: the pieces of a sample on their way to one reader."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, cast

import anyio
from starlette.responses import Response

from weaver.errors import NotFoundError, WeaverError
from weaver.protocol import ErrorInfo
from weaver.server.http.errors import error_response

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from anyio.abc import TaskGroup
    from starlette.types import Receive, Scope, Send

    from weaver.types import SampleDelta

KEEPALIVE_S = 15.0
"""A comment is sent after this much silence, so that no proxy takes the stream for dead."""
PAUSE_S = 0.001
"""Between two chunks of a stream, for each stream that is open: all together get at most a thousand
chunks a second, however many they are. A choice, not a measurement."""


class EventStream(Response):
    """`data:` events, numbered from 1, then one `end` event, or an `error` event with ErrorInfo.

    Pieces up to number `after` (the reader's Last-Event-ID) are skipped. Those that are there
    together are sent in one chunk.
    """

    media_type = "text/event-stream"
    _open: ClassVar[int] = 0

    def __init__(self, deltas: AsyncIterator[SampleDelta], *, after: int = 0) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._deltas = cast("AsyncGenerator[SampleDelta, None]", deltas)
        self._after = after
        self._unsent: list[tuple[int, SampleDelta]] = []
        self._sending = anyio.Lock(fast_acquire=True)
        self._sent_at = 0.0
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: WeaverError | None = None
        EventStream._open += 1
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_alive, send)
                tasks.start_soon(_until_gone, receive, tasks.cancel_scope)
                refusal = await self._send_deltas(send, tasks)
                tasks.cancel_scope.cancel()
        finally:
            EventStream._open -= 1
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)

    async def _send_deltas(self, send: Send, tasks: TaskGroup) -> WeaverError | None:
        """Answers why there is no such stream, as long as nothing was sent."""
        number = 0
        last = "event: end\ndata: {}\n\n"
        try:
            async with aclosing(self._deltas) as deltas:
                async for delta in deltas:
                    number += 1
                    if number <= self._after:
                        continue
                    if not self._unsent:
                        since = anyio.current_time() - self._sent_at
                        await anyio.sleep(max(0.0, PAUSE_S * EventStream._open - since))
                        tasks.start_soon(self._send, send)  # begins when no piece is left to read
                    self._unsent.append((number, delta))
        except WeaverError as error:
            if isinstance(error, NotFoundError) and not self._started:
                return error
            last = f"event: error\ndata: {ErrorInfo.of(error).model_dump_json()}\n\n"
        await self._send(send, last, more=False)
        return None

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await anyio.sleep(KEEPALIVE_S)
            if anyio.current_time() - self._sent_at >= KEEPALIVE_S:
                await self._send(send, ": waiting\n")

    async def _send(self, send: Send, tail: str = "", *, more: bool = True) -> None:
        """All that is unsent, and `tail` behind it."""
        async with self._sending:
            events = [f"id: {i}\ndata: {one.model_dump_json()}\n\n" for i, one in self._unsent]
            self._unsent.clear()
            text = "".join(events) + tail
            if not text:
                return
            self._sent_at = anyio.current_time()
            if not self._started:
                self._started = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
