"""`Desk`: one caller's operations in the Weaver REST interface, over one native session.

The routes submit here and wait here; the session tells of outcomes. It outlives the process, and
with it every operation that was accepted: the journal keeps its outcome, and a note from which the
answer is made.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from weaver.errors import NotFoundError, ServiceConnectionError
from weaver.protocol import Submission
from weaver.server.compat.weaver_rest_answers import Note, envelope
from weaver.wire import beside

if TYPE_CHECKING:
    from fastapi import Response

    from weaver.protocol import Operation, Outcome, Result
    from weaver.server.http.front import Front
    from weaver.server.scoped import ScopedService

HOLD_S = 1.0
"""How long a submission is held for an outcome: below it, a client never polls."""
POLL_S = 25.0
KEPT_S = 600.0
"""How long an outcome stays readable. Clients resend a request for three minutes at most."""


@dataclass(slots=True, eq=False)
class Entry:
    """One operation on its way to its outcome."""

    id: str
    note: Note
    outcome: Outcome | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    ended_at: float = 0.0


class Desk:
    """`front` says when the server stops: waits then end with what there is."""

    def __init__(self, service: ScopedService, front: Front) -> None:
        self.service = service
        self.merged: set[str] = set()
        """Paths of adapters that were exported as whole models, for the list of artifacts."""
        self.turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        """Of each run: held from before a request is read until it is submitted, so that requests
        keep the order in which they began to arrive, however long their bodies are."""
        self._front = front
        self._session_id: str | None = None
        self._opening = anyio.Lock()
        self._submitting = anyio.Lock()
        self._seqs: defaultdict[str, int] = defaultdict(int)
        self._entries: dict[str, Entry] = {}
        self._by_key: dict[str | None, Entry] = {}
        self._done: deque[Entry] = deque()
        """Of `_entries`, those with an outcome, in the order of their cursors."""
        self._paused: set[str] = set()

    async def submit(
        self, request: Request, operation: Operation, note: Note, *, run_id: str | None = None
    ) -> Entry:
        """Hands the operation to the service; a resend gets the entry of the first request.

        Args:
            request: what asks for it.
            run_id: the run whose turn the caller holds.
        """
        note = note.model_copy(update={"key": await resend_key(request)})
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

    async def carry_out(self, request: Request, operation: Operation) -> Result:
        """The result of an operation that its route answers for itself.

        Raises:
            WeaverError: why it failed.
            ServiceConnectionError: it goes on; a resend of the request waits for it again.
        """
        entry = await self.submit(request, operation, Note())
        await self.wait(entry, POLL_S)
        if entry.outcome is not None and entry.outcome.error is not None:
            raise entry.outcome.error.to_error()
        if entry.outcome is None or entry.outcome.result is None:
            raise ServiceConnectionError("it takes longer than usual.", hint="Ask again.")
        return entry.outcome.result

    async def wait(self, entry: Entry, timeout_s: float) -> None:
        """Until the entry has an outcome, at most `timeout_s`."""
        with self._front.until_it_stops(), anyio.move_on_after(timeout_s):
            await entry.ended.wait()

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


async def desk_of(request: Request) -> Desk:
    """The caller's desk; async, so that no thread comes between two requests of one client."""
    front, caller = request.state.front, request.state.caller
    if caller not in front.desks:
        front.desks[caller] = Desk(request.state.service, front)
    desk: Desk = front.desks[caller]
    return desk


Desked = Annotated[Desk, Depends(desk_of)]


async def resend_key(request: Request) -> str | None:
    """What all attempts of one call share, and no other call has.

    The client sends one `traceparent` with all attempts of a call. Without it only a body that has
    a seq_id can be told from an equal one.
    """
    trace, body = request.headers.get("traceparent", ""), await request.body()
    if not trace and b'"seq_id"' not in body:
        return None
    digest = hashlib.blake2b(f"{trace}\n{request.url.path}\n".encode(), digest_size=16)
    await beside(len(body), partial(digest.update, body))
    return digest.hexdigest()


async def answered(desk: Desk, entry: Entry, *, hold_s: float = HOLD_S) -> Response:
    """The operation's envelope, with its outcome if that comes within `hold_s`."""
    await desk.wait(entry, hold_s)

    def told() -> Response:
        return JsonResponse(envelope(entry.id, entry.outcome, entry.note))

    return await to_thread.run_sync(told)


class JsonResponse(JSONResponse):
    """Writes what JSON has no word for as null."""

    def render(self, content: object) -> bytes:
        return to_json(content)
