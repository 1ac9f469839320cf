"""`Intake`: the way of submissions from a session into the lanes, and the end of sessions.

Called by `LocalService`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope, CapacityLimiter, to_thread

from weaver import wire
from weaver.boundary import attempt, attempt_async
from weaver.errors import (
    ConflictError,
    NotFoundError,
    OperationCancelledError,
    OperationError,
    WeaverError,
)
from weaver.protocol import ForwardBackward, ReleaseSampler, Sample
from weaver.server.records import fingerprint
from weaver.server.registry import Reach
from weaver.server.validation import check_size, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from weaver.protocol import Submission
    from weaver.server.executor import Executor
    from weaver.server.journal import Journal
    from weaver.server.limits import Limits
    from weaver.server.registry import Known
    from weaver.server.runs import Run
    from weaver.server.sessions import Session, Ticket


@dataclass(frozen=True, slots=True)
class Intake:
    executor: Executor
    store: Journal
    known: Known
    limits: Limits
    gap_timeout_s: float
    now: Callable[[], datetime]
    encode: Callable[[Sample], Sample]
    """Makes tokens of a prompt that is text."""
    encoding: defaultdict[str, CapacityLimiter] = field(
        default_factory=lambda: defaultdict(lambda: CapacityLimiter(1))
    )
    """Of each project: one text at a time."""

    async def take(self, session: Session, submissions: Sequence[Submission]) -> None:
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
                    mine = self._of_project(session)
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
        reach = Reach(session.caller, self.known)
        run_id = submission.run_id or ""
        run = self.known.runs.get(run_id) if reach.has_run(run_id) else None
        check = partial(self._refusal, ticket, run, reach=reach)
        error = ticket.error or await wire.beside(ticket.size_bytes, check)
        operation = submission.operation
        if error is None and isinstance(operation, Sample) and not operation.encoded:
            error = await self._encode(ticket, operation)
        if ticket.settled and run is None:  # it was cancelled meanwhile
            return
        if submission.operation is None and error is None:
            error = OperationCancelledError("it was withdrawn before it was sent.")
        if isinstance(submission.operation, ReleaseSampler) and error is None:
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
            error = error or ConflictError(
                f"seq {submission.seq} of run {run.run_id} came after its place was given up.",
                hint="Submit it again with the next seq.",
            )
        if error is not None:
            await self.executor.settle((ticket, error))

    async def _encode(self, ticket: Ticket, operation: Sample) -> WeaverError | None:
        """Beside the engine; answers why it cannot be encoded, or is too large then."""
        encoded = await to_thread.run_sync(
            partial(attempt, partial(self.encode, operation)),
            limiter=self.encoding[ticket.session.caller.project],
        )
        if isinstance(encoded, WeaverError):
            return encoded
        ticket.submission = ticket.submission.model_copy(update={"operation": encoded})
        return attempt(partial(check_size, encoded, self.limits))

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
        ended: list[tuple[Ticket, OperationError]] = []
        for ticket in run.lane.give_up(session.session_id):
            error = OperationError(
                f"seq {ticket.submission.seq} waited for seq {missing}, which never came.",
                hint="Submit the operations again, counting on from the last seq.",
            )
            ended.append((ticket, error))
        if ended:
            await self.executor.settle(*ended)
            self.executor.enqueue(ended[0][0], run)

    async def close(self, session_id: str) -> None:
        """Ends a session; what its runs have accepted is carried out."""
        session = self.known.sessions.pop(session_id, None)
        if session is None:
            return
        waiting = list(session.tickets.values())
        samples = [one for one in waiting if isinstance(one.submission.operation, Sample)]
        await self.executor.cancel(*samples)
        for run in list(self.known.runs.values()):
            await self.give_up(run, session)
            run.lane.forget(session_id)
            run.last_seqs.pop(session_id, None)
        self.executor.release(session.unnamed_samplers)
        session.close()
        await self.store.close_session(session_id)

    async def close_silent(self) -> None:
        """Ends the sessions of clients that are not heard of any more."""
        for session in list(self.known.sessions.values()):
            if session.silent_for(self.limits.session_timeout_s):
                await attempt_async(partial(self.close, session.session_id))

    def _of_project(self, session: Session) -> list[Session]:
        project = session.caller.project
        return [s for s in self.known.sessions.values() if s.caller.project == project]

    def _refusal(self, ticket: Ticket, run: Run | None, *, reach: Reach) -> WeaverError | None:
        operation = ticket.submission.operation
        if run is not None and isinstance(operation, ForwardBackward) and operation.backward:
            mine = [one for one in list(self.known.runs.values()) if one.project == run.project]
            unsaved = ticket.size_bytes + sum(one.unsaved_bytes for one in mine)
            error = attempt(partial(self.limits.check_journal, unsaved))
            if error is not None:
                return error
        return refusal(ticket.submission, run, reach=reach, limits=self.limits)


async def _weigh(submissions: Sequence[Submission]) -> list[tuple[bytes, int]]:
    """Fingerprint and size of each; of many or large ones beside the event loop."""

    def weigh() -> list[tuple[bytes, int]]:
        return [(fingerprint(one), wire.about_bytes(one)) for one in submissions]

    parts = sum(
        len(s.operation.datums) if isinstance(s.operation, ForwardBackward) else 1
        for s in submissions
    )
    size = wire.about_bytes(submissions) if parts <= 64 else wire.LARGE_BYTES + 1
    return await wire.beside(size, weigh)


def _forget_sampler(session: Session, sampler_id: str) -> WeaverError | None:
    if sampler_id in session.unnamed_samplers:
        session.unnamed_samplers.remove(sampler_id)
        return None
    return NotFoundError(
        f"{sampler_id[:200]} is no sampler that this session made without a name.",
        field="sampler_id",
        hint="Others are not released: delete their checkpoint, or let it expire.",
    )
