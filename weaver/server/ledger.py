"""`Ledger`: the end of each operation. Outcomes are journaled together, then shown.

Called by the executor and, for what never begins, by the service.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope

from weaver.errors import ServiceConnectionError, WeaverError
from weaver.protocol import ErrorInfo
from weaver.server.activity import answer_of
from weaver.server.attempt import attempt_async
from weaver.server.store import Settled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from weaver.protocol import Outcome, Result
    from weaver.server.activity import Activity
    from weaver.server.runs import Run
    from weaver.server.sessions import Ticket
    from weaver.server.store import Store
    from weaver.types import TrainingRun

logger = logging.getLogger(__name__)
DATABASE_AWAY_S, DATABASE_PAUSE_S = 60.0, 0.2
"""How long finished work waits for the database, and how often it is tried."""


class Ledger:
    """`unload` takes a run out of the engine, so that it comes back as the journal knows it."""

    def __init__(
        self,
        store: Store,
        *,
        runs: Mapping[str, Run],
        activity: Activity,
        unload: Callable[[Run], Awaitable[None]],
    ) -> None:
        self._store = store
        self._runs = runs
        self._activity = activity
        self._unload = unload
        self._settling = anyio.Lock(fast_acquire=True)
        self._stopped = False
        self._unwritten: list[Settled] = []
        """Outcomes that were shown though the journal could not be written: they follow later."""

    def stop(self) -> None:
        """Waits no longer for a database that is away."""
        self._stopped = True

    async def settle(
        self, *ended: tuple[Ticket, Result | WeaverError], runs: Sequence[TrainingRun] = ()
    ) -> None:
        """Journals outcomes together, then shows them; the first one of a ticket counts."""
        fresh = [(ticket, value) for ticket, value in ended if not ticket.settled]
        for ticket, value in fresh:
            ticket.settled = True
            ticket.error = value if isinstance(value, WeaverError) else None
        if not fresh:
            return
        with CancelScope(shield=True):  # what is settled gets shown
            async with self._settling:
                tickets = [ticket for ticket, _ in fresh]
                outcomes = [ticket.session.outcome(ticket, value) for ticket, value in fresh]
                settled = [*self._unwritten, *map(self._settled, tickets, outcomes)]
                failure = await self.patiently(partial(self._store.settle, settled, runs=runs))
                if failure is None:
                    self._unwritten.clear()
                else:
                    outcomes = await self._undo(tickets, outcomes, failure)
                for ticket, outcome in zip(tickets, outcomes, strict=True):
                    ticket.session.show(ticket, outcome)
                    _log(ticket, outcome)
                    self._activity.note(ticket, outcome, step=self._step(ticket))

    async def patiently(self, work: Callable[[], Awaitable[None]]) -> WeaverError | None:
        """Waits for a database that is out of reach, for a while; answers why `work` failed."""
        end = anyio.current_time() + DATABASE_AWAY_S
        while True:
            failure = await attempt_async(work)
            away = isinstance(failure, ServiceConnectionError)
            if not away or self._stopped or anyio.current_time() > end:
                return failure
            await anyio.sleep(DATABASE_PAUSE_S)

    async def _undo(
        self, tickets: Sequence[Ticket], outcomes: Sequence[Outcome], failure: WeaverError
    ) -> list[Outcome]:
        """Makes failures of outcomes that cannot be journaled; their runs go back to before."""
        undone = []
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            run = self._runs.get(ticket.submission.run_id or "")
            executed = self._store.durable and ticket.number is not None
            if run is not None and run.loaded and executed:
                await self._unload(run)
            ticket.number, ticket.error = None, ticket.error or failure
            error = outcome.error or ErrorInfo.of(failure)
            undone.append(outcome.model_copy(update={"result": None, "error": error}))
            self._unwritten.append(self._settled(ticket, undone[-1]))
        return undone

    def _step(self, ticket: Ticket) -> int | None:
        run = self._runs.get(ticket.submission.run_id or "")
        return None if run is None else run.step

    def _settled(self, ticket: Ticket, outcome: Outcome) -> Settled:
        return Settled(
            session_id=ticket.session.session_id,
            outcome=outcome,
            number=ticket.number,
            lost_gradient=ticket.number is None and ticket.discards_gradient,
            answer=answer_of(ticket, outcome, step=self._step(ticket)),
        )


def _log(ticket: Ticket, outcome: Outcome) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    submission = ticket.submission
    kind = submission.operation.kind if submission.operation else "withdrawn"
    how = outcome.error.code if outcome.error else "done"
    fields = {
        "operation_id": submission.id,
        "operation": kind,
        "outcome": how,
        "session_id": ticket.session.session_id,
        "run_id": submission.run_id,
        "seq": submission.seq,
    }
    logger.info("%s %s: %s", kind, submission.id, how, extra={"fields": fields})
