"""`Client`: a tenant's client reduced to order, ids and outcomes; it keeps its own accounts.

Each operation has to be answered once, and each step's digest has to be the one that the client
computes from what it has sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from tests.simulate.groups import digest
from weaver.errors import QuotaExceededError
from weaver.protocol import ForwardBackward, OptimStep, StepDone, Submission

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.simulate.costs import Costs, Streams
    from weaver.protocol import Operation, Outcome
    from weaver.server.view import View

POLL_S = 300.0
RETRY_S = 5.0
FIRST = "first"
"""The note of an operation that waits for none of its own."""


@dataclass(slots=True)
class Account:
    """What all clients have seen."""

    sent: dict[str, int] = field(default_factory=dict)
    """By kind."""
    answered: int = 0
    doubled: int = 0
    wrong: int = 0
    """Steps whose digest is not the client's."""
    failed: dict[str, int] = field(default_factory=dict)
    """By the error's code."""
    refused: int = 0
    """Requests, for want of room; they came again."""


@dataclass(slots=True, eq=False)
class Client:
    view: View
    session_id: str
    account: Account
    server: Streams
    """Its processor."""
    costs: Costs
    _count: int = 0
    _cursor: int = 0
    _seqs: dict[str, int] = field(default_factory=dict)
    _waiting: dict[str, anyio.Event] = field(default_factory=dict)
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _digests: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    """By run: what was applied, and the gradients behind it."""
    _sent: dict[str, tuple[Operation, str]] = field(default_factory=dict)
    """Of runs, by submission: what has no outcome yet, and its run."""

    async def send(
        self, *operations: Operation, run_id: str | None = None, tokens: float = 0.0
    ) -> list[str]:
        """Their ids, once they are accepted; `tokens` is what they have together."""
        submissions = [
            self._stamp(one, run_id, note=None if i else FIRST) for i, one in enumerate(operations)
        ]
        for one in submissions:
            self._waiting[one.id] = anyio.Event()
        busy_s = self.costs.operation_s * len(operations) + self.costs.token_s * tokens
        while True:
            await self.server.take(busy_s)
            try:
                await self.view.submit(self.session_id, submissions)
            except QuotaExceededError:
                self.account.refused += 1
                await anyio.sleep(RETRY_S)
            else:
                return [one.id for one in submissions]

    def _stamp(self, operation: Operation, run_id: str | None, *, note: str | None) -> Submission:
        self._count += 1
        one_id, seq = f"{self._count}", None
        kind = operation.kind
        self.account.sent[kind] = self.account.sent.get(kind, 0) + 1
        if run_id is not None:
            seq = self._seqs[run_id] = self._seqs.get(run_id, 0) + 1
            self._sent[one_id] = operation, run_id
        return Submission(id=one_id, operation=operation, run_id=run_id, seq=seq, note=note)

    async def outcome(self, submission_id: str) -> Outcome:
        await self._waiting[submission_id].wait()
        del self._waiting[submission_id]
        return self._outcomes.pop(submission_id)

    async def ask(
        self, operation: Operation, *, run_id: str | None = None, tokens: float = 0.0
    ) -> Outcome:
        [submission_id] = await self.send(operation, run_id=run_id, tokens=tokens)
        return await self.outcome(submission_id)

    async def outcomes(self, submission_ids: Sequence[str]) -> list[Outcome]:
        return [await self.outcome(one) for one in submission_ids]

    async def collect(self) -> None:
        """Takes outcomes until it is cancelled."""
        while True:
            for outcome in await self.view.collect(
                self.session_id, after=self._cursor, timeout_s=POLL_S
            ):
                self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        self._cursor = outcome.cursor
        waiting = self._waiting.get(outcome.submission_id)
        if waiting is None or waiting.is_set():
            self.account.doubled += 1
            return
        self.account.answered += 1
        if outcome.error is not None:
            code = outcome.error.code
            self.account.failed[code] = self.account.failed.get(code, 0) + 1
        if outcome.submission_id in self._sent:
            self._account(outcome, *self._sent.pop(outcome.submission_id))
        self._outcomes[outcome.submission_id] = outcome
        waiting.set()

    def _account(self, outcome: Outcome, operation: Operation, run_id: str) -> None:
        """What the run has come to: what failed was not applied, and a step leaves no gradient."""
        before, batch = self._digests.get(run_id, (0, []))
        if isinstance(operation, ForwardBackward) and outcome.error is None:
            batch = [*batch, operation.datums[0].model_input.chunks[0].tokens[0]]
        elif isinstance(operation, OptimStep):
            if isinstance(outcome.result, StepDone):
                before = digest(before, batch)
                self.account.wrong += outcome.result.output.metrics["digest"] != before
            batch = []
        self._digests[run_id] = before, batch
