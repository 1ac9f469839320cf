"""`Desk`: one caller's operations in the Weaver REST interface, over one native session.

The routes submit here and wait here. No task runs in the background: whoever waits collects the
outcomes of all. What a desk knows may be lost with the process: runs, checkpoints and samplers do
not depend on it.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from anyio import to_thread
from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from weaver.errors import NotFoundError, WeaverError
from weaver.protocol import Sample, Submission

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import Response

    from weaver.protocol import ErrorInfo, Operation, Outcome, Service
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

    submission: Submission
    answer: Callable[[Any], JsonDict]
    """Makes the interface's response of the native result; may be slow."""
    key: bytes | None
    """What a resend of the same request has in common with it."""
    aborted: JsonDict | None
    """The response to a sample that a pause has ended."""
    outcome: Outcome | None = None
    ended_at: float = 0.0
    waiting: set[anyio.CancelScope] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def samples(self, sampler_id: str) -> bool:
        """Whether it is a sample on its way, of that sampler."""
        operation = self.submission.operation
        mine = isinstance(operation, Sample) and operation.sampler_id == sampler_id
        return mine and not self.done

    def envelope(self) -> JsonDict:
        head: JsonDict = {"id": self.submission.id}
        if self.outcome is None:
            return head | {"status": "pending"}
        error = self.outcome.error
        if error is None:
            return head | {"status": "done", "response": self.answer(self.outcome.result)}
        if error.code == "cancelled" and self.aborted is not None:
            return head | {"status": "done", "response": self.aborted}
        return head | _failure(error)


class Desk:
    """Args: stopping: once set, waits end with what there is."""

    def __init__(self, service: Service, stopping: anyio.Event) -> None:
        self.service = service
        self._stopping = stopping
        self._session_id = ""
        self._opening = anyio.Lock()
        self._collecting = anyio.Lock()
        self._cursor = 0
        self._seqs: defaultdict[str, int] = defaultdict(int)
        self._turns: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._by_key: dict[bytes, Entry] = {}
        self._paused: dict[str, list[Entry]] = {}

    def turn(self, run_id: str) -> anyio.Lock:
        """Held from before a run's request is read until it is submitted.

        It keeps the order in which requests began to arrive, however long their bodies are.
        """
        return self._turns[run_id]

    async def submit(
        self,
        operation: Operation,
        answer: Callable[[Any], JsonDict],
        *,
        key: bytes | None = None,
        run_id: str | None = None,
        aborted: JsonDict | None = None,
    ) -> Entry:
        """Hands the operation to the service; a resend gets the entry of the first request.

        Args:
            run_id: the run whose `turn` the caller holds.
            aborted: the response to a sample that a pause has ended.
        """
        self._forget_old()
        if key is not None and key in self._by_key:
            return self._by_key[key]
        seq = self._seqs[run_id] + 1 if run_id else None
        submission = Submission(id=uuid.uuid4().hex, operation=operation, run_id=run_id, seq=seq)
        entry = Entry(submission, answer, key, aborted)
        self._remember(entry)
        if isinstance(operation, Sample) and operation.sampler_id in self._paused:
            self._paused[operation.sampler_id].append(entry)
            return entry
        try:
            with anyio.CancelScope(shield=True):  # a place that was taken must be counted
                await self._send([entry])
                if run_id:
                    self._seqs[run_id] += 1
        except WeaverError:
            self._drop(entry)
            raise
        return entry

    async def wait(self, entry: Entry, timeout_s: float) -> Entry:
        """Until the entry is done, at most `timeout_s`."""
        if entry.done:
            return entry
        with anyio.move_on_after(timeout_s) as scope:
            entry.waiting.add(scope)
            try:
                async with self._collecting:
                    while not entry.done and not self._stopping.is_set():
                        await self._collect(timeout_s)
            finally:
                entry.waiting.discard(scope)
        return entry

    def find(self, operation_id: str) -> Entry:
        """Raises NotFoundError."""
        if operation_id not in self._entries:
            raise NotFoundError(
                f"no operation is called {operation_id[:80]!r}.",
                field="operation_id",
                hint=f"Its outcome was kept for {KEPT_S:.0f} s, or the server was started anew.",
            )
        return self._entries[operation_id]

    def last_seq(self, run_id: str) -> int:
        return self._seqs[run_id] if run_id in self._seqs else 0

    # --- pausing --------------------------------------------------------------------------------

    async def pause(self, sampler_id: str, *, abort: bool) -> None:
        """Holds back the sampler's operations from now on; with `abort` ends those that run."""
        self._paused.setdefault(sampler_id, [])
        if not abort:
            return
        ids = [id for id, entry in self._entries.items() if entry.samples(sampler_id)]
        await self.service.cancel(await self._session(), ids)

    async def go_on(self, sampler_id: str) -> None:
        held = self._paused.pop(sampler_id, [])
        if held:
            await self._send(held)

    # --- the native session ---------------------------------------------------------------------

    async def _send(self, entries: list[Entry]) -> None:
        await self.service.submit(await self._session(), [entry.submission for entry in entries])

    async def _session(self) -> str:
        async with self._opening:
            if not self._session_id:
                info = await self.service.open_session(user_metadata={"interface": "weaver-rest"})
                self._session_id = info.session_id
        return self._session_id

    async def _collect(self, timeout_s: float) -> None:
        outcomes = await self.service.collect(
            await self._session(), after=self._cursor, timeout_s=min(timeout_s, COLLECT_S)
        )
        for outcome in outcomes:
            self._cursor = max(self._cursor, outcome.cursor)
            entry = self._entries.get(outcome.submission_id)
            if entry is None:
                continue
            entry.outcome, entry.ended_at = outcome, time.monotonic()
            for scope in entry.waiting:
                scope.cancel()

    def _remember(self, entry: Entry) -> None:
        self._entries[entry.submission.id] = entry
        if entry.key is not None:
            self._by_key[entry.key] = entry

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.submission.id]
        if entry.key is not None:
            del self._by_key[entry.key]

    def _forget_old(self) -> None:
        """Looks at the oldest first and stops at the first that stays, so it costs nothing."""
        deadline = time.monotonic() - KEPT_S
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if not oldest.done or oldest.ended_at > deadline:
                break
            self._drop(oldest)


async def desk_of(request: Request) -> Desk:
    """The caller's desk; async, so that no thread comes between two requests of one client."""
    front, caller = request.state.front, request.state.caller
    if caller not in front.desks:
        front.desks[caller] = Desk(request.state.service, front.stopping)
    desk: Desk = front.desks[caller]
    return desk


Desked = Annotated[Desk, Depends(desk_of)]


def resend_key(request: Request, body: bytes, *, numbered: bool = False) -> bytes | None:
    """What all attempts of one call share, and no other call has.

    The client sends one `traceparent` with all attempts of a call. Without it only a body that is
    `numbered` (has a seq_id) can be told from an equal one.
    """
    trace = request.headers.get("traceparent", "")
    if not trace and not numbered:
        return None
    head = f"{trace}\n{request.url.path}\n".encode()
    return hashlib.blake2b(head + body, digest_size=16).digest()


async def answered(desk: Desk, entry: Entry, *, hold_s: float = HOLD_S) -> Response:
    """The operation's envelope, with its outcome if that comes within `hold_s`."""
    await desk.wait(entry, hold_s)
    return JsonResponse(await to_thread.run_sync(entry.envelope))


class JsonResponse(JSONResponse):
    """Writes what JSON has no word for as null."""

    def render(self, content: object) -> bytes:
        return to_json(content)


def _failure(error: ErrorInfo) -> JsonDict:
    return {
        "status": "error",
        "error": error.code,
        "error_code": error.code,
        "error_message": str(error.to_error()),
        "retryable": False,
    }
