"""Server-sent events: the pieces of a sample on their way to one reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import anyio
from starlette.responses import Response

from weaver.errors import NotFoundError
from weaver.protocol import ErrorInfo
from weaver.server.http.errors import error_response

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from weaver.errors import WeaverError
    from weaver.server.streams import SampleStream

KEEPALIVE_S = 15.0
"""A comment is sent after this much silence, so that no proxy takes the stream for dead."""
PAUSE_S = 0.001
"""Between two chunks of a stream, for each stream that is open: all together get at most a thousand
chunks a second, however many they are. A choice, not a measurement."""


class EventStream(Response):
    """`data:` events, numbered from 1, then one `end` event, or an `error` event with ErrorInfo.

    Pieces up to number `after` (the reader's Last-Event-ID) are skipped. Those that are there
    together are sent in one chunk. It is ASCII: some readers take U+2028 for the end of a line.
    """

    media_type = "text/event-stream"
    _open: ClassVar[int] = 0

    def __init__(self, stream: SampleStream, *, after: int = 0) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._stream = stream
        self._after = after
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
                refusal = await self._send_pieces(send)
                tasks.cancel_scope.cancel()
        finally:
            EventStream._open -= 1
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)

    async def _send_pieces(self, send: Send) -> WeaverError | None:
        """Answers why there is no such stream, as long as nothing was sent."""
        stream, sent, over = self._stream, self._after, False
        while not over:
            await stream.grown(sent)
            over, error = stream.finished.is_set(), stream.error
            pieces = stream.pieces[sent:]
            if isinstance(error, NotFoundError) and not (pieces or self._started):
                return error
            text = "".join(
                f"id: {i}\ndata: {piece.model_dump_json(ensure_ascii=True)}\n\n"
                for i, piece in enumerate(pieces, start=sent + 1)
            )
            if error is not None:
                info = ErrorInfo.of(error).model_dump_json(ensure_ascii=True)
                text += f"event: error\ndata: {info}\n\n"
            elif over:
                text += "event: end\ndata: {}\n\n"
            sent += len(pieces)
            await self._send(send, text, more=not over)
            if not over:
                with anyio.move_on_after(PAUSE_S * EventStream._open):
                    await stream.finished.wait()
        stream.read = True
        return None

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await anyio.sleep(KEEPALIVE_S)
            if anyio.current_time() - self._sent_at >= KEEPALIVE_S:
                await self._send(send, ": waiting\n")

    async def _send(self, send: Send, text: str, *, more: bool = True) -> None:
        async with self._sending:
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
