"""`Intake`: how submissions are checked and come into the lanes, and the end of sessions.

Called by `LocalService`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope, CapacityLimiter, to_thread

from weaver import errors, protocol, wire
from weaver.boundary import attempt, attempt_async
from weaver.checks import check_datums
from weaver.errors import WeaverError
from weaver.heads import lengths_together
from weaver.names import check_name, check_run_name
from weaver.server.checkpoints import SCHEME, Location
from weaver.server.records import fingerprint
from weaver.server.registry import Access, no_run
from weaver.types import ModelInput, TrainingMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from weaver.server.executor import Executor
    from weaver.server.journal import Journal
    from weaver.server.registry import Registry
    from weaver.server.runs import Run
    from weaver.server.sessions import Session, Ticket
    from weaver.server.settings import Limits
    from weaver.types import Datum

ORDERED = (
    protocol.ForwardBackward,
    protocol.OptimStep,
    protocol.SaveCheckpoint,
    protocol.LoadCheckpoint,
)


@dataclass(frozen=True, slots=True)
class Intake:
    executor: Executor
    store: Journal
    registry: Registry
    limits: Limits
    gap_timeout_s: float
    now: Callable[[], datetime]
    prepare: Callable[[protocol.Sample], protocol.Sample]
    """Makes tokens of a prompt that is text, and compiles what samples are to keep to."""
    max_tokens_trained: Callable[[str, TrainingMode], int | None]
    """The engine's."""
    fitting: dict[tuple[str, TrainingMode], int | None] = field(default_factory=dict)
    """What it answered."""
    preparing: defaultdict[str, CapacityLimiter] = field(
        default_factory=lambda: defaultdict(lambda: CapacityLimiter(1))
    )
    """By project: one sample at a time."""

    async def take(self, session: Session, submissions: Sequence[protocol.Submission]) -> None:
        """Journals what is new and puts it in its place; a refused operation gets its outcome.

        Raises:
            ConflictError: an id or a place was used with another body.
            QuotaExceededError: too much is pending.
            StorageError, ServiceConnectionError: it could not be journaled. Nothing was accepted.
        """
        async with session.submitting:
            weighed = await _weigh(submissions)
            fresh = session.unseen(submissions, [body for body, _ in weighed])
            sizes = {one.id: size for one, (_, size) in zip(submissions, weighed, strict=True)}
            with CancelScope(shield=True):  # journaled means accepted, also if the caller is gone
                try:
                    mine = self.registry.sessions_of(session.caller.project)
                    pending = sum(one.unfinished for one in mine)
                    self.limits.check_pending(pending, new=len(fresh))
                    held, new = sum(s.held_bytes for s in mine), sum(sizes[s.id] for s in fresh)
                    self.limits.check_bytes(held, new=new)
                    await self.store.append(session.session_id, fresh)
                except WeaverError:
                    session.forget(fresh)
                    raise
                for submission in fresh:
                    await self.accept(session.ticket(submission, sizes[submission.id]))

    async def accept(self, ticket: Ticket) -> None:
        submission, session = ticket.submission, ticket.session
        access = Access(session.caller, self.registry)
        run_id = submission.run_id or ""
        run = self.registry.runs.get(run_id) if access.has_run(run_id) else None
        check = partial(self._refusal, ticket, run, await self._fitting(run), access=access)
        error = ticket.error or await wire.beside(ticket.size_bytes, check)
        operation = submission.operation
        if error is None and isinstance(operation, protocol.Sample) and not operation.prepared:
            error = await self._prepare(ticket, operation)
        if ticket.settled and run is None:  # it was cancelled meanwhile
            return
        if submission.operation is None and error is None:
            error = errors.OperationCancelledError("it was withdrawn before it was sent.")
        if isinstance(submission.operation, protocol.ReleaseSampler) and error is None:
            error = _forget_sampler(session, submission.operation.sampler_id)
        if run is not None:
            run.heard(self.now())
        if run is None or submission.seq is None:
            if error is None:
                self.executor.enqueue(ticket, None)
        elif run.lane.add(ticket):
            self.executor.enqueue(ticket, run)
            self._watch(run, session)
        else:
            error = error or errors.ConflictError(
                f"seq {submission.seq} of run {run.run_id} came after its place was given up.",
                hint="Submit it again with the next seq.",
            )
        if error is not None:
            await self.executor.settle((ticket, error))

    async def _fitting(self, run: Run | None) -> int | None:
        """Tokens of a sequence whose gradient fits the engine; asked beside the event loop."""
        if run is None:
            return None
        key = run.model.name, run.training_mode
        if key not in self.fitting:
            told = await to_thread.run_sync(attempt, self.max_tokens_trained, *key)
            if isinstance(told, WeaverError):  # the operation will say what is wrong
                return None
            self.fitting[key] = told
        return self.fitting[key]

    async def _prepare(self, ticket: Ticket, operation: protocol.Sample) -> WeaverError | None:
        """Beside the engine; answers why it cannot be done, or is too large then."""
        limiter = self.preparing[ticket.session.caller.project]
        prepared = await to_thread.run_sync(attempt, self.prepare, operation, limiter=limiter)
        if isinstance(prepared, WeaverError):
            return prepared
        ticket.replace(prepared)
        return attempt(_check_size, prepared, self.limits)

    def _watch(self, run: Run, session: Session) -> None:
        """Starts a timer if something waits for an operation that has not come."""
        inbox = run.lane.inbox(session.session_id)
        if inbox.waiting and not inbox.watched:
            inbox.watched = True
            self.executor.beside(partial(self._expire, run, session))

    async def _expire(self, run: Run, session: Session) -> None:
        inbox = run.lane.inbox(session.session_id)
        while inbox.waiting:
            missing = inbox.next_seq
            await anyio.sleep(self.gap_timeout_s)
            if inbox.waiting and inbox.next_seq == missing:
                await self.give_up(run, session)
        inbox.watched = False

    async def give_up(self, run: Run, session: Session) -> None:
        """Fails what waits for an operation that never came."""
        missing = run.lane.inbox(session.session_id).next_seq
        ended: list[tuple[Ticket, errors.OperationError]] = []
        for ticket in run.lane.give_up(session.session_id):
            error = errors.OperationError(
                f"seq {ticket.submission.seq} waited for seq {missing}, which never came.",
                hint="Submit the operations again, counting on from the last seq.",
            )
            ended.append((ticket, error))
        if ended:
            await self.executor.settle(*ended)
            self.executor.enqueue(ended[0][0], run)

    async def close(self, session_id: str) -> None:
        """Ends a session; what its runs have accepted is carried out."""
        session = self.registry.sessions.pop(session_id, None)
        if session is None:
            return
        waiting = list(session.tickets.values())
        samples = [one for one in waiting if isinstance(one.submission.operation, protocol.Sample)]
        await self.executor.cancel(*samples)
        for run in list(self.registry.runs.values()):
            await self.give_up(run, session)
            run.lane.forget(session_id)
            run.last_seqs.pop(session_id, None)
        self.executor.release(session.unnamed_samplers)
        session.close()
        await self.store.close_session(session_id)

    async def close_silent(self) -> None:
        """Ends the sessions of clients that are not heard of any more."""
        for session in list(self.registry.sessions.values()):
            if session.silent_for(self.limits.session_timeout_s):
                await attempt_async(self.close, session.session_id)

    def _refusal(
        self, ticket: Ticket, run: Run | None, fitting: int | None, *, access: Access
    ) -> WeaverError | None:
        operation = ticket.submission.operation
        error = refusal(ticket.submission, run, access=access, limits=self.limits)
        if (
            error is None
            and run is not None
            and isinstance(operation, protocol.ForwardBackward)
            and operation.backward
        ):
            lengths = lengths_together(operation.datums, operation.loss_fn)
            mine = self.registry.runs_of(run.project)
            unsaved = ticket.size_bytes + sum(one.unsaved_bytes for one in mine)
            error = attempt(partial(self.limits.check_trained, lengths, fitting=fitting))
            error = error or attempt(self.limits.check_journal, unsaved)
        return error


def refusal(
    submission: protocol.Submission, run: Run | None, *, access: Access, limits: Limits
) -> WeaverError | None:
    """Why the operation cannot be carried out, or None. `run` is the one that it names."""
    try:
        if submission.run_id is not None:
            access.check_run(submission.run_id)
        access.check_operation(submission.operation)
        _check_size(submission.operation, limits)
        _check(submission, run)
    except WeaverError as error:
        return error
    return None


def _check_size(operation: protocol.Operation | None, limits: Limits) -> None:
    """Raises TooLargeError."""
    match operation:
        case protocol.CreateModel(user_metadata=metadata):
            limits.check_metadata(metadata)
        case protocol.ForwardBackward(datums=datums):
            limits.check_tokens(sum(map(_tokens_trained, datums)))
        case protocol.Sample():
            limits.check_tokens(_tokens_sampled(operation))


def _tokens_trained(datum: Datum) -> int:
    """Each target counts as one."""
    targets = datum.loss_fn_inputs.get("target_tokens")
    several = 0 if targets is None else targets.to_numpy().size
    return max(datum.model_input.length, several)


def _tokens_sampled(operation: protocol.Sample) -> int:
    """Each token of which a log-probability is told, beside the one at its place, counts as one."""
    prompt, targets = operation.prompt, operation.prompt_targets
    read = prompt.length if isinstance(prompt, ModelInput) else 0
    drawn = operation.num_samples * operation.params.max_tokens
    asked = 0 if targets is None else targets.to_numpy().size
    return read * (1 + operation.prompt_top_logprobs) + asked + drawn * (1 + operation.top_logprobs)


def _check(submission: protocol.Submission, run: Run | None) -> None:
    operation = submission.operation
    ordered = operation is None or isinstance(operation, ORDERED)
    placed = submission.run_id is not None, submission.seq is not None
    if placed != (ordered, ordered):
        raise errors.InvalidRequestError(
            f"{operation.kind if operation else 'a withdrawn operation'} "
            f"{'needs run_id and seq' if ordered else 'takes neither run_id nor seq'}.",
            field="submission",
            hint="Operations of a run are counted from 1 in each session.",
        )
    if ordered and run is None:
        raise no_run(submission.run_id)
    match operation:
        case protocol.ForwardBackward() if run is not None:
            check_datums(
                operation.datums,
                operation.loss_fn,
                config=operation.loss_fn_config,
                model=run.model,
                head=run.head,
            )
        case protocol.CreateModel(name=str(name)):
            check_run_name(name)
        case protocol.SaveCheckpoint(name=str(name)):
            check_name(name)
        case protocol.LoadCheckpoint(path=path) if path.startswith(SCHEME):
            Location.parse(path)
        case protocol.OpenSampler(base_model=None, model_path=None):
            raise errors.InvalidRequestError(
                "needs base_model or model_path.", field="open_sampler", hint="Give one of them."
            )
        case protocol.OpenSampler(model_path=str(path)) if path.startswith(SCHEME):
            Location.parse(path)


async def _weigh(submissions: Sequence[protocol.Submission]) -> list[tuple[bytes, int]]:
    """Fingerprint and size of each; of many or large ones beside the event loop."""

    def weigh() -> list[tuple[bytes, int]]:
        return [(fingerprint(one), wire.about_bytes(one)) for one in submissions]

    parts = sum(
        len(s.operation.datums) if isinstance(s.operation, protocol.ForwardBackward) else 1
        for s in submissions
    )
    size = wire.about_bytes(submissions) if parts <= 64 else wire.LARGE_BYTES + 1
    return await wire.beside(size, weigh)


def _forget_sampler(session: Session, sampler_id: str) -> WeaverError | None:
    if sampler_id in session.unnamed_samplers:
        session.unnamed_samplers.remove(sampler_id)
        return None
    return errors.NotFoundError(
        f"{sampler_id[:200]} is no sampler that this session made without a name.",
        field="sampler_id",
        hint="Others are not released: delete their checkpoint, or let it expire.",
    )
