"""`Executor`: which operation begins when, and the way of each ticket to its outcome.

Called by `LocalService`, on the event loop. Operations of runs wait in lanes for their turn; a
worker of each lane of the engine carries them out one after the other. Samples begin at once: who
waits for whom on a device is the engine's affair. It sleeps until it is woken, it never polls.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from anyio import CancelScope

from weaver import protocol
from weaver.boundary import attempt_async
from weaver.errors import OperationCancelledError, WeaverError
from weaver.server.activity import run_of
from weaver.server.attempts import Attempts
from weaver.server.lanes import Head, Lane, Turns, plan
from weaver.server.operations import run_id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from anyio.abc import TaskStatus

    from weaver.engine.base import SampleProgress
    from weaver.server.operations import Operations
    from weaver.server.outcomes import Ended, Outcomes
    from weaver.server.recovery import Recovery
    from weaver.server.runs import Run
    from weaver.server.sessions import Session, Ticket

COMPUTING = {"forward_backward", "optim_step"}
"""Kinds of operations that a replay does again."""
UNLOAD_S = 1.0
"""How long taking out an idle run waits for its lane."""


@dataclass(slots=True, eq=False)
class Worker:
    """Carries out the operations of one lane of the engine, one at a time."""

    turn: anyio.Lock = field(default_factory=partial(anyio.Lock, fast_acquire=True))
    """Held from the choice of an operation to its end."""
    wake: anyio.Event = field(default_factory=anyio.Event)
    lanes: dict[Lane, Run | None] = field(default_factory=dict)
    """Those with something at their head, the one served longest ago first, and their runs."""
    turns: Turns = field(default_factory=Turns)


class Executor:
    """Among the lanes of a worker those of the project that had least of its time come first."""

    def __init__(
        self,
        operations: Operations,
        recovery: Recovery,
        *,
        outcomes: Outcomes,
        merge_tokens: int,
    ) -> None:
        self._operations = operations
        self._recovery = recovery
        self._outcomes = outcomes
        self._attempts = Attempts(operations, recovery, outcomes)
        self._samplers = operations.samplers
        self._merge_tokens = merge_tokens
        self._stopped = False
        self._workers: dict[str, Worker] = {}
        """By the engine's lane."""
        self._beginning: dict[str, deque[Ticket | None]] = {}
        """By sampler, what is to begin, in that order: samples, and requests to release it,
        which are nobody's where its checkpoint or session went."""
        self._samples: dict[Ticket, Callable[[], None] | None] = {}
        """Those that have not ended, and what drops them once the engine has them."""
        self._sampled: list[Ended] = []
        """Those that have ended and wait to be settled."""
        self._any_sampled = anyio.Event()
        self._held: dict[tuple[Session, str], list[Ticket]] = {}
        self.settle = outcomes.settle

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as self._beside:
            task_status.started()
            await self._settle_samples()

    def beside(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a task that lasts at most as long as this."""
        self._beside.start_soon(task)

    async def stop(self) -> None:
        """Begins no further operation, drops the samples, and waits for what has begun."""
        self._stopped = self._attempts.stopped = True
        self._outcomes.stop()
        self._drop(*list(self._samples))
        for worker in self._workers.values():
            async with worker.turn:
                worker.wake.set()

    def enqueue(self, ticket: Ticket, run: Run | None) -> None:
        """Takes in an accepted operation; that of a run is in its lane already."""
        operation = ticket.submission.operation
        if run is not None:
            self._work_on(run.lane, run, run_id=run.run_id, base_model=run.model.name)
        elif isinstance(operation, protocol.Sample):
            held = self._held.get((ticket.session, operation.sampler_id))
            if held is not None:
                held.append(ticket)
                return
            self._samples[ticket] = None
            self._begin(operation.sampler_id, ticket)
        elif isinstance(operation, protocol.ReleaseSampler):
            self._begin(operation.sampler_id, ticket)
        else:
            base_model = getattr(operation, "base_model", None) or ""
            creates = isinstance(operation, protocol.CreateModel)
            run_id = run_id_of(ticket) if creates else ""
            self._work_on(Lane(ticket), None, run_id=run_id, base_model=base_model)

    # --- training and the like, in turns --------------------------------------------------------

    def _worker(self, run_id: str, base_model: str) -> Worker:
        lane = self._operations.engine.lane(run_id, base_model)
        worker = self._workers.get(lane)
        if worker is None:
            worker = self._workers[lane] = Worker()
            self.beside(partial(self._work_off, worker))
        return worker

    def _work_on(self, lane: Lane, run: Run | None, *, run_id: str, base_model: str) -> None:
        worker = self._worker(run_id, base_model)
        worker.lanes.setdefault(lane, run)
        worker.wake.set()

    async def _work_off(self, worker: Worker) -> None:
        while not self._stopped:
            async with worker.turn:
                heads = self._heads(worker)
                if heads:
                    await self._train(worker, heads)
            if not heads:
                await worker.wake.wait()
                worker.wake = anyio.Event()

    async def unload_idle(self) -> None:
        """Takes runs out of the engine that were idle for long, unless work comes first."""
        since = time.monotonic() - self._recovery.durability.unload_after_s
        for run in list(self._operations.registry.runs.values()):
            if run.loaded and run.heard_at < since:
                turn = self._worker(run.run_id, run.model.name).turn
                with anyio.move_on_after(UNLOAD_S) as waiting:
                    await turn.acquire()
                if waiting.cancelled_caught:  # it may wait for memory: another time
                    continue
                try:
                    if not run.lane.busy:
                        await self._unload(run)
                finally:
                    turn.release()

    async def _unload(self, run: Run) -> None:
        """Unless it could not be brought back."""
        if self._recovery.store.keeps != "nothing" and run.loaded:
            await self._recovery.unload(run)

    async def stop_run(self, run: Run) -> None:
        """Cancels what waits for a run, lets what has begun end, and unloads it."""
        with CancelScope(shield=True):
            await self.cancel(*run.lane.tickets())
            async with self._worker(run.run_id, run.model.name).turn:
                await self._unload(run)
        run.stopped = True

    async def delete_run(self, run: Run, *, checkpoints: bool) -> None:
        """Stops and forgets a run.

        Raises:
            ConflictError: another process has it.
            StorageError
        """
        runs = self._operations.registry.runs
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

    async def cancel(self, *tickets: Ticket) -> None:
        """Ends what has not begun, and any sample, in one commit; others go on meanwhile."""
        self._drop(*tickets)
        ended: list[Ended] = [
            (ticket, OperationCancelledError("it was cancelled."))
            for ticket in tickets
            if not (ticket.running or ticket.settled)
        ]
        if ended:
            await self.settle(*ended)

    def _heads(self, worker: Worker) -> list[tuple[Run | None, Ticket]]:
        heads = [(lane, run, lane.head()) for lane, run in worker.lanes.items()]
        for lane, _, ticket in heads:
            if ticket is None:
                del worker.lanes[lane]
        ready = [(run, ticket) for _, run, ticket in heads if ticket is not None]
        return sorted(ready, key=lambda head: worker.turns.place(_project(head[1])))

    async def _train(self, worker: Worker, heads: Sequence[tuple[Run | None, Ticket]]) -> None:
        chosen = plan([_head(run, ticket) for run, ticket in heads], self._merge_tokens)
        batch = [heads[i] for i in chosen]
        for run, ticket in batch:
            ticket.begin()
            if run is not None:
                worker.lanes[run.lane] = worker.lanes.pop(run.lane)  # to the back of the queue
        worker.turns.serve([_project(ticket) for _, ticket in batch])
        batch = [(run, ticket) for run, ticket in batch if await self._is_loaded(run, ticket)]
        if not batch or self._stopped:  # which may have emptied the engine
            return
        begin = time.monotonic()
        results = await self._attempts.execute(batch)
        took_s = (time.monotonic() - begin) / len(batch)
        changed: list[tuple[Run, protocol.Result]] = []
        for i, (run, ticket) in enumerate(batch):
            result = results[i]
            worker.turns.charge(_project(ticket), took_s)
            if run is not None:
                ticket.number = run.execute(ticket)
                if self._recovery.store.keeps != "nothing":
                    run.unsaved_bytes += ticket.size_bytes
                if ticket.submission.kind in COMPUTING:
                    run.computed_s += took_s
                if isinstance(result, (protocol.StepDone, protocol.CheckpointLoaded)):
                    changed.append((run, result))
            if isinstance(result, protocol.ModelCreated):
                results[i] = await self._keep(result)
            elif isinstance(result, protocol.CheckpointSaved):
                self._pin(ticket, result)
        ended = [(ticket, result) for (_, ticket), result in zip(batch, results, strict=True)]
        await self.settle(*ended, runs=[run.describe() for run, _ in changed])
        for i, (run, ticket) in enumerate(batch):
            if run is None or not _empties(ticket, results[i]):
                continue
            at_once = isinstance(results[i], protocol.CheckpointLoaded)
            if run.loaded and self._recovery.due(run, at_once=at_once):
                rest = await self._recovery.snapshot(run)
                if rest is not None:
                    self.beside(rest)

    async def _is_loaded(self, run: Run | None, ticket: Ticket) -> bool:
        """Whether an operation can begin; if its run cannot be brought back, it has failed."""
        failure = await self._attempts.load(run)
        if failure is not None:
            await self.settle((ticket, failure))
        return failure is None

    async def _keep(self, created: protocol.ModelCreated) -> protocol.ModelCreated | WeaverError:
        """Writes down a new run; one that cannot be written down is none."""
        run, store = self._operations.registry.runs[created.run.run_id], self._recovery.store

        async def put() -> None:
            run.name = await store.put_run(created.run, model=created.model, seed=run.seed)

        hold = partial(self._recovery.hold, run)
        failure = await attempt_async(hold) or await self._outcomes.patiently(put)
        if failure is None:
            return created.model_copy(update={"run": run.describe()})
        del self._operations.registry.runs[run.run_id]
        await self._recovery.unload(run)
        return failure

    def _pin(self, ticket: Ticket, saved: protocol.CheckpointSaved) -> None:
        """An unnamed sampler lives as long as its session, or until many newer ones came."""
        info, mine = saved.checkpoint, ticket.session.unnamed_samplers
        operation = ticket.submission.operation
        assert isinstance(operation, protocol.SaveCheckpoint)
        if info.kind != "sampler" or operation.name:
            return
        mine.append(info.path)
        keep = 0 if ticket.session.closed else self._operations.limits.unnamed_samplers
        self.release(mine[: max(0, len(mine) - keep)])
        del mine[: max(0, len(mine) - keep)]

    # --- samples --------------------------------------------------------------------------------

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
        return {run_id for ticket in self._samples if (run_id := run_of(ticket))}

    def release(self, sampler_ids: Sequence[str]) -> None:
        """Lets go of sampleable weights, once the samples before have begun."""
        for sampler_id in sampler_ids:
            self._begin(sampler_id, None)

    def _begin(self, sampler_id: str, ticket: Ticket | None) -> None:
        waiting = self._beginning.get(sampler_id)
        if waiting is None:
            waiting = self._beginning[sampler_id] = deque()
            self.beside(partial(self._begin_all, sampler_id, waiting))
        waiting.append(ticket)

    async def _begin_all(self, sampler_id: str, waiting: deque[Ticket | None]) -> None:
        """Gives the engine what waits for a sampler, in its order."""
        while waiting and not self._stopped:
            ticket = waiting.popleft()
            operation = ticket.submission.operation if ticket else None
            if ticket is None or not isinstance(operation, protocol.Sample):
                await self._samplers.discard(sampler_id)
                if ticket is not None:
                    await self.settle((ticket, protocol.SamplerReleased()))
                continue
            if ticket not in self._samples:  # it was cancelled; its outcome may be on its way
                continue
            begin = partial(self._samplers.begin, project=_project(ticket))
            hear = partial(self._hear, ticket)
            drop = await attempt_async(begin, ticket.job_id, operation, hear)
            if isinstance(drop, WeaverError):
                self._end(ticket, drop)
            elif ticket not in self._samples:
                drop()
            else:
                ticket.begin()
                self._samples[ticket] = drop
        del self._beginning[sampler_id]

    def _drop(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            drop = self._samples.pop(ticket, None)
            if drop is not None:
                drop()

    def _hear(self, ticket: Ticket, progress: SampleProgress) -> None:
        """Shows the pieces of a sample as they come, and takes its result."""
        if ticket.stream is not None and progress.deltas:
            ticket.stream.push(progress.deltas)
        if progress.error is not None:
            self._end(ticket, progress.error)
        elif progress.result is not None:
            self._end(ticket, protocol.Sampled(output=progress.result))

    def _end(self, ticket: Ticket, value: protocol.Sampled | WeaverError) -> None:
        if ticket in self._samples:
            del self._samples[ticket]
            self._sampled.append((ticket, value))
            self._any_sampled.set()

    async def _settle_samples(self) -> None:
        """Those that end together in one commit."""
        while True:
            await self._any_sampled.wait()
            ended, self._sampled = self._sampled, []
            self._any_sampled = anyio.Event()
            await self.settle(*ended, together=False)


def _empties(ticket: Ticket, result: protocol.Result | WeaverError) -> bool:
    """Whether no gradient is left after it, so that a snapshot holds all.

    A step that failed has cleared it, too.
    """
    stepped = isinstance(ticket.submission.operation, protocol.OptimStep)
    return stepped or isinstance(result, protocol.CheckpointLoaded)


def _project(ticket: Ticket) -> str:
    return ticket.session.caller.project


def _head(run: Run | None, ticket: Ticket) -> Head:
    operation = ticket.submission.operation
    if run is None or run.training_mode != "lora" or operation is None:
        return Head(merge_key=None)
    key = f"{operation.kind} {run.model.name}"
    if isinstance(operation, protocol.OptimStep):
        return Head(merge_key=key)
    if isinstance(operation, protocol.ForwardBackward):
        tokens = sum(datum.model_input.length for datum in operation.datums)
        return Head(merge_key=key, num_tokens=tokens)
    return Head(merge_key=None)
