"""The pieces of a sample as they come: written by the executor, read by any number of readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from weaver.errors import WeaverError
    from weaver.types import SampleDelta


class SampleStream:
    """A list that grows until it is finished; each reader starts at its beginning.

    It holds at most max_tokens pieces per sequence, so a slow reader costs memory that is bounded
    and never stalls the sampler.
    """

    def __init__(self) -> None:
        self.acknowledged = False
        """The client has the outcome of the sample."""
        self._pieces: list[SampleDelta] = []
        self._finished = False
        self._read = False
        self._error: WeaverError | None = None
        self._changed = anyio.Event()

    @property
    def finished_with(self) -> bool:
        """Read to the end and acknowledged: nobody will ask for it again."""
        return self._read and self.acknowledged

    def push(self, deltas: Sequence[SampleDelta]) -> None:
        self._pieces.extend(deltas)
        self._notify()

    def finish(self, error: WeaverError | None) -> None:
        """Ends it once; `error` is what readers get after the last piece."""
        if not self._finished:
            self._finished, self._error = True, error
            self._notify()

    async def read(self) -> AsyncGenerator[SampleDelta, None]:
        """All pieces from the first.

        Raises:
            WeaverError: that of the sample, at its end.
        """
        position = 0
        while True:
            while position < len(self._pieces):
                position += 1
                yield self._pieces[position - 1]
            if self._finished:
                break
            await self._changed.wait()
        self._read = True
        if self._error is not None:
            raise self._error

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
