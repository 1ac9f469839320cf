"""`Session`: one client's conversation with a `Service`; orders, sends and collects operations.

An operation gets its place (`seq`) when a verb is called. One task sends whatever is queued in one
request, another collects outcomes and settles handles. Opened by `AsyncServiceClient`.
"""

from __future__ import annotations

import itertools
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import anyio
import anyio.abc

from weaver import errors, protocol, types, wire
from weaver.client.handle import OperationHandle, Origin
from weaver.tokenizers import PreTrainedTokenizer, TokenizerCache

R = TypeVar("R", bound=types.Value)
T = TypeVar("T")

POLL_S = 30.0
"""How long the service may hold one `collect` open."""
HEARTBEAT_S = 60.0
"""How often a session that waits for nothing is heard of; servers close silent ones."""
CLOSE_S = 5.0
"""The most time that saying goodbye to the service may take."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[R, T]):
    """What an operation is answered with: the protocol's class, and the user's value in it."""

    kind: type[R]
    read: Callable[[R], T]


RELEASED = Answer(protocol.SamplerReleased, lambda result: None)


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """An operation's place in the order, which may be taken before its content is known."""

    id: str
    run_id: str | None
    seq: int | None
    answer: Answer[Any, T]
    adds_gradient: bool
    operation: protocol.Operation | None = None
    open: bool = True
    """Neither filled nor given up: what comes behind it waits here, not at the service."""
    handle: OperationHandle[T] = field(init=False)

    def submission(self) -> protocol.Submission:
        """A tombstone where the operation was given up."""
        return protocol.Submission(
            id=self.id,
            operation=self.operation,
            run_id=self.run_id,
            seq=self.seq,
            lost_gradient=self.operation is None and self.adds_gradient,
        )


class Session:
    """Use `open_session`. All methods are called from the event loop that opened it."""

    _tasks: anyio.abc.TaskGroup

    def __init__(
        self, service: protocol.Service, info: protocol.SessionInfo, *, tokenizers: TokenizerCache
    ) -> None:
        self.id = info.session_id
        self.deterministic = info.deterministic
        self.origin = Origin()
        self._tokenizers = tokenizers
        self._service = service
        self._prefix = uuid.uuid4().hex
        self._ids = itertools.count(1)
        self._seqs: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))
        self._outbox: list[Ticket[Any]] = []
        self._cancels: list[str] = []
        self._unneeded: deque[str] = deque()
        self._sent: dict[str, Ticket[Any]] = {}
        self._open: set[OperationHandle[Any]] = set()
        self._sending = anyio.Lock()
        self._to_send = anyio.Event()
        self._to_collect = anyio.Event()
        self._ended: errors.WeaverError | None = None

    # --- what the clients call ---

    async def get_tokenizer(self, base_model: str) -> PreTrainedTokenizer:
        """Loaded once; also from a session that has ended, if it was loaded before."""
        self.origin.check()
        return await self._tokenizers.get(base_model)

    @property
    def service(self) -> protocol.Service:
        """For what has no place in an order; raises the error that ended the session, if any."""
        self.check_open()
        return self._service

    def submit(
        self, operation: protocol.Operation, reply: Answer[Any, T], *, run_id: str | None = None
    ) -> OperationHandle[T]:
        """Queues an operation; with `run_id` it takes the run's next place.

        Raises:
            ClosedError, ServiceConnectionError: the session has ended.
        """
        gradient = isinstance(operation, protocol.ForwardBackward) and operation.backward
        ticket = self.reserve(operation.kind, reply, run_id=run_id, adds_gradient=gradient)
        self.fill(ticket, operation)
        return ticket.handle

    def reserve(
        self, label: str, reply: Answer[Any, T], *, run_id: str | None, adds_gradient: bool
    ) -> Ticket[T]:
        """Takes a run's next place for an operation that `fill` will name later.

        Cancelling the ticket's handle gives the place up; where it was to add to the gradient, the
        next step is refused.
        """
        self.check_open()
        seq = None if run_id is None else next(self._seqs[run_id])
        ticket = Ticket(self._new_id(), run_id, seq, reply, adds_gradient)
        where = f" (seq {seq} of {run_id})" if run_id else ""
        ticket.handle = OperationHandle(
            label + where, origin=self.origin, cancel=lambda: self._cancel(ticket)
        )
        self._open.add(ticket.handle)
        self._outbox.append(ticket)
        return ticket

    def fill(self, ticket: Ticket[T], operation: protocol.Operation) -> None:
        """Queues a reserved operation; does nothing if the ticket was cancelled meanwhile."""
        if not ticket.handle.done():
            ticket.operation, ticket.open = operation, False
            self._to_send.set()

    def compose(
        self, label: str, parts: list[OperationHandle[Any]], finish: Callable[[], Awaitable[T]]
    ) -> OperationHandle[T]:
        """One handle for several operations: `finish` runs in the background and gives its result.

        Cancelling it cancels the `parts`, to which `finish` may add; when it fails, the parts that
        are left are cancelled too.
        """
        self.check_open()
        handle: OperationHandle[T] = OperationHandle(
            label, origin=self.origin, cancel=lambda: any([part.cancel() for part in parts])
        )
        self._open.add(handle)
        self._tasks.start_soon(self._finish, handle, parts, finish)
        return handle

    def release_later(self, sampler_id: str) -> None:
        """Lets go of a sampler with the next request; may be called from any thread."""
        self._unneeded.append(sampler_id)

    async def stream(
        self, operation: protocol.Operation, *, of: object
    ) -> AsyncIterator[types.SampleDelta]:
        """Submits a sample and yields its pieces; leaving early cancels it. Keeps `of` alive."""
        submission = protocol.Submission(id=self._new_id(), operation=operation)
        await self.service.submit(self.id, [submission])
        deltas = cast(
            "AsyncGenerator[types.SampleDelta, None]", self._service.stream(self.id, submission.id)
        )
        finished = False
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    yield delta
            finished = True
        finally:
            if not finished and self._ended is None:
                self._cancels.append(submission.id)
                self._to_send.set()

    def check_open(self) -> None:
        """
        Raises:
            UnsupportedError: called in a fork, or from another event loop.
            WeaverError: what ended the session, if anything did.
        """
        self.origin.check()
        if self._ended is not None:
            raise self._ended

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """The session's background work, until `close`."""
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._guard, self._send_queued)
            self._tasks.start_soon(self._guard, self._collect_outcomes)
            task_status.started()

    async def close(self) -> None:
        """Sends what is queued, says goodbye and fails whatever is unfinished as closed."""
        self.origin.check()
        if self._ended is None:
            self._end(errors.ClosedError("the client was closed.", hint="Open a new one."))
            with anyio.move_on_after(CLOSE_S, shield=True):
                await self._guard(self._say_goodbye)
        self._tasks.cancel_scope.cancel()

    # --- the two tasks, and what they share ---

    async def _send_queued(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send = anyio.Event()
            await self._flush()

    async def _collect_outcomes(self) -> None:
        cursor = 0
        while True:
            if not self._sent:
                with anyio.move_on_after(HEARTBEAT_S) as waiting:
                    await self._to_collect.wait()
                    self._to_collect = anyio.Event()
                if not waiting.cancelled_caught:
                    continue
                self._to_send.set()  # what is unneeded
            try:
                wait_s = POLL_S if self._sent else 0.0
                outcomes = await self._service.collect(self.id, after=cursor, timeout_s=wait_s)
            except errors.ServiceConnectionError:
                if self._sent:
                    raise
                continue  # nothing is lost by a heartbeat
            for outcome in outcomes:
                cursor = outcome.cursor
                if ticket := self._sent.pop(outcome.submission_id, None):
                    self._settle(ticket, outcome)

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Runs a task whose failure ends the session by name, so that no handle hangs."""
        try:
            await task()
        except errors.WeaverError as error:
            self._end(error)
        except Exception as defect:  # a service may be anybody's: it ends nobody's program
            end = errors.ServiceConnectionError(
                f"the service failed with {type(defect).__name__}: {defect}",
                hint="Open a new client.",
            )
            end.__cause__ = defect
            self._end(end)

    async def _say_goodbye(self) -> None:
        await self._flush()
        await self._service.close_session(self.id)

    async def _submit(self, batch: list[Ticket[Any]]) -> None:
        """Sends a request. Where it is refused, what is at fault in it fails alone.

        The place of what failed in a run's order is taken by a tombstone.
        """
        try:
            await self._service.submit(self.id, [ticket.submission() for ticket in batch])
        except errors.InvalidRequestError as error:
            if len(batch) > 1:
                await self._submit(batch[: len(batch) // 2])
                await self._submit(batch[len(batch) // 2 :])
            elif batch[0].operation is None:
                raise
            else:
                self._give_up(batch[0], error)
                if batch[0].seq is not None:
                    await self._submit(batch)
        except errors.StorageError as error:  # it has no room for tombstones either, for now
            for ticket in batch:
                self._give_up(ticket, error)
            self._outbox[:0] = batch

    async def _flush(self) -> None:
        async with self._sending:
            while self._unneeded and self._ended is None:
                self.submit(protocol.ReleaseSampler(sampler_id=self._unneeded.popleft()), RELEASED)
            batch, self._outbox = _sendable(self._outbox)
            for ticket in batch:
                if not ticket.handle.done():
                    ticket.handle.mark_sent()
                    self._sent[ticket.id] = ticket
            if batch:
                self._to_collect.set()
            for part in wire.portions(batch, lambda ticket: wire.about_bytes(ticket.operation)):
                await self._submit(part)
            if self._cancels:
                cancels, self._cancels = self._cancels, []
                await self._service.cancel(self.id, cancels)

    async def _finish(
        self,
        handle: OperationHandle[T],
        parts: Sequence[OperationHandle[Any]],
        finish: Callable[[], Awaitable[T]],
    ) -> None:
        handle.mark_sent()
        try:
            handle.settle(await finish())
        except Exception as error:  # the user's own function may raise anything
            handle.fail(error)
            for part in parts:
                part.cancel()
        self._open.discard(handle)

    def _cancel(self, ticket: Ticket[Any]) -> bool:
        if ticket.id in self._sent:
            self._cancels.append(ticket.id)
        else:
            ticket.open = False
            self._give_up(
                ticket, errors.OperationCancelledError(f"{ticket.handle.label} was cancelled.")
            )
        self._to_send.set()
        return True

    def _give_up(self, ticket: Ticket[Any], error: errors.WeaverError) -> None:
        """Fails it. Its place in a run's order becomes a tombstone; what has none is not sent."""
        ticket.operation = None
        self._sent.pop(ticket.id, None)
        ticket.handle.fail(error)
        self._open.discard(ticket.handle)

    def _settle(self, ticket: Ticket[Any], outcome: protocol.Outcome) -> None:
        handle = ticket.handle
        if outcome.error is not None:
            handle.fail(outcome.error.to_error())
        elif isinstance(outcome.result, ticket.answer.kind):
            handle.settle(ticket.answer.read(outcome.result))
        else:
            handle.fail(
                errors.ServiceConnectionError(
                    f"{handle.label} was answered with {type(outcome.result).__name__}.",
                    hint="Client and service have different versions.",
                )
            )
        self._open.discard(handle)

    def _end(self, error: errors.WeaverError) -> None:
        self._ended = self._ended or error
        for handle in self._open:
            handle.fail(error)
        self._open.clear()

    def _new_id(self) -> str:
        return f"{self._prefix}-{next(self._ids)}"


@asynccontextmanager
async def open_session(
    service: protocol.Service, home: Path, *, user_metadata: types.JsonDict | None = None
) -> AsyncIterator[Session]:
    """A session with a service, closed on leaving; tokenizers are kept below `home`."""
    info = await service.open_session(user_metadata=user_metadata)
    session = Session(service, info, tokenizers=TokenizerCache(service, home / "tokenizers"))
    async with anyio.create_task_group() as tasks:
        await tasks.start(session.run)
        try:
            yield session
        finally:
            await session.close()


def _sendable(outbox: list[Ticket[Any]]) -> tuple[list[Ticket[Any]], list[Ticket[Any]]]:
    """What can be sent, and what stays: each run's operations from its first open ticket on."""
    blocked: set[str | None] = set()
    batch: list[Ticket[Any]] = []
    stay: list[Ticket[Any]] = []
    for ticket in outbox:
        if ticket.open:
            blocked.add(ticket.run_id)
        if ticket.run_id in blocked:
            stay.append(ticket)
        elif ticket.operation is not None or ticket.seq is not None:
            batch.append(ticket)
    return batch, stay
