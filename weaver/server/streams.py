"""The pieces of a sample as they come: written by the executor, read by any number of readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from weaver.errors import WeaverError
    from weaver.types import SampleDelta


class SampleStream:
    """A list that grows until it is finished; each reader starts where it likes.

    It holds at most max_tokens pieces per sequence, so a slow reader costs memory that is bounded
    and never stalls the sampler.
    """

    def __init__(self) -> None:
        self.acknowledged = False
        """The client has the outcome of the sample."""
        self.read = False
        """A reader had all of it."""
        self.error: WeaverError | None = None
        """What readers get after the last piece."""
        self.pieces: list[SampleDelta] = []
        self.finished = anyio.Event()
        self._more: anyio.Event | None = None
        """Set with the next piece; made by the first who waits for it."""

    @property
    def finished_with(self) -> bool:
        """Read to the end and acknowledged: nobody will ask for it again."""
        return self.read and self.acknowledged

    def push(self, deltas: Sequence[SampleDelta]) -> None:
        self.pieces.extend(deltas)
        self._notify()

    def finish(self, error: WeaverError | None) -> None:
        """Ends it; only the first time counts."""
        if not self.finished.is_set():
            self.error = error
            self.finished.set()
            self._notify()

    async def grown(self, length: int) -> None:
        """Waits until there are more pieces than that, or it is finished."""
        while len(self.pieces) <= length and not self.finished.is_set():
            if self._more is None:
                self._more = anyio.Event()
            await self._more.wait()

    async def each(self) -> AsyncGenerator[SampleDelta, None]:
        """All pieces from the first.

        Raises:
            WeaverError: that of the sample, at its end.
        """
        position = 0
        while True:
            await self.grown(position)
            if position == len(self.pieces):
                break
            position += 1
            yield self.pieces[position - 1]
        self.read = True
        if self.error is not None:
            raise self.error

    def _notify(self) -> None:
        if self._more is not None:
            self._more.set()
            self._more = None
