"""`Store`: where the service writes down what must outlive a crash; `MemoryStore` outlives none.

`LocalService` journals a request before it acknowledges it and an outcome before it shows it. All
methods may raise `StorageError`, or `ServiceConnectionError` while a database is out of reach.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.errors import WeaverError
    from weaver.protocol import Operation, Outcome, Submission
    from weaver.server.tenancy import Caller
    from weaver.types import JsonDict, MetricPoint, ModelInfo, TrainingRun

Keeps = Literal["nothing", "runs", "everything"]
"""What outlives this process; of `everything`, clients do, so that their sessions must."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The finite numbers that an operation of a run answered."""

    run_id: str
    kind: str
    step: int
    """Optimizer steps that the run had taken when it ended."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What became of a submission."""

    session_id: str
    outcome: Outcome
    number: int | None = None
    """Counts, from 1, what its run has executed; None if this was not executed on a run."""
    lost_gradient: bool = False
    """A batch of its run lacks a part because this was not carried out."""
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    session_id: str
    caller: Caller
    lasting: bool = False
    user_metadata: JsonDict = field(default_factory=dict)
    closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run, and how to bring it back: create it with `seed`, or load its snapshot; then replay."""

    run: TrainingRun
    model: ModelInfo
    seed: int
    project: str
    snapshot: int
    """The number of the last operation that the newest snapshot holds; 0: there is none."""
    executed: int
    """The number of the last operation that was executed."""
    unsaved_bytes: int = 0
    """Of what was executed behind the snapshot, in the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """An operation of a run that was carried out, to be replayed; `error` is its code, if any."""

    number: int
    operation: Operation
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A submission as the journal remembers it."""

    session_id: str
    submission_id: str
    run_id: str | None
    seq: int | None
    fingerprint: bytes
    submission: Submission | WeaverError | None
    """What is pending, or why it cannot be read; None once it has an outcome."""
    cursor: int
    """Of its outcome; 0: it has none."""
    outcome: Outcome | WeaverError | None
    """None once its client has it, too. An error: why it cannot be read."""
    executed: bool
    ended_batch: bool
    """It was a step, or a load: no gradient was left after it."""
    lost_gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """Operations of a session and a run, without a gap, that were refused, and whose clients know.

    `first` to `last` are their seqs.
    """

    session_id: str
    run_id: str
    first: int
    last: int
    cursor: int
    """The highest of their outcomes."""


class Store(Protocol):
    @property
    def keeps(self) -> Keeps: ...

    async def open_session(self, session: SessionRecord) -> None: ...

    async def close_session(self, session_id: str) -> None:
        """Forgets it, but for what is pending and what its runs still need."""

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        """Writes all of them down, or none. Their ids are new to the session."""

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        """Writes down what became of submissions, once each, and of their runs: all or nothing."""

    def acknowledge(self, session_id: str, submission_ids: Sequence[str]) -> None:
        """Their clients have these outcomes, which may be forgotten with the next write."""

    async def sessions(self) -> Sequence[SessionRecord]:
        """The open ones, and those with pending work."""

    async def entries(self) -> Sequence[Entry]:
        """What is pending, and what open sessions still need, in the order of `append`.

        A sample whose client has its outcome is forgotten, and so is what a snapshot holds, but for
        the last of each kind. What `passed` tells of is left out.
        """

    async def passed(self) -> Sequence[Passed]:
        """What open sessions' runs pass over, without having lost a gradient."""

    async def put_run(self, run: TrainingRun, *, model: ModelInfo, seed: int) -> None:
        """Writes down a run at its beginning."""

    async def delete_run(self, run_id: str) -> None:
        """Forgets a run, its metrics and what it has carried out; not outcomes still to be told."""

    async def runs(self) -> Sequence[RunRecord]:
        """In the order in which they were put."""

    async def run(self, run_id: str) -> RunRecord | None: ...

    async def owners(self) -> Mapping[str, str]:
        """The project of each run, of deleted ones too: their checkpoints may remain."""

    async def executed(self, run_id: str, *, after: int) -> Sequence[Executed]:
        """What a run has carried out since its snapshot, in that order.

        Raises:
            StorageError: an entry is damaged.
        """

    async def put_snapshot(self, run_id: str, number: int) -> None:
        """A snapshot holds all up to `number`, which is not needed any more.

        Outlives a loss of power when it returns: former snapshots may then be deleted.
        """

    async def answers(self, run_id: str) -> Sequence[Answer]:
        """Those of what was settled, in that order; none where clients do not outlive them."""

    async def knows_request(self, key: str) -> bool:
        """Whether it was kept within the last day, by any process."""

    async def keep_request(self, key: str) -> None: ...

    async def drop_request(self, key: str) -> None: ...

    async def add_metrics(
        self, run_id: str, points: Sequence[MetricPoint], *, key: str | None = None
    ) -> None:
        """Keeps the request with them; nothing, if it is known."""

    async def metric_counts(self, run_id: str) -> Mapping[str, int]:
        """How many there are of each name."""

    async def metrics(
        self, run_id: str, *, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> Sequence[MetricPoint]:
        """In the order in which they were added."""


class MemoryStore:
    """Keeps metrics and answers, read in this process; nothing else is ever asked for."""

    keeps: Keeps = "nothing"

    def __init__(self) -> None:
        self._metrics: dict[str, list[MetricPoint]] = {}
        self._answers: dict[str, list[Answer]] = {}

    async def open_session(self, session: SessionRecord) -> None:
        pass

    async def close_session(self, session_id: str) -> None:
        pass

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        pass

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        for answer in [one.answer for one in settled if one.answer is not None]:
            self._answers.setdefault(answer.run_id, []).append(answer)

    def acknowledge(self, session_id: str, submission_ids: Sequence[str]) -> None:
        pass

    async def sessions(self) -> Sequence[SessionRecord]:
        return []

    async def entries(self) -> Sequence[Entry]:
        return []

    async def passed(self) -> Sequence[Passed]:
        return []

    async def put_run(self, run: TrainingRun, *, model: ModelInfo, seed: int) -> None:
        pass

    async def delete_run(self, run_id: str) -> None:
        self._metrics.pop(run_id, None)
        self._answers.pop(run_id, None)

    async def runs(self) -> Sequence[RunRecord]:
        return []

    async def run(self, run_id: str) -> RunRecord | None:
        return None

    async def owners(self) -> Mapping[str, str]:
        return {}

    async def executed(self, run_id: str, *, after: int) -> Sequence[Executed]:
        return []

    async def put_snapshot(self, run_id: str, number: int) -> None:
        pass

    async def answers(self, run_id: str) -> Sequence[Answer]:
        return self._answers.get(run_id, [])

    async def knows_request(self, key: str) -> bool:
        return False

    async def keep_request(self, key: str) -> None:
        pass

    async def drop_request(self, key: str) -> None:
        pass

    async def add_metrics(
        self, run_id: str, points: Sequence[MetricPoint], *, key: str | None = None
    ) -> None:
        self._metrics.setdefault(run_id, []).extend(points)

    async def metric_counts(self, run_id: str) -> Mapping[str, int]:
        return Counter(point.name for point in self._metrics.get(run_id, []))

    async def metrics(
        self, run_id: str, *, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> Sequence[MetricPoint]:
        mine = [p for p in self._metrics.get(run_id, []) if name in (None, p.name)]
        return mine[offset : None if limit is None else offset + limit]
