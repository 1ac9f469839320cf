"""`Outcomes`: the end of each operation. What came of them is journaled together, then shown.

Called by the executor and, for what never begins, by the service.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint

from weaver.boundary import attempt_async
from weaver.errors import ServiceConnectionError, StorageError, WeaverError
from weaver.server.activity import answer_of
from weaver.server.records import Settled
from weaver.wire import about_bytes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from weaver.protocol import Outcome, Result
    from weaver.server.activity import Activity
    from weaver.server.recovery import Recovery
    from weaver.server.runs import Run
    from weaver.server.sessions import Ticket
    from weaver.types import TrainingRun

logger = logging.getLogger(__name__)
DATABASE_AWAY_S, DATABASE_PAUSE_S = 60.0, 0.2
"""How long finished work waits for the journal, and how often it is tried."""
TOLD_AT_ONCE = 250
"""After so many the event loop looks at its sockets again."""
Ended = tuple["Ticket", "Result | WeaverError"]


@dataclass(slots=True, eq=False)
class _Batch:
    """What is journaled together or not at all; with others, where they wait at the same time."""

    ended: Sequence[Ended]
    runs: Sequence[TrainingRun]
    done: bool = False


class Outcomes:
    """Shows nothing that is not in the journal: it would be carried out again after a restart."""

    def __init__(self, recovery: Recovery, *, runs: Mapping[str, Run], activity: Activity) -> None:
        self._store = recovery.store
        self._runs = runs
        self._activity = activity
        self._recovery = recovery
        self._settling = anyio.Lock(fast_acquire=True)
        self._stopped = False
        self._waiting: list[_Batch] = []
        self._unwritten: list[Ended] = []
        """Failures that could not be journaled, so that their clients do not know of them yet."""

    def stop(self) -> None:
        """Waits no longer for the journal."""
        self._stopped = True

    async def settle(
        self, *ended: Ended, runs: Sequence[TrainingRun] = (), together: bool = True
    ) -> None:
        """Journals outcomes, then shows them; the first one of a ticket counts.

        They are journaled all or none, unless they need not be `together`.

        Those that cannot be journaled fail. Where not even that can be journaled, it is tried again
        with later ones; without any, only that is done.
        """
        fresh: list[Ended] = []
        for ticket, value in ended:
            if ticket.settle(value):
                fresh.append((ticket, value))
        if not (fresh or self._unwritten):
            return
        mine = [_Batch(fresh, runs)] if together else [_Batch([one], runs) for one in fresh]
        self._waiting += mine
        with CancelScope(shield=True):  # what is settled gets shown
            async with self._settling:
                if mine and mine[-1].done:
                    return
                batches, self._waiting = self._waiting, []
                before, self._unwritten = self._unwritten, []
                every = [one for batch in batches for one in batch.ended]
                described = [run for batch in batches for run in batch.runs]
                for batch in batches:
                    batch.done = True
                failure = await self._tell(every, runs=described) if every else None
                together = len(batches) > 1 and not isinstance(failure, ServiceConnectionError)
                failed = [one for one in batches if one.ended and failure is not None]
                for batch in failed:
                    why = failure
                    if together:  # the fault of one is not that of the others
                        why = await self._tell(batch.ended, runs=batch.runs)
                    if why is not None:
                        await self._tell_undone(batch.ended, why)
                for one in before:
                    if await self._tell([one], waits_for=()) is not None:
                        self._unwritten.append(one)

    async def _tell_undone(self, ended: Sequence[Ended], failure: WeaverError) -> None:
        undone = await self._undo(ended, failure)
        if await self._tell(undone, waits_for=(ServiceConnectionError, StorageError)) is not None:
            logger.error("not told of, until there is room for it: %s", failure)
            self._unwritten += undone

    async def _tell(
        self,
        ended: Sequence[Ended],
        *,
        runs: Sequence[TrainingRun] = (),
        waits_for: tuple[type[WeaverError], ...] = (ServiceConnectionError,),
    ) -> WeaverError | None:
        """Shows outcomes, unless they cannot be journaled; answers why."""
        told: list[tuple[Ticket, Settled]] = []
        for ticket, value in ended:
            told.append((ticket, self._settled(ticket, ticket.session.outcome(ticket, value))))
            if len(told) % TOLD_AT_ONCE == 0:
                await checkpoint()
        write = partial(self._store.settle, [settled for _, settled in told], runs=runs)
        failure = await self.patiently(write, waits_for=waits_for)
        for i, (ticket, settled) in enumerate(told, start=1):
            outcome = settled.outcome
            if i % TOLD_AT_ONCE == 0:
                await checkpoint()
            if failure is not None:
                ticket.session.withdraw(outcome)
                continue
            ticket.session.show(ticket, outcome, size_bytes=settled.size_bytes)
            _log(ticket, outcome)
            self._activity.note(ticket, outcome, step=self._step(ticket))
        return failure

    async def patiently(
        self,
        work: Callable[[], Awaitable[None]],
        *,
        waits_for: tuple[type[WeaverError], ...] = (ServiceConnectionError,),
    ) -> WeaverError | None:
        """Tries again for a while what such an error ends; answers why `work` failed."""
        end = anyio.current_time() + DATABASE_AWAY_S
        while True:
            failure = await attempt_async(work)
            over = self._stopped or anyio.current_time() > end
            if not isinstance(failure, waits_for) or over:
                return failure
            await anyio.sleep(DATABASE_PAUSE_S)

    async def _undo(self, ended: Sequence[Ended], failure: WeaverError) -> list[Ended]:
        """Failures in place of what cannot be journaled; their runs go back to before."""
        undone: list[Ended] = []
        for ticket, _ in ended:
            run = self._runs.get(ticket.submission.run_id or "")
            executed = self._store.keeps != "nothing" and ticket.number is not None
            if run is not None and run.loaded and executed:
                await self._recovery.unload(run)
            undone.append((ticket, ticket.undo(failure)))
        return undone

    def _step(self, ticket: Ticket) -> int | None:
        run = self._runs.get(ticket.submission.run_id or "")
        return None if run is None else run.step

    def _settled(self, ticket: Ticket, outcome: Outcome) -> Settled:
        return Settled(
            session_id=ticket.session.session_id,
            outcome=outcome,
            size_bytes=about_bytes(outcome),
            number=ticket.number,
            lost_gradient=ticket.number is None and ticket.discards_gradient,
            answer=answer_of(ticket, outcome, step=self._step(ticket)),
        )


def _log(ticket: Ticket, outcome: Outcome) -> None:
    submission = ticket.submission
    how = outcome.error.code if outcome.error else "done"
    quiet = submission.kind == "sample" and how in ("done", "cancelled")
    level = logging.DEBUG if quiet else logging.INFO  # they end by the thousand
    if not logger.isEnabledFor(level):
        return
    fields = {
        "operation_id": submission.id,
        "operation": submission.kind,
        "outcome": how,
        "session_id": ticket.session.session_id,
        "run_id": submission.run_id,
        "seq": submission.seq,
    }
    logger.log(level, "%s %s: %s", submission.kind, submission.id, how, extra={"fields": fields})
