"""`Executor`: the one task that calls the engine, and the way of each ticket to its outcome.

Called by `LocalService`. Engine calls go to a worker thread one at a time; everything else here
runs on the event loop. It sleeps until it is woken, it never polls.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio import CancelScope

from weaver.errors import OperationCancelledError, WeaverError
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    ForwardBackward,
    ModelCreated,
    OptimStep,
    ReleaseSampler,
    Sample,
    Sampled,
    SamplerReleased,
    SaveCheckpoint,
    StepDone,
)
from weaver.server.activity import run_of
from weaver.server.attempt import attempt_async
from weaver.server.lanes import Lane
from weaver.server.scheduler import FairShare, Head, Turns, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskStatus

    from weaver.protocol import Result
    from weaver.server.ledger import Ended, Ledger
    from weaver.server.operations import Operations
    from weaver.server.recovery import Recovery
    from weaver.server.runs import Run
    from weaver.server.sessions import Session, Ticket


class Executor:
    """Runs the heads of the lanes and the samples, by equal shares of the engine's time.

    Among lanes that of the project served longest ago comes first.
    """

    def __init__(
        self,
        operations: Operations,
        recovery: Recovery,
        *,
        ledger: Ledger,
        merge_tokens: int,
    ) -> None:
        self._operations = operations
        self._recovery = recovery
        self._ledger = ledger
        self._call = recovery.thread.call
        self._merge_tokens = merge_tokens
        self._turn = anyio.Lock(fast_acquire=True)
        """Held from the choice of an operation to its end."""
        self._share = FairShare()
        self._turns = Turns()
        self._stopped = False
        self._wake = anyio.Event()
        self._lanes: dict[Lane, Run | None] = {}
        """Lanes with something at their head, the one served longest ago first, and their runs."""
        self._samples: dict[str, Ticket] = {}
        """By the engine's job id."""
        self._added: dict[str, tuple[Sample, str]] = {}
        """With the project."""
        self._held: dict[tuple[Session, str], list[Ticket]] = {}
        self._cancelled: list[str] = []
        self._released: list[str] = []
        self._ending: dict[Ticket, str] = {}
        """Requests to release a sampler, once the samples before them have begun."""
        self.settle = ledger.settle

    def stop(self) -> None:
        """Begins no further operation."""
        self._stopped = True
        self._ledger.stop()

    def enqueue(self, ticket: Ticket, run: Run | None) -> None:
        """Takes in an accepted operation; that of a run is in its lane already."""
        operation = ticket.submission.operation
        if run is not None:
            self._lanes.setdefault(run.lane, run)
        elif isinstance(operation, Sample):
            held = self._held.get((ticket.session, operation.sampler_id))
            if held is not None:
                held.append(ticket)
                return
            job_id = ticket.job_id
            self._samples[job_id] = ticket
            self._added[job_id] = operation, _project(ticket)
        elif isinstance(operation, ReleaseSampler):
            self._ending[ticket] = operation.sampler_id
        else:
            self._lanes[Lane(ticket)] = None
        self._wake.set()

    def hold(self, session: Session, sampler_id: str, *, hold: bool) -> None:
        """Keeps a session's new samples of a sampler waiting, or lets them go on."""
        if hold:
            self._held.setdefault((session, sampler_id), [])
            return
        for ticket in self._held.pop((session, sampler_id), []):
            if not ticket.settled:
                self.enqueue(ticket, None)

    def sampled_runs(self) -> set[str]:
        """Runs whose weights sample, or wait to."""
        return {run_id for ticket in self._samples.values() if (run_id := run_of(ticket))}

    def release(self, sampler_ids: list[str]) -> None:
        """Lets go of sampleable weights before the next step of the sampler."""
        self._released += sampler_ids
        self._wake.set()

    async def unload_idle(self) -> None:
        """Takes runs out of the engine that were idle for long, unless work comes first."""
        since = time.monotonic() - self._recovery.durability.unload_after_s
        for run in list(self._operations.known.runs.values()):  # the engine's thread may add one
            if run.loaded and run.heard_at < since:
                async with self._turn:
                    if not run.lane.busy:
                        await self._unload(run)

    async def _unload(self, run: Run) -> None:
        """Unless it could not be brought back."""
        if self._recovery.store.durable and run.loaded:
            await self._recovery.unload(run)

    async def stop_run(self, run: Run) -> None:
        """Cancels what waits for a run, lets what has begun end, and unloads it."""
        with CancelScope(shield=True):
            await self.cancel(*run.lane.tickets())
            async with self._turn:
                await self._unload(run)
        run.stopped = True

    async def delete_run(self, run: Run, *, checkpoints: bool) -> None:
        """Stops and forgets a run.

        Raises:
            ConflictError: another process has it.
            StorageError
        """
        runs = self._operations.known.runs
        runs.pop(run.run_id, None)  # what comes from now on is refused
        with CancelScope(shield=True):
            try:
                await self.stop_run(run)
                gone = await self._recovery.delete(run, checkpoints=checkpoints)
            except WeaverError:
                runs[run.run_id] = run
                raise
        runs.pop(run.run_id, None)  # someone may have asked the database in the meantime
        self.release(gone)

    def beside(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a task that lasts at most as long as this."""
        self._beside.start_soon(task)

    async def cancel(self, *tickets: Ticket) -> None:
        """Ends what has not begun, and any sample, in one commit."""
        ended: list[Ended] = []
        for ticket in tickets:
            if ticket.running or ticket.settled:
                continue
            job_id = ticket.job_id
            sampled = self._samples.pop(job_id, None) is not None
            if sampled and self._added.pop(job_id, None) is None:
                self._cancelled.append(job_id)
                self._wake.set()
            ended.append((ticket, OperationCancelledError("it was cancelled.")))
        if ended:
            await self.settle(*ended)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as self._beside:
            task_status.started()
            while not self._stopped:
                async with self._turn:
                    busy = await self._work()
                if not busy:
                    await self._wake.wait()
                    self._wake = anyio.Event()

    async def _work(self) -> bool:
        """Does what comes next; False if there is nothing to do."""
        heads = self._heads()
        sampler = bool(self._added or self._cancelled or self._released or self._ending)
        side = self._share.choose(
            trainer=bool(heads), sampler=sampler or self._operations.samplers.busy
        )
        if side is None:
            return False
        start = time.perf_counter()
        await (self._train(heads) if side == "trainer" else self._sample())
        self._share.charge(side, time.perf_counter() - start)
        return True

    def _heads(self) -> list[tuple[Run | None, Ticket]]:
        heads = [(lane, run, lane.head()) for lane, run in self._lanes.items()]
        for lane, _, ticket in heads:
            if ticket is None:
                del self._lanes[lane]
        ready = [(run, ticket) for _, run, ticket in heads if ticket is not None]
        return sorted(ready, key=lambda head: self._turns.last(_project(head[1])))

    async def _train(self, heads: list[tuple[Run | None, Ticket]]) -> None:
        chosen = plan([_head(run, ticket) for run, ticket in heads], self._merge_tokens)
        batch = [heads[i] for i in chosen]
        for run, ticket in batch:
            ticket.running, ticket.began_at = True, time.monotonic()
            if run is not None:
                self._lanes[run.lane] = self._lanes.pop(run.lane)  # to the back of the queue
        self._turns.serve({_project(ticket) for _, ticket in batch})
        batch = [(run, ticket) for run, ticket in batch if await self._is_loaded(run, ticket)]
        if not batch or self._stopped:  # which may have emptied the engine
            return
        results = list(await self._call(partial(self._operations.execute, batch)))
        changed: list[tuple[Run, Result]] = []
        for i, (run, ticket) in enumerate(batch):
            result = results[i]
            if run is not None:
                ticket.number = run.execute(ticket)
                if self._recovery.store.durable:
                    run.unsaved_bytes += ticket.size_bytes
                if isinstance(result, (StepDone, CheckpointLoaded)):
                    changed.append((run, result))
            if isinstance(result, ModelCreated):
                results[i] = await self._keep(result)
            elif isinstance(result, CheckpointSaved):
                self._pin(ticket, result)
        ended = [(ticket, result) for (_, ticket), result in zip(batch, results, strict=True)]
        await self.settle(*ended, runs=[run.describe() for run, _ in changed])
        for i, (run, ticket) in enumerate(batch):
            if run is None or not _empties(ticket, results[i]):
                continue
            result = results[i]
            if run.loaded and self._recovery.due(run, at_once=isinstance(result, CheckpointLoaded)):
                rest = await self._recovery.snapshot(run)
                if rest is not None:
                    self.beside(rest)

    async def _is_loaded(self, run: Run | None, ticket: Ticket) -> bool:
        """Whether an operation can begin; if its run cannot be brought back, it has failed."""
        if run is None or run.loaded:
            return True
        failure = await self._ledger.patiently(partial(self._recovery.load, run))
        if failure is not None:
            await self.settle((ticket, failure))
        return failure is None

    async def _keep(self, created: ModelCreated) -> ModelCreated | WeaverError:
        """Writes down a new run; one that cannot be written down is none."""
        run = self._operations.known.runs[created.run.run_id]
        put = partial(self._recovery.store.put_run, created.run, model=created.model, seed=run.seed)
        hold = partial(self._recovery.hold, run)
        failure = await attempt_async(hold) or await self._ledger.patiently(put)
        if failure is None:
            return created
        del self._operations.known.runs[run.run_id]
        await self._recovery.unload(run)
        return failure

    def _pin(self, ticket: Ticket, saved: CheckpointSaved) -> None:
        """An unnamed sampler lives as long as its session, or until many newer ones came."""
        info, mine = saved.checkpoint, ticket.session.unnamed_samplers
        operation = ticket.submission.operation
        if info.kind != "sampler" or not isinstance(operation, SaveCheckpoint) or operation.name:
            return
        mine.append(info.path)
        keep = 0 if ticket.session.closed else self._operations.limits.unnamed_samplers
        self.release(mine[: max(0, len(mine) - keep)])
        del mine[: max(0, len(mine) - keep)]

    async def _sample(self) -> None:
        turn = partial(
            self._operations.samplers.turn,
            released=self._released,
            cancelled=self._cancelled,
            added=self._added,
            ended=list(self._ending.values()),
        )
        for job_id in self._added:
            self._samples[job_id].began_at = time.monotonic()
        ended: list[Ended] = [(ticket, SamplerReleased()) for ticket in self._ending]
        self._released, self._cancelled, self._added, self._ending = [], [], {}, {}
        for progress in await self._call(turn):
            ticket = self._samples.get(progress.job_id)
            if ticket is None:
                continue  # cancelled during the step
            if ticket.stream is not None and progress.deltas:
                ticket.stream.push(progress.deltas)
            if progress.error is not None:
                ended.append((ticket, progress.error))
            elif progress.result is not None:
                ended.append((ticket, Sampled(output=progress.result)))
        for ticket, _ in ended:
            self._samples.pop(ticket.job_id, None)
        await self.settle(*ended)


def _empties(ticket: Ticket, result: Result | WeaverError) -> bool:
    """Whether no gradient is left after it, so that a snapshot holds all."""
    stepped = isinstance(ticket.submission.operation, OptimStep)  # or cleared, if that failed
    return stepped or isinstance(result, CheckpointLoaded)


def _project(ticket: Ticket) -> str:
    return ticket.session.caller.project


def _head(run: Run | None, ticket: Ticket) -> Head:
    operation = ticket.submission.operation
    if run is None or not isinstance(operation, ForwardBackward):
        return Head(merge_key=None)
    return Head(
        merge_key=run.model.name if run.training_mode == "lora" else None,
        num_tokens=sum(datum.model_input.length for datum in operation.datums),
    )
