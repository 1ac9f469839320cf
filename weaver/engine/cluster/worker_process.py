"""`WorkerProcess`: how a sampler's worker is started here, and `Link`, what a pool has of any.

How one is started on another machine is in `placed_worker`. What goes through is in `vllm_worker`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio
from anyio.abc import ByteSendStream
from anyio.streams.buffered import BufferedByteReceiveStream

LARGEST = 2**28
"""Bytes of a frame."""
SEND_S = 60.0
"""In which a worker has read a frame."""
LEAVE_S = 5.0
"""In which a worker ends that has nothing more to read; then it is killed."""
LAST_WORDS = 4096
"""Bytes of a log in which its last words are looked for."""

Frame = dict[str, Any]


class WorkerLostError(Exception):
    """A worker has ended, or does not answer; why."""


class Link(Protocol):
    """A worker that runs. Its methods raise `WorkerLostError`."""

    async def send(self, frame: Mapping[str, Any]) -> None: ...

    async def receive(self) -> Frame:
        """The next frame; waits for it as long as the worker runs."""


Opener = Callable[[], AbstractAsyncContextManager[Link]]
"""Starts a worker; leaving the context ends it, whatever it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerProcess:
    """A worker in a process of this machine, which ends with the thread that opens it."""

    command: Sequence[str]
    log: Path
    """What it prints, since its last start."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Link]:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.log.open("wb") as log:
                process = await anyio.open_process(
                    list(self.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise WorkerLostError(f"{self.command[0]} cannot be run: {error}") from None
        assert process.stdin is not None and process.stdout is not None
        async with process.stdin, process.stdout:
            try:
                source = BufferedByteReceiveStream(process.stdout)
                yield Pipe(process.stdin, source, partial(last_words, self.log))
            finally:
                with anyio.CancelScope(shield=True):
                    with anyio.move_on_after(LEAVE_S):
                        await process.stdin.aclose()
                        await process.wait()
                    with suppress(ProcessLookupError):  # it, or what it has started
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()


def last_words(log: Path) -> str:
    """Of the worker that prints there."""
    with suppress(OSError):
        lines = log.read_bytes()[-LAST_WORDS:].decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f"its last words: {said[-1][:300]} (all in {log})"
    return f"it said nothing in {log}"


class Pipe:
    """`Link` to a process, by its standard streams."""

    def __init__(
        self, sink: ByteSendStream, source: BufferedByteReceiveStream, why: Callable[[], str]
    ) -> None:
        self._sink = sink
        self._source = source
        self._why = why
        self._sending = anyio.Lock()

    async def send(self, frame: Mapping[str, Any]) -> None:
        body = json.dumps(frame, separators=(",", ":")).encode()
        try:
            with anyio.fail_after(SEND_S):
                async with self._sending:
                    await self._sink.send(len(body).to_bytes(4, "big") + body)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            raise WorkerLostError(f"it has ended; {self._why()}") from None
        except TimeoutError:
            raise WorkerLostError(f"it has read nothing for {SEND_S:.0f} s") from None

    async def receive(self) -> Frame:
        try:
            size = int.from_bytes(await self._source.receive_exactly(4), "big")
            if size > LARGEST:
                raise WorkerLostError(f"a frame of {size} bytes came from it")
            frame: Frame = json.loads(await self._source.receive_exactly(size))
            return frame
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.ClosedResourceError):
            raise WorkerLostError(f"it has ended; {self._why()}") from None
        except ValueError as error:
            raise WorkerLostError(f"what came from it is no frame: {error}") from None
