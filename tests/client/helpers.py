"""What the client tests share: a client on the fake engine, and a service that follows a script."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from tests.fake_engine import FakeEngine
from weaver import AsyncServiceClient, Datum
from weaver.errors import TooLargeError
from weaver.protocol import (
    ErrorInfo,
    ForwardBackward,
    GradientsDone,
    Outcome,
    Sample,
    SessionInfo,
    StepDone,
)
from weaver.server.service import LocalService
from weaver.types import ForwardBackwardResult, ModelInput, OptimStepResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from weaver.errors import WeaverError
    from weaver.protocol import Submission

DATUMS = [Datum(model_input=[72, 101, 108], loss_fn_inputs={"target_tokens": [101, 108, 108]})]
STEP = {"learning_rate": 0.1}


@asynccontextmanager
async def fake_client(home: Path, **options: Any) -> AsyncIterator[AsyncServiceClient]:
    """A client, a local service and a fake engine with `options`, all closed on leaving."""
    with anyio.fail_after(20):
        async with (
            LocalService(FakeEngine(**options), home=home) as service,
            AsyncServiceClient(service=service, home=home) as client,
        ):
            yield client


class ScriptedService:
    """Records what it is sent; answers when the test says so, or at once with `auto`."""

    def __init__(self, *, auto: bool = False) -> None:
        self.auto = auto
        self.requests: list[list[Submission]] = []
        self.cancelled: list[str] = []
        self.closed = False
        self.submit_error: Exception | None = None
        self.most_tokens = math.inf
        self.collect_error: Exception | None = None
        self._outcomes: list[Outcome] = []
        self._changed = anyio.Event()

    @property
    def submissions(self) -> list[Submission]:
        return [submission for request in self.requests for submission in request]

    async def open_session(self, *, user_metadata: object = None) -> SessionInfo:
        return SessionInfo(session_id="s", description="script")

    async def close_session(self, session_id: str) -> None:
        self.closed = True

    async def submit(self, session_id: str, submissions: Sequence[Submission]) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        if sum(map(_tokens, submissions)) > self.most_tokens:
            raise TooLargeError(f"the limit is {self.most_tokens}.")
        self.requests.append(list(submissions))
        for submission in submissions if self.auto else ():
            self.answer(submission)

    async def collect(self, session_id: str, *, after: int, timeout_s: float) -> list[Outcome]:
        with anyio.move_on_after(timeout_s):
            while self.collect_error is None and len(self._outcomes) <= after:
                await self._changed.wait()
        if self.collect_error is not None:
            raise self.collect_error
        return self._outcomes[after:]

    async def cancel(self, session_id: str, submission_ids: Sequence[str]) -> None:
        self.cancelled += submission_ids

    def answer(self, submission: Submission, error: WeaverError | None = None) -> None:
        """Makes an outcome: the error, or the result that the operation's kind calls for."""
        output: object = OptimStepResult(metrics={"step": submission.seq or 0})
        result: Any = StepDone(output=output)
        if submission.operation is not None and submission.operation.kind == "forward_backward":
            metrics = {"loss": float(submission.seq or 0)}
            result = GradientsDone(
                output=ForwardBackwardResult(loss_fn_outputs=(), metrics=metrics)
            )
        self._outcomes.append(
            Outcome(
                submission_id=submission.id,
                cursor=len(self._outcomes) + 1,
                result=None if error else result,
                error=ErrorInfo.of(error) if error else None,
            )
        )
        self._wake()

    def break_collect(self, error: Exception) -> None:
        self.collect_error = error
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def _tokens(submission: Submission) -> int:
    match submission.operation:
        case ForwardBackward(datums=datums):
            return sum(datum.model_input.length for datum in datums)
        case Sample(prompt=ModelInput(length=length)):
            return length
    return 0
