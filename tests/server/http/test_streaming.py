"""How the pieces of samples are sent: together where they are there together, the rest in turn."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest

from weaver.client.http import HttpService
from weaver.errors import NotFoundError, OperationError
from weaver.server.http import streaming
from weaver.server.http.streaming import CHUNK_S, EventStream, Turns
from weaver.server.streams import SampleStream
from weaver.types import SampleDelta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from weaver.errors import WeaverError

pytestmark = pytest.mark.anyio
SCOPE: dict[str, Any] = {"type": "http", "path": "/", "state": {"request_id": "request-1"}}


def piece(token: int) -> SampleDelta:
    return SampleDelta(index=0, tokens=(token,), text="x", logprobs=(-1.0,))


class Reader:
    """The far end of one response; `slow_s` is how long it takes for a chunk."""

    def __init__(self, turns: Turns | None = None, *, slow_s: float = 0.0) -> None:
        self.chunks: list[str] = []
        self.status = 0
        self.heard = anyio.Event()
        self._slow_s = slow_s
        self._turns = turns or Turns()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        await anyio.sleep(self._slow_s)
        self.chunks.append(message["body"].decode())
        self.heard.set()

    async def read(self, stream: SampleStream, *, after: int = 0) -> None:
        await EventStream(stream, self._turns, after=after)(SCOPE, anyio.sleep_forever, self.send)

    @property
    def numbers(self) -> list[int]:
        lines = "".join(self.chunks).splitlines()
        return [int(line[4:]) for line in lines if line.startswith("id: ")]


@pytest.mark.parametrize("after", [0, 40, 100])
@pytest.mark.parametrize("error", [None, OperationError("it failed.")])
async def test_what_is_there_together_is_one_chunk(after: int, error: WeaverError | None) -> None:
    stream, reader = SampleStream(), Reader()
    stream.push([piece(i) for i in range(100)])
    stream.finish(error)
    with anyio.fail_after(5):
        await reader.read(stream, after=after)
    assert len(reader.chunks) == 1
    assert reader.numbers == list(range(after + 1, 101))
    assert reader.chunks[0].split("event: ")[-1].startswith("error" if error else "end")


async def test_a_piece_that_is_alone_does_not_wait_for_the_next() -> None:
    stream, reader = SampleStream(), Reader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read, stream)
        with anyio.fail_after(5):
            for number in range(1, 6):
                stream.push([piece(number)])
                await reader.heard.wait()
                reader.heard = anyio.Event()
                assert reader.numbers == list(range(1, number + 1))
        stream.finish(None)


async def test_a_slow_reader_gets_all_in_order() -> None:
    stream, reader = SampleStream(), Reader(slow_s=0.02)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read, stream)
        for number in range(100):
            stream.push([piece(number)])
            await anyio.sleep(0.001)
        stream.finish(None)
    assert reader.numbers == list(range(1, 101))
    assert len(reader.chunks) < 50


async def test_many_streams_send_in_turn() -> None:
    streams, turns = [SampleStream() for _ in range(100)], Turns()
    readers = [Reader(turns) for _ in streams]
    began = time.monotonic()
    async with anyio.create_task_group() as tasks:
        for stream, reader in zip(streams, readers, strict=True):
            tasks.start_soon(reader.read, stream)
        for number in range(40):
            for stream in streams:
                stream.push([piece(number)])
            await anyio.sleep(0.01)
        for stream in streams:
            stream.finish(None)
    assert all(reader.numbers == list(range(1, 41)) for reader in readers)
    chunks = sum(len(reader.chunks) for reader in readers)
    assert len(streams) <= chunks <= 1 + (time.monotonic() - began) / CHUNK_S


async def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEPALIVE_S", 0.01)
    stream, reader = SampleStream(), Reader()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reader.read, stream)
        with anyio.fail_after(5):
            await reader.heard.wait()
        stream.push([piece(1)])
        stream.finish(None)
    assert reader.chunks[0] == ": waiting\n"
    assert reader.numbers == [1]


SEPARATORS = "a\x85b\u2028c\u2029d\x0be\x1cf\u00e9"
"""What some take for the end of a line."""


async def test_a_line_separator_in_a_piece_ends_no_event() -> None:
    stream, reader = SampleStream(), Reader()
    stream.push([SampleDelta(index=0, tokens=(1,), text=SEPARATORS, logprobs=(-1.0,))])
    stream.finish(OperationError(SEPARATORS))
    await reader.read(stream)
    lines = "".join(reader.chunks).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["id", "data", "", "event", "data", ""]
    assert json.loads(lines[1][6:])["text"] == SEPARATORS


async def test_our_client_reads_separators_that_were_not_escaped() -> None:
    delta = {"index": 0, "tokens": [1], "text": SEPARATORS, "logprobs": [-1.0]}
    data = json.dumps(delta, ensure_ascii=False)
    body = f"id: 1\ndata: {data}\n\nevent: end\ndata: {{}}\n\n".encode()

    async def pieces() -> AsyncIterator[bytes]:
        for i in range(len(body)):  # also in the middle of a character
            yield body[i : i + 1]

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=pieces()))
    async with HttpService("http://localhost", transport=transport) as service:
        assert [piece.text async for piece in service.stream("s", "x")] == [SEPARATORS]


async def test_a_stream_that_is_not_there_is_a_404() -> None:
    stream, reader = SampleStream(), Reader()
    stream.finish(NotFoundError("there is none."))
    await reader.read(stream)
    assert reader.status == 404
