"""`gather`: what Ray's actors answer, awaited on any event loop. Called by `TrainerGroup`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from weaver.threads import call_soon

if TYPE_CHECKING:
    from concurrent.futures import Future


async def gather(references: Sequence[Any], within_s: float, agree_s: float) -> list[Any]:
    """The values of object references, in their order.

    The first that fails is raised at once: the others may wait for the one that has failed. One
    whose `error` is set is what the others have to answer, too, in `agree_s`.

    Raises:
        TimeoutError: not all are there within so many seconds.
        Exception: why one has failed.
    """
    loop, changed = current_token().native_token, anyio.Event()
    futures: list[Future[Any]] = [reference.future() for reference in references]

    def tell(_: Future[Any]) -> None:
        call_soon(loop, lambda: changed.set())

    for future in futures:
        future.add_done_callback(tell)
    with anyio.fail_after(within_s) as scope:
        agreeing = False
        while True:
            changed = anyio.Event()
            done = [future for future in futures if future.done()]
            values = [future.result() for future in done]  # raises what failed
            if len(done) == len(futures):
                return [future.result() for future in futures]
            if not agreeing and any(getattr(value, "error", None) for value in values):
                agreeing = True
                scope.deadline = min(scope.deadline, anyio.current_time() + agree_s)
            await changed.wait()
