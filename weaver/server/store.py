"""`Store`: where the service writes down what must outlive a crash; `MemoryStore` outlives none.

`LocalService` journals a request before it acknowledges it and an outcome before it shows it. All
methods may raise `StorageError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.protocol import ErrorInfo, Result, Submission
    from weaver.types import MetricPoint, TrainingRun


class Store(Protocol):
    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        """Writes all of them down, or none. Their ids are new to the session."""

    async def settle(
        self, session_id: str, submission_id: str, outcome: Result | ErrorInfo
    ) -> None:
        """Writes down what became of a submission, once."""

    async def pending(self) -> Sequence[tuple[str, Submission]]:
        """(session_id, submission) of all that have no outcome, in the order of `append`."""

    async def put_run(self, run: TrainingRun) -> None:
        """Inserts or replaces a run's description."""

    async def runs(self) -> Sequence[TrainingRun]:
        """In the order in which they were first put."""

    async def add_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None: ...

    async def metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        """In the order in which they were added."""


class MemoryStore:
    """Keeps everything in this process, and submissions only until they are settled."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, str], Submission] = {}
        self._runs: dict[str, TrainingRun] = {}
        self._metrics: dict[str, list[MetricPoint]] = {}

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        self._pending |= {(session_id, submission.id): submission for submission in submissions}

    async def settle(
        self, session_id: str, submission_id: str, outcome: Result | ErrorInfo
    ) -> None:
        del self._pending[session_id, submission_id]

    async def pending(self) -> Sequence[tuple[str, Submission]]:
        return [(session_id, submission) for (session_id, _), submission in self._pending.items()]

    async def put_run(self, run: TrainingRun) -> None:
        self._runs[run.run_id] = run

    async def runs(self) -> Sequence[TrainingRun]:
        return list(self._runs.values())

    async def add_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        self._metrics.setdefault(run_id, []).extend(points)

    async def metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        return [p for p in self._metrics.get(run_id, []) if name in (None, p.name)]
