"""`TinkerSession`: the operations of one Tinker session, which is a native session, by their ids.

A request's id is the native submission's, so that the service itself knows a resend and keeps the
order of a model's requests. What a client calls its samplers are names in the session.
"""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
from pydantic import BaseModel, ConfigDict

from weaver.errors import InvalidRequestError, NotFoundError, WeaverError
from weaver.protocol import Submission
from weaver.server.records import token_of

if TYPE_CHECKING:
    from fastapi import Request

    from weaver.protocol import Operation, Outcome
    from weaver.server.view import View

KEPT_S = 60.0
"""How long an outcome stays readable once it was answered, for an answer that got lost."""
MODEL_ID = re.compile(r"(session-[\w-]+):train:\d+", re.ASCII)
SAMPLER_ID = re.compile(r"(session-[\w-]+):sample:\d+", re.ASCII)


class Note(BaseModel):
    """What an answer needs beside the operation's result; the journal keeps it."""

    model_config = ConfigDict(frozen=True)

    model_id: str = ""
    sampling_session: str = ""
    """What a sampler without a name is called."""
    inflight: bool = False
    """Whether it takes the place of the model's earlier samplers that are in flight."""
    temperature: float = 1.0
    """Under which a sample's log-probabilities are asked for; 1 where it was greedy."""
    sparse_targets: bool = False
    """Whether those of targets are told in sparse rows."""
    last_n: int | None = None
    """Of a prompt, no more than this many tokens' are told."""
    loss_fn: str = ""


class SamplerName(BaseModel):
    """What a sampling session's id stands for."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    sampler_id: str
    base_model: str
    model_path: str | None = None
    inflight: str = ""
    """The model whose newest weights in flight it stands for, whichever it was given with."""


@dataclass(slots=True, eq=False)
class Future:
    """An operation on its way to its outcome."""

    id: str
    note: Note
    outcome: Outcome | None = None
    ended: anyio.Event = field(default_factory=anyio.Event)
    answered_at: float | None = None


class TinkerSession:
    """Follows the native session from its first request in this process on."""

    def __init__(self, service: View, session_id: str) -> None:
        self.service = service
        self.session_id = session_id
        self._futures: dict[str, Future] = {}
        self._done: deque[Future] = deque()
        """Those that have an outcome, in the order of their cursors."""
        self._changed = anyio.Event()
        self._newest: dict[str, tuple[int, SamplerName]] = {}
        """By models, the last of their weights in flight, and which one of the session's it is."""
        for called in self.samplers():
            name = SamplerName.model_validate_json(service.hear(session_id)[called])
            self._take_off(called, name)
        pending, _ = service.follow(session_id, self._end)
        for submission in pending:
            self._future(submission.id, submission.note)

    async def submit(
        self,
        operation: Operation,
        request_id: str,
        note: Note | None = None,
        *,
        run_id: str | None = None,
        seq: int | None = None,
    ) -> Future:
        """Hands the operation to the service, durably; a resend gets the first one's future.

        Raises:
            InvalidRequestError: the id or the place was used for another request.
        """
        submission = Submission(
            id=request_id,
            operation=operation,
            run_id=run_id,
            seq=seq,
            note=(note or Note()).model_dump_json(exclude_defaults=True),
        )
        await self.service.submit(self.session_id, [submission])
        return self._future(request_id, submission.note)

    def find(self, request_id: str) -> Future:
        """Raises NotFoundError."""
        if request_id not in self._futures:
            raise NotFoundError(
                f"no request is called {request_id[:80]!r}.",
                field="request_id",
                hint=f"Its outcome was kept for {KEPT_S:.0f} s after it was answered.",
            )
        return self._futures[request_id]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._futures

    async def cancel(self, request_id: str) -> None:
        await self.service.cancel(self.session_id, [request_id])

    async def completed(
        self, sampling_session: str, *, after: int, timeout_s: float
    ) -> list[Future]:
        """Futures of a sampling session that ended behind a cursor; waits until there is one."""
        with anyio.move_on_after(timeout_s):
            while not (found := self._completed(sampling_session, after)):
                await self._changed.wait()
            return found
        return []

    def answered(self, future: Future) -> None:
        """Lets go of what was answered a while ago, as far as everything before it was."""
        now = time.monotonic()
        future.answered_at = future.answered_at or now
        last = None
        while self._done and (at := self._done[0].answered_at) and at < now - KEPT_S:
            last = self._done.popleft()
            del self._futures[last.id]
        if last is not None and last.outcome is not None:
            self.service.forget(self.session_id, last.outcome.cursor)

    # --- names ----------------------------------------------------------------------------------

    async def name_sampler(self, sampling_session: str, name: SamplerName) -> None:
        if sampling_session not in self.service.hear(self.session_id):
            await self.service.name(self.session_id, sampling_session, name.model_dump_json())
            self._take_off(sampling_session, name)

    def _take_off(self, sampling_session: str, name: SamplerName) -> None:
        """Clients number the samplers of a session as they make them."""
        number = int(sampling_session.rpartition(":")[2])
        if name.inflight and number >= self._newest.get(name.inflight, (0, name))[0]:
            self._newest[name.inflight] = number, name

    def sampler(self, sampling_session: str) -> SamplerName:
        """Of those in flight the newest one of their model.

        Raises:
            NotFoundError
        """
        value = self.service.hear(self.session_id).get(sampling_session)
        if value is None:
            raise NotFoundError(
                f"no sampling session is called {sampling_session[:80]!r}.",
                field="sampling_session_id",
            )
        name = SamplerName.model_validate_json(value)
        return self._newest.get(name.inflight, (0, name))[1]

    def samplers(self) -> list[str]:
        return [n for n in self.service.hear(self.session_id) if SAMPLER_ID.fullmatch(n)]

    def _completed(self, sampling_session: str, after: int) -> list[Future]:
        return [
            one
            for one in self._done
            if one.outcome is not None
            and one.outcome.cursor > after
            and one.id.startswith(f"{sampling_session}:")
        ]

    def _future(self, request_id: str, note: str | None) -> Future:
        if request_id not in self._futures:
            self._futures[request_id] = Future(request_id, Note.model_validate_json(note or "{}"))
        return self._futures[request_id]

    def _end(self, outcome: Outcome) -> None:
        future = self._future(outcome.submission_id, outcome.note)
        future.outcome = outcome
        future.ended.set()
        self._done.append(future)
        self._changed.set()
        self._changed = anyio.Event()


class TinkerSessions(dict[str, TinkerSession]):
    """Those of a server that are open, by their ids."""


def session_of(request: Request, session_id: str) -> TinkerSession:
    """An open session of the caller, which lives on.

    Raises:
        NotFoundError: it was closed, or is not the caller's.
    """
    known: TinkerSessions = request.state.gateway.own(TinkerSessions)
    service: View = request.state.service
    try:
        service.hear(session_id)
    except WeaverError:
        known.pop(session_id, None)
        raise
    if session_id not in known:
        known[session_id] = TinkerSession(service, session_id)
    return known[session_id]


def owner_of(name: str, *, field: str) -> str:
    """The session's id in a model's, sampler's or request's.

    Raises:
        InvalidRequestError
    """
    session_id, _, rest = name.partition(":")
    if not rest:
        raise InvalidRequestError(
            f"is {name[:80]!r}.",
            field=field,
            hint="Such as session-0123456789ab:train:0, from the client that made it.",
        )
    return session_id


def run_of(model_id: str) -> str:
    """The run that is called so; also takes the id of a run that another protocol made."""
    if not MODEL_ID.fullmatch(model_id):
        return model_id
    return f"run-{token_of(owner_of(model_id, field='model_id'), creation_of(model_id))}"


def creation_of(model_id: str) -> str:
    """The request that makes a model."""
    return f"{model_id}:0"
