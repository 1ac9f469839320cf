"""`Executor`: the one task that calls the engine, and the way of each ticket to its outcome.

Called by `LocalService`. Engine calls go to a worker thread one at a time; everything else here
runs on the event loop. It sleeps until it is woken, it never polls.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from weaver.errors import OperationCancelledError, WeaverError
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    ErrorInfo,
    ForwardBackward,
    ModelCreated,
    Sample,
    Sampled,
    StepDone,
)
from weaver.server.lanes import Lane
from weaver.server.scheduler import FairShare, Head, plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.protocol import Operation, Result
    from weaver.server.operations import Operations
    from weaver.server.sessions import Ticket
    from weaver.server.store import Store

T = TypeVar("T")


class Executor:
    """Runs the heads of the lanes and the samples, by equal shares of the engine's time."""

    def __init__(
        self, operations: Operations, store: Store, *, merge_tokens: int, unnamed_samplers: int
    ) -> None:
        self._operations = operations
        self._store = store
        self._merge_tokens = merge_tokens
        self._unnamed_samplers = unnamed_samplers
        self._engine_free = CapacityLimiter(1)
        self._share = FairShare()
        self._stopped = False
        self._wake = anyio.Event()
        self._lanes: dict[Lane, None] = {}
        """Lanes with something at their head, the one served longest ago first."""
        self._samples: dict[str, Ticket] = {}
        """By the engine's job id."""
        self._added: dict[str, Sample] = {}
        self._cancelled: list[str] = []
        self._released: list[str] = []

    async def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread while nothing else uses the engine.

        A cancelled caller does not wait for the thread, which runs on to the end of `work`.
        """
        return await to_thread.run_sync(work, limiter=self._engine_free, abandon_on_cancel=True)

    def stop(self) -> None:
        """Begins no further operation."""
        self._stopped = True

    def enqueue(self, ticket: Ticket, lane: Lane | None) -> None:
        """Takes in an accepted operation; one without a lane belongs to no run."""
        operation = ticket.submission.operation
        if lane is not None:
            self._lanes.setdefault(lane)
        elif isinstance(operation, Sample):
            job_id = _job_id(ticket)
            self._samples[job_id] = ticket
            self._added[job_id] = operation
        else:
            self._lanes[Lane(None, ticket)] = None
        self._wake.set()

    def release(self, sampler_ids: list[str]) -> None:
        """Lets go of sampleable weights before the next step of the sampler."""
        self._released += sampler_ids
        self._wake.set()

    async def cancel(self, ticket: Ticket) -> None:
        """Ends what has not begun, and any sample."""
        if ticket.running or ticket.settled:
            return
        job_id = _job_id(ticket)
        if self._samples.pop(job_id, None) is not None and self._added.pop(job_id, None) is None:
            self._cancelled.append(job_id)
            self._wake.set()
        await self.settle(ticket, OperationCancelledError("it was cancelled."))

    async def settle(self, ticket: Ticket, value: Result | WeaverError) -> None:
        """Journals the outcome, then shows it; the first one counts."""
        if ticket.settled:
            return
        ticket.settled = True
        if isinstance(value, WeaverError):
            ticket.error = value
        outcome = ErrorInfo.of(value) if isinstance(value, WeaverError) else value
        await self._store.settle(ticket.session.session_id, ticket.submission.id, outcome)
        ticket.session.settle(ticket, outcome)

    async def run(self) -> None:
        """Until cancelled."""
        while not self._stopped:
            heads = self._heads()
            sampler = bool(self._added or self._cancelled or self._released)
            side = self._share.choose(
                trainer=bool(heads), sampler=sampler or self._operations.samplers.busy
            )
            if side is None:
                await self._wake.wait()
                self._wake = anyio.Event()
                continue
            start = time.perf_counter()
            await (self._train(heads) if side == "trainer" else self._sample())
            self._share.charge(side, time.perf_counter() - start)

    def _heads(self) -> list[tuple[Lane, Ticket]]:
        heads = [(lane, lane.head()) for lane in self._lanes]
        for lane, ticket in heads:
            if ticket is None:
                del self._lanes[lane]
        return [(lane, ticket) for lane, ticket in heads if ticket is not None]

    async def _train(self, heads: list[tuple[Lane, Ticket]]) -> None:
        chosen = plan([_head(lane, ticket) for lane, ticket in heads], self._merge_tokens)
        batch = [heads[i] for i in chosen]
        for lane, ticket in batch:
            ticket.running = True
            self._lanes[lane] = self._lanes.pop(lane)  # to the back of the queue
        work = [(lane.run, _operation(ticket)) for lane, ticket in batch]
        results = await self.call(partial(self._operations.execute, work))
        for (lane, ticket), result in zip(batch, results, strict=True):
            if isinstance(result, ModelCreated):
                await self._store.put_run(result.run)
            elif lane.run is not None and isinstance(result, (StepDone, CheckpointLoaded)):
                await self._store.put_run(lane.run.describe())
            if isinstance(result, CheckpointSaved):
                self._pin(ticket, result)
            await self.settle(ticket, result)

    def _pin(self, ticket: Ticket, saved: CheckpointSaved) -> None:
        """An unnamed sampler lives as long as its session, or until many newer ones came."""
        info, mine = saved.checkpoint, ticket.session.unnamed_samplers
        if info.kind != "sampler" or info.folder is not None:
            return
        mine.append(info.path)
        keep = 0 if ticket.session.closed else self._unnamed_samplers
        self.release(mine[: max(0, len(mine) - keep)])
        del mine[: max(0, len(mine) - keep)]

    async def _sample(self) -> None:
        turn = partial(
            self._operations.samplers.turn,
            released=self._released,
            cancelled=self._cancelled,
            added=self._added,
        )
        self._released, self._cancelled, self._added = [], [], {}
        for progress in await self.call(turn):
            ticket = self._samples.get(progress.job_id)
            if ticket is None:
                continue  # cancelled during the step
            if ticket.stream is not None and progress.deltas:
                ticket.stream.push(progress.deltas)
            if progress.error is not None:
                del self._samples[progress.job_id]
                await self.settle(ticket, progress.error)
            elif progress.result is not None:
                del self._samples[progress.job_id]
                await self.settle(ticket, Sampled(output=progress.result))


def _job_id(ticket: Ticket) -> str:
    return f"{ticket.session.session_id}/{ticket.submission.id}"


def _operation(ticket: Ticket) -> Operation:
    assert ticket.submission.operation is not None
    return ticket.submission.operation


def _head(lane: Lane, ticket: Ticket) -> Head:
    operation = ticket.submission.operation
    if lane.run is None or not isinstance(operation, ForwardBackward):
        return Head(merge_key=None)
    return Head(
        merge_key=lane.run.model.name if lane.run.training_mode == "lora" else None,
        num_tokens=sum(datum.model_input.length for datum in operation.datums),
    )
