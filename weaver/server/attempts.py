"""`Attempts`: carries operations out, and again where the engine is lost meanwhile.

Called by the executor. An engine of several processes may lose one, and with it the runs there: a
run is brought back as after a restart, and its operation begun anew, which for clients is a pause.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from weaver.errors import EngineLostError, WeaverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver import protocol
    from weaver.server.operations import Operations
    from weaver.server.outcomes import Outcomes
    from weaver.server.recovery import Recovery
    from weaver.server.runs import Run
    from weaver.server.sessions import Ticket

logger = logging.getLogger(__name__)
ATTEMPTS = 3
"""So often an operation is begun whose engine is lost in the midst of it."""


@dataclass(slots=True, eq=False)
class Attempts:
    operations: Operations
    recovery: Recovery
    outcomes: Outcomes
    stopped: bool = False
    """Whether nothing is begun again."""

    async def load(self, run: Run | None) -> WeaverError | None:
        """Brings a run back, unless it is there; answers why it could not."""
        if run is None or run.loaded:
            return None
        failure: WeaverError | None = None
        for _ in range(ATTEMPTS):
            failure = await self.outcomes.patiently(partial(self.recovery.load, run))
            if self.stopped or not isinstance(failure, EngineLostError):
                break
        return failure

    async def execute(
        self, batch: Sequence[tuple[Run | None, Ticket]]
    ) -> list[protocol.Result | WeaverError]:
        """What came of operations that begin together.

        Each whose engine is lost is begun again by itself, so that one at which the engine always
        ends fails alone.
        """
        results = list(await self.operations.execute(batch))
        for i, (run, ticket) in enumerate(batch):
            for _ in range(ATTEMPTS - 1):
                if not self._lost(run, results[i]) or self.stopped:
                    break
                failure = await self.load(run)
                if failure is not None:
                    results[i] = failure
                else:
                    [results[i]] = await self.operations.execute([(run, ticket)])
            if self._lost(run, results[i]) and not self.stopped:
                results[i] = EngineLostError(
                    f"what computes ended in each of {ATTEMPTS} attempts: {results[i]}",
                    hint="Submit less at once; if it comes again, the server's log says why.",
                )
        return results

    def _lost(self, run: Run | None, result: protocol.Result | WeaverError) -> bool:
        """Whether the engine has lost a run; one that can be brought back counts as not loaded."""
        if not isinstance(result, EngineLostError):
            return False
        if run is not None and run.loaded and self.recovery.store.keeps != "nothing":
            logger.warning("%s has to be brought back: %s", run.run_id, result)
            run.loaded = False
        return True
