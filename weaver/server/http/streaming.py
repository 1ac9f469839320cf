"""Server-sent events: the pieces of a sample on their way to one reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from starlette.responses import Response

from weaver.errors import NotFoundError
from weaver.protocol import ErrorInfo
from weaver.server.http.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from weaver.errors import WeaverError
    from weaver.server.streams import SampleStream
    from weaver.types import SampleDelta

KEEPALIVE_S = 15.0
"""A comment is sent after this much silence, so that no proxy takes the stream for dead."""
CHUNK_S = 0.004
"""Between two chunks, of whichever streams: all together send at most 250 a second. Measured: from
1 to 16 ms it makes no difference to how long others' samples take."""


class Turns:
    """When the streams of a server send: one after another, however many have something to send."""

    def __init__(self) -> None:
        self._next = 0.0

    async def take(self) -> None:
        now = anyio.current_time()
        mine = max(now, self._next)
        self._next = mine + CHUNK_S
        await anyio.sleep(mine - now)


class EventStream(Response):
    """`data:` events, numbered from 1, then one `end` event, or an `error` event with ErrorInfo.

    Pieces up to number `after` (the reader's Last-Event-ID) are skipped. Those that are there
    together are sent in one chunk. It is ASCII: some readers take U+2028 for the end of a line.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: SampleStream, turns: Turns, *, after: int = 0) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._stream = stream
        self._turns = turns
        self._after = after
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: WeaverError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(until_gone, receive, tasks.cancel_scope)
            refusal = await self._send_pieces(send)
            tasks.cancel_scope.cancel()
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)

    def events(self, pieces: Sequence[SampleDelta], *, first: int) -> str:
        """The pieces from number `first` on, as they are sent."""
        return "".join(
            f"id: {i}\ndata: {piece.model_dump_json(ensure_ascii=True)}\n\n"
            for i, piece in enumerate(pieces, start=first)
        )

    def ending(self, error: WeaverError | None) -> str:
        """What follows the last piece."""
        if error is None:
            return "event: end\ndata: {}\n\n"
        info = ErrorInfo.of(error).model_dump_json(ensure_ascii=True)
        return f"event: error\ndata: {info}\n\n"

    async def _send_pieces(self, send: Send) -> WeaverError | None:
        """Answers why there is no such stream, as long as nothing was sent."""
        stream, sent, over = self._stream, self._after, False
        while not over:
            with anyio.move_on_after(KEEPALIVE_S) as silence:
                await stream.grown(sent)
            if silence.cancelled_caught:
                await self._send(send, ": waiting\n")
                continue
            await self._turns.take()
            over, error = stream.finished.is_set(), stream.error
            pieces = stream.pieces[sent:]
            if isinstance(error, NotFoundError) and not (pieces or self._started):
                return error
            text = self.events(pieces, first=sent + 1)
            text += self.ending(error) if over else ""
            sent += len(pieces)
            await self._send(send, text, more=not over)
        stream.read = True
        return None

    async def _send(self, send: Send, text: str, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            status, headers = self.status_code, self.raw_headers
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancels the scope when the client of a request has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
