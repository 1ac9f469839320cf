"""`Desk`: one caller's operations in the Weaver REST interface, over one native session.

The routes submit here and wait here. No task runs in the background: whoever waits collects the
outcomes of all. The session outlives the process, and with it every operation that was accepted:
the journal keeps its outcome, and a note from which the answer is made.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from weaver.errors import NotFoundError, WeaverError
from weaver.protocol import Submission
from weaver.server.compat.weaver_rest_answers import Note, envelope

if TYPE_CHECKING:
    from fastapi import Response

    from weaver.protocol import Operation, Outcome
    from weaver.server.scoped import ScopedService
    from weaver.types import JsonDict

HOLD_S = 1.0
"""How long a submission is held for an outcome: below it, a client never polls."""
POLL_S = 25.0
COLLECT_S = 2.0
"""How long one collection waits; a stopping server is noticed this late."""
KEPT_S = 600.0
"""How long an outcome stays readable. Clients resend a request for three minutes at most."""


@dataclass(slots=True, eq=False)
class Entry:
    """One operation on its way to its outcome."""

    id: str
    note: Note
    outcome: Outcome | None = None
    ended_at: float = 0.0
    waiting: set[anyio.CancelScope] = field(default_factory=set)

    def envelope(self) -> JsonDict:
        return envelope(self.id, self.outcome, self.note)


class Desk:
    """Args: stopping: once set, waits end with what there is."""

    def __init__(self, service: ScopedService, *, stopping: anyio.Event) -> None:
        self.service = service
        self.merged: set[str] = set()
        """Paths of adapters that were exported as whole models, for the list of artifacts."""
        self._stopping = stopping
        self._session_id = ""
        self._taken_up = False
        self._opening = anyio.Lock()
        self._collecting = anyio.Lock()
        self._cursor = 0
        self._forgotten = 0
        self._seqs: defaultdict[str, int] = defaultdict(int)
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._entries: dict[str, Entry] = {}
        self._by_key: dict[str, Entry] = {}
        self._done: deque[Entry] = deque()
        """Of `_entries`, those with an outcome, in the order of their cursors."""
        self._paused: set[str] = set()

    def turn(self, run_id: str) -> anyio.Lock:
        """Held from before a run's request is read until it is submitted.

        It keeps the order in which requests began to arrive, however long their bodies are.
        """
        return self._turns[run_id]

    async def submit(self, operation: Operation, note: Note, *, run_id: str | None = None) -> Entry:
        """Hands the operation to the service; a resend gets the entry of the first request.

        Args:
            run_id: the run whose `turn` the caller holds.
        """
        await self._take_up()
        await self._forget_old()
        if note.key in self._by_key:
            return self._by_key[note.key]
        entry = Entry(uuid.uuid4().hex, note)
        self._remember(entry)
        try:
            with anyio.CancelScope(shield=True):  # a place that was taken must be counted
                session_id = await self._session()
                submission = Submission(
                    id=entry.id,
                    operation=operation,
                    run_id=run_id,
                    seq=self._seqs[run_id] + 1 if run_id else None,
                    note=note.model_dump_json(exclude_defaults=True),
                )
                await self.service.submit(session_id, [submission])
                if run_id:
                    self._seqs[run_id] += 1
        except WeaverError:
            self._drop(entry)
            raise
        return entry

    async def wait(self, entry: Entry, timeout_s: float) -> Entry:
        """Until the entry is done, at most `timeout_s`."""
        if entry.outcome is not None:
            return entry
        with anyio.move_on_after(timeout_s) as scope:
            entry.waiting.add(scope)
            try:
                async with self._collecting:
                    while entry.outcome is None and not self._stopping.is_set():
                        await self._collect(timeout_s)
            finally:
                entry.waiting.discard(scope)
        return entry

    async def find(self, operation_id: str) -> Entry:
        """Raises NotFoundError."""
        await self._take_up()
        if operation_id not in self._entries:
            raise NotFoundError(
                f"no operation is called {operation_id[:80]!r}.",
                field="operation_id",
                hint=f"Its outcome was kept for {KEPT_S:.0f} s.",
            )
        return self._entries[operation_id]

    async def last_seqs(self) -> defaultdict[str, int]:
        """How many operations of each run were accepted here."""
        await self._take_up()
        return self._seqs

    # --- pausing --------------------------------------------------------------------------------

    async def pause(self, sampler_id: str, *, abort: bool) -> None:
        """Holds back the sampler's operations from now on; with `abort` ends those that run."""
        self._paused.add(sampler_id)
        await self.service.hold_samples(await self._session(), sampler_id, hold=True)
        running = [
            entry.id
            for entry in self._entries.values()
            if entry.outcome is None and entry.note.sampler_id == sampler_id
        ]
        if abort:
            await self.service.cancel(await self._session(), running)

    async def go_on(self, sampler_id: str) -> None:
        self._paused.discard(sampler_id)
        await self.service.hold_samples(await self._session(), sampler_id, hold=False)

    # --- the native session ---------------------------------------------------------------------

    async def _session(self) -> str:
        await self._take_up()
        async with self._opening:
            if not self._session_id:
                info = await self.service.open_session(lasting=True)
                self._session_id = info.session_id
        return self._session_id

    async def _take_up(self) -> None:
        """Goes on, once, with the session of an earlier process."""
        async with self._opening:
            if self._taken_up:
                return
            session_id = self.service.lasting_session()
            if session_id is not None:
                pending, seqs = await self.service.standing(session_id)
                self._session_id = session_id
                self._seqs.update(seqs)
                for submission in pending:
                    self._remember(Entry(submission.id, _read(submission.note)))
                await self._collect(0)
            self._taken_up = True

    async def _collect(self, timeout_s: float) -> None:
        outcomes = await self.service.collect(
            self._session_id,
            after=self._cursor,
            timeout_s=min(timeout_s, COLLECT_S),
            forget=self._forgotten,
        )
        for outcome in outcomes:
            self._cursor = max(self._cursor, outcome.cursor)
            if outcome.submission_id not in self._entries:  # of an earlier process
                self._remember(Entry(outcome.submission_id, _read(outcome.note)))
            entry = self._entries[outcome.submission_id]
            entry.outcome, entry.ended_at = outcome, time.monotonic()
            self._done.append(entry)
            for scope in entry.waiting:
                scope.cancel()

    def _remember(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        if entry.note.key is not None:
            self._by_key[entry.note.key] = entry

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.id]
        if entry.note.key is not None:
            del self._by_key[entry.note.key]

    async def _forget_old(self) -> None:
        """Lets the service forget them too; with the last one the session ends."""
        deadline = time.monotonic() - KEPT_S
        while self._done and self._done[0].ended_at <= deadline:
            oldest = self._done.popleft()
            assert oldest.outcome is not None
            self._forgotten = oldest.outcome.cursor
            self._drop(oldest)
        if self._session_id and not self._entries and not self._paused:
            ended, self._session_id = self._session_id, ""
            self._cursor = self._forgotten = 0
            self._seqs.clear()
            with suppress(NotFoundError):  # its project has closed it by hand
                await self.service.close_session(ended)


async def desk_of(request: Request) -> Desk:
    """The caller's desk; async, so that no thread comes between two requests of one client."""
    front, caller = request.state.front, request.state.caller
    if caller not in front.desks:
        front.desks[caller] = Desk(request.state.service, stopping=front.stopping)
    desk: Desk = front.desks[caller]
    return desk


Desked = Annotated[Desk, Depends(desk_of)]


def resend_key(request: Request, body: bytes, *, numbered: bool = False) -> str | None:
    """What all attempts of one call share, and no other call has.

    The client sends one `traceparent` with all attempts of a call. Without it only a body that is
    `numbered` (has a seq_id) can be told from an equal one.
    """
    trace = request.headers.get("traceparent", "")
    if not trace and not numbered:
        return None
    head = f"{trace}\n{request.url.path}\n".encode()
    return hashlib.blake2b(head + body, digest_size=16).hexdigest()


async def answered(desk: Desk, entry: Entry, *, hold_s: float = HOLD_S) -> Response:
    """The operation's envelope, with its outcome if that comes within `hold_s`."""
    await desk.wait(entry, hold_s)
    return JsonResponse(await to_thread.run_sync(entry.envelope))


class JsonResponse(JSONResponse):
    """Writes what JSON has no word for as null."""

    def render(self, content: object) -> bytes:
        return to_json(content)


def _read(note: str | None) -> Note:
    return Note.model_validate_json(note or "{}")
