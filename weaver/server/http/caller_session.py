"""`CallerSession`: a caller's operations over one native session, whichever adapter asks for them.

For wire formats whose requests come one by one, without a session, ids and an order of their own.
Their routes submit here and wait here; the session tells of outcomes. It outlives the process, and
with it every operation that was accepted: the journal keeps its outcome, and a note from which the
answer is made.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import anyio
from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict

from weaver.errors import NotFoundError, ServiceConnectionError
from weaver.protocol import LONGEST_POLL_S, Operation, Outcome, Result, Submission
from weaver.server.http.gateway import Gateway, GatewayDep
from weaver.server.keys import Caller

if TYPE_CHECKING:
    from weaver.server.streams import SampleStream
    from weaver.server.view import View

KEPT_S = 600.0
"""How long an outcome stays readable. Clients resend a request for three minutes at most."""


class Note(BaseModel):
    """What is kept beside an operation; an adapter adds to it what its answer needs."""

    model_config = ConfigDict(frozen=True, extra="allow")

    key: str | None = None
    """What a resend of the same request has in common with it, and no other request of its caller,
    by whichever adapter."""
    sampler_id: str | None = None
    """Whose samples are held back together."""


@dataclass(slots=True, eq=False)
class Entry:
    """One operation on its way to its outcome."""

    id: str
    note: Note
    """What an adapter adds to it is among its extra fields."""
    outcome: Outcome | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    ended_at: float = 0.0


class CallerSession:
    """`gateway` says when the server stops: waits then end with what there is."""

    def __init__(self, service: View, gateway: Gateway) -> None:
        self.service = service
        self.turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        """By run: held from before a request is read until it is submitted, so that requests
        keep the order in which they began to arrive, however long their bodies are."""
        self._gateway = gateway
        self._session_id: str | None = None
        self._opening = anyio.Lock()
        self._submitting = anyio.Lock()
        self._seqs: defaultdict[str, int] = defaultdict(int)
        self._entries: dict[str, Entry] = {}
        self._by_key: dict[str | None, Entry] = {}
        self._done: deque[Entry] = deque()
        """Those of `_entries` that have an outcome, in the order of their cursors."""
        self._paused: set[str] = set()

    async def submit(self, operation: Operation, note: Note, *, run_id: str | None = None) -> Entry:
        """Hands the operation to the service; a resend gets the entry of the first request.

        Args:
            note: its key tells a resend from another request.
            run_id: the run whose turn the caller holds.
        """
        async with self._submitting:  # a resend waits for what becomes of the first
            await self._forget_old()
            session_id = await self._session()
            if note.key in self._by_key:
                return self._by_key[note.key]
            submission = Submission(
                id=uuid.uuid4().hex,
                operation=operation,
                run_id=run_id,
                seq=self._seqs[run_id] + 1 if run_id else None,
                note=note.model_dump_json(exclude_defaults=True),
            )
            with anyio.CancelScope(shield=True):  # a place that was taken must be counted
                await self.service.submit(session_id, [submission])
                if run_id:
                    self._seqs[run_id] += 1
            return self._entry(submission.id, submission.note)

    async def carry_out(self, operation: Operation, note: Note) -> Result:
        """The result of an operation that its route answers for itself.

        Raises:
            WeaverError: why it failed.
            ServiceConnectionError: it goes on; a resend of the request waits for it again.
        """
        entry = await self.submit(operation, note)
        await self.wait(entry, LONGEST_POLL_S)
        if entry.outcome is not None and entry.outcome.error is not None:
            raise entry.outcome.error.to_error()
        if entry.outcome is None or entry.outcome.result is None:
            raise ServiceConnectionError("it takes longer than usual.", hint="Ask again.")
        return entry.outcome.result

    async def wait(self, entry: Entry, timeout_s: float) -> None:
        """Until the entry has an outcome, at most `timeout_s`."""
        await self._gateway.wait(entry.ended, timeout_s)

    def stream(self, entry: Entry) -> SampleStream:
        """Of a sample that was submitted with `stream=True`."""
        assert self._session_id is not None
        return self.service.sample_stream(self._session_id, entry.id)

    async def cancel(self, entry: Entry) -> None:
        """Asks: a sample that runs ends as `cancelled`."""
        if self._session_id is not None:
            await self.service.cancel(self._session_id, [entry.id])

    def find(self, operation_id: str) -> Entry:
        """Raises NotFoundError."""
        self._take_up()
        if operation_id not in self._entries:
            raise NotFoundError(
                f"no operation is called {operation_id[:80]!r}.",
                field="operation_id",
                hint=f"Its outcome was kept for {KEPT_S:.0f} s.",
            )
        return self._entries[operation_id]

    def last_seqs(self) -> defaultdict[str, int]:
        """How many operations of each run were accepted here."""
        self._take_up()
        return self._seqs

    # --- pausing --------------------------------------------------------------------------------

    async def pause(self, sampler_id: str, *, abort: bool) -> None:
        """Holds back the sampler's operations from now on; with `abort` ends those that run."""
        session_id = await self._session()
        self._paused.add(sampler_id)
        await self.service.hold_samples(session_id, sampler_id, hold=True)
        running = [
            entry.id
            for entry in self._entries.values()
            if entry.outcome is None and entry.note.sampler_id == sampler_id
        ]
        if abort:
            await self.service.cancel(session_id, running)

    async def go_on(self, sampler_id: str) -> None:
        self._paused.discard(sampler_id)
        await self.service.hold_samples(await self._session(), sampler_id, hold=False)

    # --- the native session ---------------------------------------------------------------------

    async def _session(self) -> str:
        async with self._opening:
            if self._take_up() is None:
                await self.service.open_session(lasting=True)
            session_id = self._take_up()
        assert session_id is not None
        return session_id

    def _take_up(self) -> str | None:
        """Follows the caller's session, which an earlier process may have opened."""
        session_id = self.service.lasting_session()
        if session_id != self._session_id:
            self._session_id = session_id
            for kept in (self._entries, self._by_key, self._done, self._seqs):
                kept.clear()
            if session_id is not None:
                pending, seqs = self.service.follow(session_id, self._end)
                self._seqs.update(seqs)
                for submission in pending:
                    self._entry(submission.id, submission.note)
        return session_id

    def _entry(self, operation_id: str, note: str | None) -> Entry:
        if operation_id not in self._entries:
            entry = Entry(operation_id, Note.model_validate_json(note or "{}"))
            self._entries[entry.id] = entry
            if entry.note.key is not None:
                self._by_key[entry.note.key] = entry
        return self._entries[operation_id]

    def _end(self, outcome: Outcome) -> None:
        entry = self._entry(outcome.submission_id, outcome.note)
        entry.outcome, entry.ended_at = outcome, time.monotonic()
        entry.ended.set()
        self._done.append(entry)

    async def _forget_old(self) -> None:
        """Lets the service forget them too; with the last one the session ends."""
        session_id, deadline = self._take_up(), time.monotonic() - KEPT_S
        if session_id is None:
            return
        while self._done and self._done[0].ended_at <= deadline:
            oldest = self._done.popleft()
            assert oldest.outcome is not None
            self.service.forget(session_id, oldest.outcome.cursor)
            del self._entries[oldest.id]
            self._by_key.pop(oldest.note.key, None)
        if not self._entries and not self._paused:
            await self.service.close_session(session_id)


class CallerSessions(dict[Caller, CallerSession]):
    """Each caller's one session."""


async def session_of(request: Request, gateway: GatewayDep) -> CallerSession:
    """Async, so that no thread comes between two requests of one client."""
    sessions, caller = gateway.own(CallerSessions), request.state.caller
    if caller not in sessions:
        sessions[caller] = CallerSession(request.state.service, gateway)
    return sessions[caller]


CallerDep = Annotated[CallerSession, Depends(session_of)]
