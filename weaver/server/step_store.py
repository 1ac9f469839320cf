"""`StepStore`: the store of the engine in a user's own process, whose client dies with it.

A run is written down whenever an optimizer step (or a load) ends, with the gradients that went into
it, in one commit. So nothing is written for samples or unfinished batches, and a run comes back in
another process as it stood after its last step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from weaver.errors import WeaverError
from weaver.protocol import ForwardBackward, LoadCheckpoint, OptimStep
from weaver.server.rows import error_code, executed_row
from weaver.server.sql_store import SqlStore, describe_runs, insert_operations
from weaver.server.store import Executed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from weaver.protocol import Operation, Submission
    from weaver.server.store import Entry, Keeps, SessionRecord, Settled
    from weaver.types import TrainingRun


class StepStore(SqlStore):
    keeps: Keeps = "runs"

    def __init__(self, database: sa.Engine) -> None:
        super().__init__(database)
        self._submissions: dict[tuple[str, str], Submission] = {}
        self._batches: defaultdict[str, list[tuple[Submission, Settled]]] = defaultdict(list)
        """By run: what was carried out since its last step."""

    async def open_session(self, session: SessionRecord) -> None:
        pass

    async def close_session(self, session_id: str) -> None:
        pass

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        self._submissions |= {(session_id, s.id): s for s in submissions if _changes(s.operation)}

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        ended: list[str] = []
        for one in settled:
            key = one.session_id, one.outcome.submission_id
            submission = self._submissions.pop(key, None)
            if submission is None or submission.run_id is None or one.number is None:
                continue
            self._batches[submission.run_id].append((submission, one))
            if not isinstance(submission.operation, ForwardBackward):
                ended.append(submission.run_id)
        if not ended:
            return
        written = [pair for run_id in ended for pair in self._batches[run_id]]
        try:
            await self._write(
                lambda: [
                    insert_operations([executed_row(*pair) for pair in written]),
                    describe_runs(runs),
                ]
            )
        except WeaverError:
            for run_id in ended:  # that step did not happen, its gradients did; it may come again
                submission, one = self._batches[run_id].pop()
                self._submissions[one.session_id, submission.id] = submission
            raise
        for run_id in ended:
            del self._batches[run_id]

    async def sessions(self) -> Sequence[SessionRecord]:
        return []

    async def entries(self) -> Sequence[Entry]:
        return []

    async def executed(self, run_id: str, *, after: int) -> Sequence[Executed]:
        unwritten = [
            Executed(number=one.number, operation=submission.operation, error=error_code(one))
            for submission, one in self._batches.get(run_id, [])
            if submission.operation is not None and one.number is not None
        ]
        return [*await super().executed(run_id, after=after), *unwritten]


def _changes(operation: Operation | None) -> bool:
    """Whether it changes a run, so that it has to be replayed."""
    gradient = isinstance(operation, ForwardBackward) and operation.backward
    return gradient or isinstance(operation, (OptimStep, LoadCheckpoint))
