"""Rows of the journal and the values that they stand for; between `SqlStore` and its tables.

All functions are pure; those that read raise `StorageError` where a row is damaged.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from weaver import wire
from weaver.errors import StorageError, WeaverError
from weaver.protocol import Outcome, Submission
from weaver.server.fingerprint import fingerprint
from weaver.server.store import Entry, Executed, RunRecord, SessionRecord, Settled
from weaver.server.tenancy import Caller
from weaver.types import JsonDict, MetricPoint, ModelInfo, TrainingRun

if TYPE_CHECKING:
    import sqlalchemy as sa

T = TypeVar("T")
LIMITS = wire.WireLimits(header_bytes=2**30, array_bytes=2**34, trusted=True)
"""Entries were checked when they came in."""
SUBMISSION, OUTCOME = TypeAdapter(Submission), TypeAdapter(Outcome)
RUN, MODEL = TypeAdapter(TrainingRun), TypeAdapter(ModelInfo)
METADATA = TypeAdapter(JsonDict)


def executed_row(submission: Submission, settled: Settled) -> dict[str, Any]:
    """Of an operation that is written down after it was carried out; its outcome is not kept."""
    return new_row(settled.session_id, submission) | {
        "cursor": settled.outcome.cursor,
        "number": settled.number,
        "error": error_code(settled),
    }


def error_code(settled: Settled) -> str | None:
    return settled.outcome.error.code if settled.outcome.error else None


def new_row(session_id: str, submission: Submission) -> dict[str, Any]:
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


def settled_row(settled: Settled) -> dict[str, Any]:
    outcome = settled.outcome
    return {
        "of_session": settled.session_id,
        "of_submission": outcome.submission_id,
        "cursor": outcome.cursor,
        "outcome": wire.encode(outcome),
        "number": settled.number,
        "executed": settled.number is not None,
        "error": error_code(settled),
        "lost_gradient": settled.lost_gradient,
    }


def entry_of(row: sa.Row[Any]) -> Entry:
    where = f"operation {row.submission_id} of session {row.session_id}"
    submission = _try_decode(row.body, SUBMISSION, where)
    outcome = _try_decode(row.outcome, OUTCOME, where)
    return Entry(
        session_id=row.session_id,
        submission_id=row.submission_id,
        run_id=row.run_id,
        seq=row.seq,
        fingerprint=row.fingerprint,
        submission=submission,
        cursor=row.cursor or 0,
        outcome=outcome,
        executed=row.number is not None,
        ended_batch=row.number is not None
        and (row.kind == "optim_step" or (row.kind == "load_checkpoint" and row.error is None)),
        lost_gradient=row.lost_gradient,
    )


def executed_of(run_id: str, row: sa.Row[Any]) -> Executed:
    where = f"operation {row.number} of {run_id}"
    submission = _decode(row.body, SUBMISSION, where)
    if submission.operation is None:
        raise _damaged(where, "it is withdrawn, but was executed")
    return Executed(number=row.number, operation=submission.operation, error=row.error)


def run_record_of(row: sa.Row[Any]) -> RunRecord:
    return RunRecord(
        run=_decode(row.description, RUN, row.run_id),
        model=_decode(row.model, MODEL, row.run_id),
        seed=row.seed,
        project=row.project or "",
        snapshot=row.snapshot,
        executed=max(row.newest or 0, row.snapshot),
        unsaved_bytes=row.unsaved_bytes or 0,
    )


def session_row(session: SessionRecord) -> dict[str, Any]:
    about = session.user_metadata
    return {
        "session_id": session.session_id,
        "lasting": session.lasting,
        "closed": session.closed,
        "user_metadata": wire.encode(about) if about else None,
        **asdict(session.caller),
    }


def session_of(row: sa.Row[Any]) -> SessionRecord:
    """Without its metadata, where they are damaged."""
    metadata = _try_decode(row.user_metadata, METADATA, row.session_id)
    return SessionRecord(
        row.session_id,
        Caller(row.project, admin=row.admin, local=row.local),
        lasting=row.lasting,
        user_metadata=metadata if isinstance(metadata, dict) else {},
        closed=row.closed,
    )


def metric_row(run_id: str, point: MetricPoint) -> dict[str, Any]:
    row = point.model_dump(mode="python")
    return row | {
        "run_id": run_id,
        "occurred_at": point.occurred_at and point.occurred_at.isoformat(),
    }


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
