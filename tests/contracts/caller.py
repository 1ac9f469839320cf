"""`Caller`: a client reduced to what the contract of `Service` needs; counts seq and collects."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import anyio

from weaver.protocol import (
    CheckpointSaved,
    CreateModel,
    ForwardBackward,
    ModelCreated,
    OptimStep,
    SaveCheckpoint,
    Submission,
)
from weaver.types import AdamParams, Datum

if TYPE_CHECKING:
    from weaver.protocol import Operation, Outcome, Result, Service

IDS = itertools.count()
R = TypeVar("R")
TEXT = list(b"hello world")
HELLO = Datum(model_input=TEXT[:-1], loss_fn_inputs={"target_tokens": TEXT[1:]})
GRADIENT = ForwardBackward(datums=(HELLO,), loss_fn="cross_entropy")
FORWARD = ForwardBackward(datums=(HELLO,), loss_fn="cross_entropy", backward=False)
BAD_GRADIENT = ForwardBackward(
    datums=(Datum(model_input=[9999], loss_fn_inputs={"target_tokens": [1]}),),
    loss_fn="cross_entropy",
)
STEP = OptimStep(params=AdamParams(learning_rate=0.1))


@dataclass(slots=True)
class Caller:
    service: Service
    session_id: str
    cursor: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def open(cls, service: Service) -> Caller:
        return cls(service, (await service.open_session()).session_id)

    def stamp(
        self, operation: Operation | None, run_id: str | None = None, *, lost_gradient: bool = False
    ) -> Submission:
        """A submission with the next seq of its run."""
        if run_id is None:
            return Submission(id=f"id-{next(IDS)}", operation=operation)
        self.seqs[run_id] = self.seqs.get(run_id, 0) + 1
        return Submission(
            id=f"id-{next(IDS)}",
            operation=operation,
            run_id=run_id,
            seq=self.seqs[run_id],
            lost_gradient=lost_gradient,
        )

    async def send(self, *submissions: Submission) -> list[str]:
        await self.service.submit(self.session_id, submissions)
        return [submission.id for submission in submissions]

    async def start(self, operation: Operation | None, run_id: str | None = None) -> str:
        return (await self.send(self.stamp(operation, run_id)))[0]

    async def outcome(self, submission_id: str) -> Outcome:
        with anyio.fail_after(20):
            while submission_id not in self.outcomes:
                for outcome in await self.service.collect(
                    self.session_id, after=self.cursor, timeout_s=5
                ):
                    assert outcome.cursor == self.cursor + 1
                    assert outcome.submission_id not in self.outcomes
                    self.cursor = outcome.cursor
                    self.outcomes[outcome.submission_id] = outcome
        return self.outcomes[submission_id]

    async def result(self, submission_id: str) -> Result:
        outcome = await self.outcome(submission_id)
        if outcome.error is not None:
            raise outcome.error.to_error()
        assert outcome.result is not None
        return outcome.result

    async def do(self, operation: Operation, expected: type[R], *, run_id: str | None = None) -> R:
        result = await self.result(await self.start(operation, run_id))
        assert isinstance(result, expected)
        return result

    async def refused(self, operation: Operation, *, run_id: str | None = None) -> str:
        """The code of the error that the operation ends with."""
        outcome = await self.outcome(await self.start(operation, run_id))
        assert outcome.result is None and outcome.error is not None
        assert outcome.error.hint or outcome.error.code in ("cancelled", "engine_error")
        return outcome.error.code

    async def create(self, base_model: str = "fake") -> str:
        return (await self.do(CreateModel(base_model=base_model), ModelCreated)).run.run_id

    async def save(self, run_id: str, purpose: str = "state", *, name: str | None = None) -> str:
        """The path of a new checkpoint."""
        operation = SaveCheckpoint.model_validate({"purpose": purpose, "name": name})
        return (await self.do(operation, CheckpointSaved, run_id=run_id)).checkpoint.path
