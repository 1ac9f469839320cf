"""A client's session: what it has submitted, and the outcomes it has not yet acknowledged.

Called by `LocalService` and its executor, always on the event loop. Exactly once lives here: each
submission's id and place are remembered with a fingerprint of its body.
"""

from __future__ import annotations

import time
from collections import deque
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

import anyio

from weaver.errors import ClosedError, ConflictError, NotFoundError, WeaverError
from weaver.protocol import ErrorInfo, ForwardBackward, Outcome, Sample, SessionState
from weaver.server.keys import OWNER, Caller
from weaver.server.records import token_of
from weaver.server.streams import SampleStream
from weaver.wire import about_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver.protocol import Operation, Result, Submission
    from weaver.server.records import Entry, Passed, SessionRecord
    from weaver.types import JsonDict

MOST_LOST = 2**20
"""So many outcomes may be lost with a machine's power; a cursor above that is made up."""
RESEND_S = 600.0
"""So long an id outlives its acknowledgement, for requests that are still on their way."""
UNREAD_STREAMS = 64
"""So many streams stay readable after their samples ended and were acknowledged, the newest."""
Place = tuple[str, int]
"""A run and a seq."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One accepted submission on its way to its outcome."""

    session: Session
    submission: Submission
    size_bytes: int = 0
    """About, of the submission."""
    stream: SampleStream | None = None
    error: WeaverError | None = None
    """Why it was refused, cancelled or failed."""
    submitted_at: float = field(default_factory=lambda: time.time())
    """Seconds since 1970; after a restart, that of the restart."""
    queued_at: float = field(default_factory=lambda: time.monotonic())
    """The same moment by the clock that durations are taken from, as is the next."""
    began_at: float | None = None
    """When the engine took it up."""
    settled: bool = False
    number: int | None = None
    """Counts what its run has executed; set when it was."""
    behind_gap: bool = False
    """It failed because an earlier operation never came."""
    context: Context = field(default_factory=copy_context, repr=False)
    """The context of the request that brought it, for traces."""

    @property
    def job_id(self) -> str:
        """Its name in the engine, and for all time."""
        return f"{self.session.session_id}/{self.submission.id}"

    @property
    def token(self) -> str:
        """For names that come out the same if this is carried out again after a crash."""
        return token_of(self.session.session_id, self.submission.id)

    @property
    def running(self) -> bool:
        """Whether it has begun and goes on to its end; a sample can be dropped at any time."""
        return self.began_at is not None and not isinstance(self.submission.operation, Sample)

    def begin(self) -> None:
        self.began_at = time.monotonic()

    def replace(self, operation: Operation) -> None:
        """The same operation in another form."""
        self.submission = self.submission.model_copy(update={"operation": operation})

    def settle(self, value: Result | WeaverError) -> bool:
        """Notes how it ended; False if that was known already."""
        if self.settled:
            return False
        self.settled = True
        self.error = value if isinstance(value, WeaverError) else None
        return True

    def undo(self, failure: WeaverError) -> WeaverError:
        """Takes back that it was carried out, as that could not be journaled; answers why."""
        self.number, self.error = None, self.error or failure
        return self.error

    @property
    def waited_s(self) -> float:
        return (self.began_at or time.monotonic()) - self.queued_at

    @property
    def discards_gradient(self) -> bool:
        """Whether the batch that its run accumulates lacks a part without it."""
        operation = self.submission.operation
        missed = isinstance(operation, ForwardBackward) and operation.backward
        lost = missed or self.submission.lost_gradient or self.behind_gap
        return self.error is not None and lost


@dataclass(slots=True, eq=False)
class Session:
    session_id: str
    caller: Caller = OWNER
    """Whose rights its operations have."""
    lasting: bool = False
    """It does not end by itself, however long nothing is heard of it."""
    user_metadata: JsonDict = field(default_factory=dict)
    submitting: anyio.Lock = field(default_factory=anyio.Lock)
    """Held while a request is journaled, so that its resend is not acknowledged before it."""
    tickets: dict[str, Ticket] = field(default_factory=dict)
    """Those without an outcome, by submission id."""
    streams: dict[str, SampleStream] = field(default_factory=dict)
    unnamed_samplers: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """What a wire format's clients call things by, and what the service does."""
    closed: bool = False
    held_bytes: int = 0
    """About, of submissions without an outcome and of outcomes that are kept."""
    _follower: Callable[[Outcome], None] | None = None
    _heard_at: float = field(default_factory=lambda: time.monotonic())
    _polls: int = 0
    _prints: dict[str, tuple[bytes, Place | None]] = field(default_factory=dict)
    _places: dict[Place, str] = field(default_factory=dict)
    _passed: dict[str, int] = field(default_factory=dict)
    """By run, the last seq whose place is not in `_places` any more."""
    _acknowledged: deque[tuple[float, str]] = field(default_factory=deque)
    """The ids that will be forgotten, and since when no request should bring them."""
    _outcomes: deque[Outcome] = field(default_factory=deque)
    _sizes: dict[str, int] = field(default_factory=dict)
    """About the bytes of each of them, by its submission."""
    _cursor: int = 0
    _restored: int = 0
    """The last cursor that the journal knew when this process took the session up."""
    _lost: int = 0
    """The last cursor that the client knew and the journal did not, as power was lost."""
    _changed: anyio.Event = field(default_factory=anyio.Event)

    @classmethod
    def of(cls, record: SessionRecord) -> Session:
        return cls(
            record.session_id,
            record.caller,
            lasting=record.lasting,
            user_metadata=record.user_metadata,
            closed=record.closed,
        )

    @property
    def unfinished(self) -> int:
        """Operations whose outcome the client has not collected; a lasting one keeps them all."""
        return len(self.tickets) + (0 if self.lasting else len(self._outcomes))

    def heard(self) -> None:
        """Notes that the client lives."""
        self._heard_at = time.monotonic()

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing was heard of the client for so long."""
        return not (self.lasting or self._polls) and time.monotonic() > self._heard_at + seconds

    def unseen(
        self, submissions: Sequence[Submission], bodies: Sequence[bytes]
    ) -> list[Submission]:
        """Remembers those that are new and answers them; `bodies` are their fingerprints.

        Raises:
            ConflictError: an id or a place was used with another body; nothing is remembered.
        """
        prints: dict[str, tuple[bytes, Place | None]] = {}
        places: dict[Place, str] = {}
        fresh = []
        for submission, body in zip(submissions, bodies, strict=True):
            before = prints.get(submission.id) or self._prints.get(submission.id)
            if before is not None and before[0] != body:
                raise ConflictError(
                    f"submission {submission.id} ({submission.kind}) came with another body.",
                    field="submissions",
                    hint="Give each operation an id of its own.",
                )
            if before is not None:
                continue
            place = _place(submission)
            prints[submission.id] = body, place
            fresh.append(submission)
            if place is None:
                continue
            holder = places.get(place) or self._places.get(place)
            if holder is not None:
                raise ConflictError(
                    f"seq {place[1]} of run {place[0]} belongs to submission {holder}, "
                    f"not to {submission.id} ({submission.kind}).",
                    field="submissions",
                    hint="Count seq once per operation of a session and run.",
                )
            places[place] = submission.id
        self._prints |= prints
        self._places |= places
        return fresh

    def forget(self, submissions: Sequence[Submission]) -> None:
        """Undoes `unseen`, for a request that could not be journaled."""
        for submission in submissions:
            self._let_go(submission.id)

    def _let_go(self, submission_id: str) -> Place | None:
        _, place = self._prints.pop(submission_id)
        if place is not None:
            self._places.pop(place, None)
        return place

    def ticket(
        self, submission: Submission, size_bytes: int, *, error: WeaverError | None = None
    ) -> Ticket:
        ticket = Ticket(self, submission, size_bytes, error=error)
        self.held_bytes += size_bytes
        if isinstance(submission.operation, Sample) and submission.operation.stream:
            ticket.stream = self.streams[submission.id] = SampleStream()
        self.tickets[submission.id] = ticket
        return ticket

    def outcome(self, ticket: Ticket, value: Result | WeaverError) -> Outcome:
        """The next outcome of the session, to be journaled before it is shown."""
        self._cursor += 1
        error = value if isinstance(value, WeaverError) else None
        return Outcome(
            submission_id=ticket.submission.id,
            cursor=self._cursor,
            result=None if isinstance(value, WeaverError) else value,
            error=error and ErrorInfo.of(error),
            note=ticket.submission.note,
        )

    def withdraw(self, outcome: Outcome) -> None:
        """Gives its cursor to another outcome, as it could not be journaled."""
        self._cursor = min(self._cursor, outcome.cursor - 1)

    def show(self, ticket: Ticket, outcome: Outcome, *, size_bytes: int) -> None:
        """Makes it collectable; to be called in the order of `outcome`."""
        del self.tickets[ticket.submission.id]
        if outcome.cursor <= self._lost:
            self._cursor += 1
            outcome = outcome.model_copy(update={"cursor": self._cursor})
        self._keep(outcome, size_bytes=size_bytes)
        self.held_bytes -= ticket.size_bytes
        if self._follower is not None:
            self._follower(outcome)
        if ticket.stream is not None:
            ticket.stream.finish(outcome.error.to_error() if outcome.error else None)
        self._notify()

    def restore(self, entries: Sequence[Entry]) -> None:
        """Takes up what the journal remembers of this session."""
        for entry in entries:
            place = _place(entry)
            self._prints[entry.submission_id] = entry.fingerprint, place
            if place is not None:
                self._places[place] = entry.submission_id
            if entry.cursor and entry.outcome is None:
                self._acknowledged.append((time.monotonic(), entry.submission_id))
            self._cursor = max(self._cursor, entry.cursor)
            if isinstance(entry.outcome, WeaverError):
                error = ErrorInfo.of(entry.outcome)
                lost = Outcome(submission_id=entry.submission_id, cursor=entry.cursor, error=error)
                self._keep(lost, size_bytes=about_bytes(lost))
            elif entry.outcome is not None:
                self._keep(entry.outcome, size_bytes=about_bytes(entry.outcome))
        self._outcomes = deque(sorted(self._outcomes, key=lambda outcome: outcome.cursor))
        self._restored = self._cursor

    def pass_over(self, passed: Passed) -> None:
        """Takes up what the journal remembers of refused operations, but not one by one."""
        self._cursor = self._restored = max(self._cursor, passed.cursor)
        self._pass(passed.run_id, passed.last)

    def _pass(self, run_id: str, seq: int) -> None:
        self._passed[run_id] = max(seq, self._passed.get(run_id, 0))

    def acknowledge(self, after: int) -> list[str]:
        """Forgets the outcomes up to a cursor; answers whose they were."""
        if self._cursor < after < self._cursor + MOST_LOST:
            self._count_on_behind(after)
        forgotten = []
        while self._outcomes and self._outcomes[0].cursor <= after:
            outcome = self._outcomes.popleft()
            self.held_bytes -= self._sizes.pop(outcome.submission_id)
            forgotten.append(outcome.submission_id)
            self._acknowledged.append((time.monotonic(), outcome.submission_id))
            read = self.streams.get(forgotten[-1])
            if read is not None:
                read.acknowledged = True
        for submission_id in [id for id, stream in self.streams.items() if stream.finished_with]:
            del self.streams[submission_id]
        unread = [id for id, stream in self.streams.items() if stream.acknowledged]
        for submission_id in unread[:-UNREAD_STREAMS]:
            del self.streams[submission_id]
        while self._acknowledged and self._acknowledged[0][0] < time.monotonic() - RESEND_S:
            place = self._let_go(self._acknowledged.popleft()[1])
            if place is not None:
                self._pass(*place)
        return forgotten

    async def collect(self, *, after: int, timeout_s: float) -> list[Outcome]:
        """Outcomes above `after`; waits for one, at most `timeout_s`.

        Raises:
            ClosedError: the session was closed.
        """
        self._polls += 1
        try:
            with anyio.move_on_after(timeout_s):
                while not self.closed and not (
                    self._outcomes and self._outcomes[-1].cursor > after
                ):
                    await self._changed.wait()
        finally:
            self._polls -= 1
            self.heard()
        if self.closed:
            raise ClosedError("this session was closed.", hint="Open another one.")
        newest_first = takewhile(lambda outcome: outcome.cursor > after, reversed(self._outcomes))
        return list(newest_first)[::-1]

    def _count_on_behind(self, lost: int) -> None:
        """Gives what ended since the restart cursors that the client does not take for known."""
        known = [one for one in self._outcomes if one.cursor <= self._restored]
        fresh = list(self._outcomes)[len(known) :]
        self._lost, self._cursor = lost, lost + len(fresh)
        renumbered = [
            one.model_copy(update={"cursor": lost + i}) for i, one in enumerate(fresh, start=1)
        ]
        self._outcomes = deque([*known, *renumbered])

    def follow(
        self, follower: Callable[[Outcome], None]
    ) -> tuple[list[Submission], dict[str, int]]:
        """Tells `follower` of each outcome: now of those that are kept, then as they come.

        Answers what has no outcome yet; and of each run the last seq that was taken.
        """
        for outcome in self._outcomes:
            follower(outcome)
        self._follower = follower
        seqs = dict(self._passed)
        for run_id, seq in self._places:
            seqs[run_id] = max(seq, seqs.get(run_id, 0))
        return [ticket.submission for ticket in self.tickets.values()], seqs

    def stream(self, submission_id: str) -> SampleStream:
        if submission_id not in self.streams:
            raise NotFoundError(
                f"no streamed sample has the id {submission_id!r}.",
                field="submission_id",
                hint="Submit the sample with stream=True; a stream that was read is forgotten.",
            )
        return self.streams[submission_id]

    def describe(self) -> SessionState:
        return SessionState(
            session_id=self.session_id,
            project=self.caller.project,
            pending=len(self.tickets),
            unnamed_samplers=len(self.unnamed_samplers),
            user_metadata=self.user_metadata,
        )

    def close(self) -> None:
        """Ends every wait for this session."""
        self.closed = True
        error = ClosedError("this session was closed.")
        for stream in self.streams.values():
            stream.finish(error)
        self._notify()

    def _keep(self, outcome: Outcome, *, size_bytes: int) -> None:
        self._outcomes.append(outcome)
        self._sizes[outcome.submission_id] = size_bytes
        self.held_bytes += size_bytes

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _place(one: Submission | Entry) -> Place | None:
    return None if one.run_id is None or one.seq is None else (one.run_id, one.seq)
