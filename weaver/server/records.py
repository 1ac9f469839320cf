"""What the journal tells of sessions, runs and operations, each beside the row that holds it.

Made by `Journal` and its callers. What is made `of` a row raises `StorageError` if it is damaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from weaver import wire
from weaver.errors import StorageError, WeaverError
from weaver.protocol import Operation, Outcome, Submission
from weaver.server.keys import Caller
from weaver.types import JsonDict, MetricPoint, ModelInfo, TrainingRun

if TYPE_CHECKING:
    from typing import Self

    import sqlalchemy as sa

T = TypeVar("T")
LIMITS = wire.WireLimits(header_bytes=2**30, array_bytes=2**34, trusted=True)
"""Entries were checked when they came in."""
SUBMISSION, OUTCOME = TypeAdapter(Submission), TypeAdapter(Outcome)
RUN, MODEL = TypeAdapter(TrainingRun), TypeAdapter(ModelInfo)
METADATA = TypeAdapter(JsonDict)


def token_of(session_id: str, submission_id: str) -> str:
    """That of a submission's ticket; a run's id is made of it."""
    name = f"{session_id}/{submission_id}"
    return hashlib.blake2b(name.encode(), digest_size=6).hexdigest()


@dataclass(frozen=True, slots=True)
class SessionRecord:
    session_id: str
    caller: Caller
    lasting: bool = False
    user_metadata: JsonDict = field(default_factory=dict)
    closed: bool = False

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        """Without its metadata, where they are damaged."""
        metadata = _try_decode(row.user_metadata, METADATA, row.session_id)
        return cls(
            row.session_id,
            Caller(row.project, admin=row.admin, local=row.local),
            lasting=row.lasting,
            user_metadata=metadata if isinstance(metadata, dict) else {},
            closed=row.closed,
        )

    def row(self) -> dict[str, Any]:
        return {
            "session_id": self.session_id,
            "lasting": self.lasting,
            "closed": self.closed,
            "user_metadata": wire.encode(self.user_metadata) if self.user_metadata else None,
            **asdict(self.caller),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run, and how to bring it back: create it with `seed`, or load its snapshot; then replay."""

    run: TrainingRun
    model: ModelInfo
    seed: int
    snapshot: int
    """The number of the last operation that the newest snapshot holds; 0: there is none."""
    executed: int
    """The number of the last operation that was executed."""
    unsaved_bytes: int = 0
    """What the journal holds of operations that were executed behind the snapshot."""

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        run = _decode(row.description, RUN, row.run_id)
        return cls(
            run=run.model_copy(update={"name": row.name}),
            model=_decode(row.model, MODEL, row.run_id),
            seed=row.seed,
            snapshot=row.snapshot,
            executed=max(row.newest or 0, row.snapshot),
            unsaved_bytes=row.unsaved_bytes or 0,
        )


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
    size_bytes: int
    """About those of the outcome."""
    number: int | None = None
    """Counts, from 1, what its run has executed; None if this was not executed on a run."""
    lost_gradient: bool = False
    """A batch of its run lacks a part because this was not carried out."""
    answer: Answer | None = None

    @property
    def error(self) -> str | None:
        """Its code, if it failed."""
        return self.outcome.error.code if self.outcome.error else None

    def row(self) -> dict[str, Any]:
        """For the row of the submission."""
        return {
            "of_session": self.session_id,
            "of_submission": self.outcome.submission_id,
            "cursor": self.outcome.cursor,
            "outcome": wire.encode(self.outcome),
            "number": self.number,
            "executed": self.number is not None,
            "error": self.error,
            "lost_gradient": self.lost_gradient,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """An operation of a run that was carried out, to be replayed; `error` is its code, if any."""

    number: int
    operation: Operation
    error: str | None

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        where = f"operation {row.number} of {row.run_id}"
        submission = _decode(row.body, SUBMISSION, where)
        if submission.operation is None:
            raise _damaged(where, "it is withdrawn, but was executed")
        return cls(number=row.number, operation=submission.operation, error=row.error)


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
    """That of its outcome; 0: it has none."""
    outcome: Outcome | WeaverError | None
    """None once its client has it, too. An error: why it cannot be read."""
    executed: bool
    ended_batch: bool
    """It was a step, or a load: no gradient was left after it."""
    lost_gradient: bool

    @classmethod
    def of(cls, row: sa.Row[Any]) -> Self:
        where = f"operation {row.submission_id} of session {row.session_id}"
        submission = _try_decode(row.body, SUBMISSION, where)
        outcome = _try_decode(row.outcome, OUTCOME, where)
        executed = row.number is not None
        return cls(
            session_id=row.session_id,
            submission_id=row.submission_id,
            run_id=row.run_id,
            seq=row.seq,
            fingerprint=row.fingerprint,
            submission=submission,
            cursor=row.cursor or 0,
            outcome=outcome,
            executed=executed,
            ended_batch=executed
            and (row.kind == "optim_step" or (row.kind == "load_checkpoint" and row.error is None)),
            lost_gradient=row.lost_gradient,
        )


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


def fingerprint(submission: Submission) -> bytes:
    """16 bytes that two submissions share only if they ask for the same at the same place.

    They tell a resend from another submission with its id. They are of what is sent and journaled.

    Raises:
        InvalidRequestError: it has metadata that JSON cannot hold.
    """
    digest, s = hashlib.blake2b(digest_size=16), submission
    for part in wire.pack([s.run_id, s.seq, s.lost_gradient, s.operation], canonical=True):
        digest.update(part)
    return digest.digest()


def submission_row(session_id: str, submission: Submission) -> dict[str, Any]:
    """The row of a submission that is pending."""
    return {
        "session_id": session_id,
        "submission_id": submission.id,
        "run_id": submission.run_id,
        "seq": submission.seq,
        "kind": submission.operation and submission.operation.kind,
        "fingerprint": fingerprint(submission),
        "body": wire.encode(submission),
        "lost_gradient": False,
    }


def metric_row(run_id: str, point: MetricPoint) -> dict[str, Any]:
    occurred_at = point.occurred_at and point.occurred_at.isoformat()
    return {**point.model_dump(), "run_id": run_id, "occurred_at": occurred_at}


def point_of(row: sa.Row[Any]) -> MetricPoint:
    return MetricPoint(
        name=row.name,
        value=row.value,
        step=row.step,
        occurred_at=row.occurred_at and datetime.fromisoformat(row.occurred_at),
    )


def _decode(data: bytes | None, adapter: TypeAdapter[T], where: str) -> T:
    try:
        return wire.decode(data or b"", adapter, limits=LIMITS)
    except WeaverError as error:
        raise _damaged(where, str(error)) from error


def _try_decode(data: bytes | None, adapter: TypeAdapter[T], where: str) -> T | WeaverError | None:
    try:
        return None if data is None else _decode(data, adapter, where)
    except StorageError as error:
        return error


def _damaged(where: str, why: str) -> StorageError:
    return StorageError(
        f"the journal's {where} cannot be read: {why}",
        hint="Restore the database from a backup, or go on in a new run from a checkpoint.",
    )
