"""`TwoDevices`: the fake engine where training and sampling have a device each, and take time.

For what overlaps. A pass and a step of the sampler sleep, each in a thread of its own, and how long
they slept is counted: `seconds["training"]`, `seconds["sampling"]`.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from tests.fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.base import SampleJob, SampleProgress, WeightsRef


class TwoDevices(FakeEngine):
    """
    Args:
        pass_s: of a call of `forward_backward`.
        token_s: of a step of the sampler, in which every row gets a token.
    """

    def __init__(self, *, pass_s: float = 0.0, token_s: float = 0.0) -> None:
        self.seconds = {"training": 0.0, "sampling": 0.0}
        super().__init__(hook=partial(self._sleep, "training", "forward_backward", pass_s))
        self._drawing = FakeEngine(hook=partial(self._sleep, "sampling", "step", token_s))

    def _sleep(self, kind: str, method: str, length_s: float, name: str, argument: object) -> None:
        if name == method and length_s:
            begin = time.monotonic()
            time.sleep(length_s)
            self.seconds[kind] += time.monotonic() - begin

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        for run_id, (uri, snapshot) in self._snapshots.items():
            if uri == ref.uri:
                self._drawing._snapshots[run_id] = uri, snapshot
        return await self._drawing.publish(weights_id, ref)

    async def release(self, weights_id: str) -> None:
        await self._drawing.release(weights_id)

    def sample(self, job: SampleJob, tell: Callable[[SampleProgress], None]) -> Callable[[], None]:
        return self._drawing.sample(job, tell)

    def close(self) -> None:
        self._drawing.close()
        super().close()
