"""`SqlStore`: the `Store` in a database; opened by `weaver serve`.

Writes that wait for each other are committed together, one transaction at a time, each in a worker
thread. An entry is encoded there too.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import sqlalchemy as sa
from anyio import CancelScope, to_thread
from pydantic import TypeAdapter

from weaver import wire
from weaver.errors import ServiceConnectionError, StorageError, WeaverError
from weaver.protocol import Outcome, Submission
from weaver.server.sessions import fingerprint
from weaver.server.store import Entry, Executed, RunRecord, Settled
from weaver.server.tables import metrics_table, operations_table, runs_table, sessions_table
from weaver.types import MetricPoint, ModelInfo, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)
T = TypeVar("T")
ALWAYS: list[dict[str, Any]] = [{}]
"""The rows of a statement that has no parameters; a statement without rows is left out."""
Statement = tuple[sa.Executable, list[dict[str, Any]]]
Statements = list[Statement]

LIMITS = wire.WireLimits(header_bytes=2**30, array_bytes=2**34)
"""Entries were checked when they came in."""
SUBMISSION, OUTCOME = TypeAdapter(Submission), TypeAdapter(Outcome)
RUN, MODEL = TypeAdapter(TrainingRun), TypeAdapter(ModelInfo)

operations = operations_table.c
OUTCOME_COLUMNS = ("cursor", "outcome", "number", "error", "lost_gradient")
SETTLE = (
    operations_table.update()
    .where(
        operations.session_id == sa.bindparam("of_session"),
        operations.submission_id == sa.bindparam("of_submission"),
    )
    .values(
        {
            name: sa.bindparam(name)
            for name in ("cursor", "outcome", "number", "error", "lost_gradient")
        }
    )
)
ACKNOWLEDGE = (
    operations_table.update()
    .where(
        operations.session_id == sa.bindparam("of_session"),
        operations.submission_id == sa.bindparam("of_submission"),
    )
    .values(outcome=None)
)
NEWEST = sa.select(sa.func.max(operations.number)).where(operations.run_id == runs_table.c.run_id)
RECORD = sa.select(runs_table, NEWEST.scalar_subquery().label("newest"))
DESCRIBE = (
    runs_table.update()
    .where(runs_table.c.run_id == sa.bindparam("of_run"))
    .values(description=sa.bindparam("description"))
)


@dataclass(slots=True, eq=False)
class _Write:
    """A change on its way into the database."""

    make: Callable[[], Statements]
    """Called in the thread that commits."""
    done: bool = False
    error: WeaverError | None = None


class SqlStore:
    """On a database that `open_database` opened; whoever opened it disposes of it."""

    durable = True
    keeps_sessions = True

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._writes: list[_Write] = []
        self._writing = anyio.Lock()
        self._acknowledged: defaultdict[str, list[str]] = defaultdict(list)

    async def open_session(self, session_id: str) -> None:
        await self._write(lambda: [(sessions_table.insert(), [{"session_id": session_id}])])

    async def close_session(self, session_id: str) -> None:
        self._acknowledged.pop(session_id, None)
        unneeded = operations_table.delete().where(
            operations.session_id == session_id,
            operations.cursor.is_not(None),
            sa.or_(operations.number.is_(None), operations.body.is_(None)),
        )
        closed = sessions_table.delete().where(sessions_table.c.session_id == session_id)
        await self._write(lambda: [(closed, ALWAYS), (unneeded, ALWAYS)])

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        def make() -> Statements:
            return [insert_operations([_new_row(session_id, one) for one in submissions])]

        await self._write(make)

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        def make() -> Statements:
            seen, self._acknowledged = self._acknowledged, defaultdict(list)
            acknowledged = [
                {"of_session": session_id, "of_submission": submission_id}
                for session_id, submission_ids in seen.items()
                for submission_id in submission_ids
            ]
            return [
                (SETTLE, [_settled_row(one) for one in settled]),
                describe_runs(runs),
                (ACKNOWLEDGE, acknowledged),
            ]

        await self._write(make)

    def acknowledge(self, session_id: str, submission_ids: Sequence[str]) -> None:
        self._acknowledged[session_id] += submission_ids

    async def sessions(self) -> Sequence[str]:
        return [row.session_id for row in await self._read(sa.select(sessions_table))]

    async def entries(self) -> Sequence[Entry]:
        pending = operations.cursor.is_(None)
        is_open = operations.session_id.in_(sa.select(sessions_table.c.session_id))
        query = (
            sa.select(
                *(column for column in operations_table.c if column is not operations.body),
                sa.case((pending, operations.body)).label("body"),
            )
            .where(sa.or_(pending, is_open))
            .order_by(operations.position)
        )
        return [_entry(row) for row in await self._read(query)]

    async def put_run(self, run: TrainingRun, *, model: ModelInfo, seed: int) -> None:
        row = {
            "run_id": run.run_id,
            "description": wire.encode(run),
            "model": wire.encode(model),
            "seed": seed,
            "snapshot": 0,
        }
        again = runs_table.delete().where(runs_table.c.run_id == run.run_id)
        await self._write(lambda: [(again, ALWAYS), (runs_table.insert(), [row])])

    async def runs(self) -> Sequence[RunRecord]:
        records = []
        for row in await self._read(RECORD.order_by(runs_table.c.position)):
            try:
                records.append(_run_record(row))
            except StorageError as error:
                logger.error("left out: %s", error)
        return records

    async def run(self, run_id: str) -> RunRecord | None:
        rows = await self._read(RECORD.where(runs_table.c.run_id == run_id))
        return next((_run_record(row) for row in rows), None)

    async def executed(self, run_id: str, *, after: int) -> Sequence[Executed]:
        query = (
            sa.select(operations.number, operations.body, operations.error)
            .where(operations.run_id == run_id, operations.number > after)
            .order_by(operations.number)
        )
        rows = await self._read(query)
        return await to_thread.run_sync(lambda: [_executed(run_id, row) for row in rows])

    async def put_snapshot(self, run_id: str, number: int) -> None:
        snapshot = runs_table.update().where(runs_table.c.run_id == run_id).values(snapshot=number)
        held = sa.and_(operations.run_id == run_id, operations.number <= number)
        is_open = operations.session_id.in_(sa.select(sessions_table.c.session_id))
        body = operations_table.update().where(held, operations.body.is_not(None))
        await self._write(
            lambda: [
                (snapshot, ALWAYS),
                (operations_table.delete().where(held, sa.not_(is_open)), ALWAYS),
                (body.values(body=None), ALWAYS),
            ]
        )

    async def add_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        rows = [_metric_row(run_id, point) for point in points]
        if rows:
            await self._write(lambda: [(metrics_table.insert(), rows)])

    async def metrics(self, run_id: str, *, name: str | None = None) -> Sequence[MetricPoint]:
        query = sa.select(metrics_table).where(metrics_table.c.run_id == run_id)
        if name is not None:
            query = query.where(metrics_table.c.name == name)
        return [_point(row) for row in await self._read(query.order_by(metrics_table.c.position))]

    # --- the database ---------------------------------------------------------------------------

    async def _write(self, make: Callable[[], Statements]) -> None:
        """Durable when it returns. Who finds the database free commits what all others wait for."""
        write = _Write(make)
        self._writes.append(write)
        with CancelScope(shield=True):
            async with self._writing:
                if not write.done:
                    batch, self._writes = self._writes, []
                    await to_thread.run_sync(self._commit, batch)
        if write.error is not None:
            raise write.error

    def _commit(self, batch: Sequence[_Write]) -> None:
        made: list[tuple[_Write, Statements]] = []
        for write in batch:
            write.done = True
            try:
                made.append((write, write.make()))
            except WeaverError as error:
                write.error = error
        if not self._execute(made):
            for one in made:  # the fault of one is not that of the others
                self._execute([one])

    def _execute(self, writes: Sequence[tuple[_Write, Statements]]) -> bool:
        """All in one transaction; False if it failed, which each of them is told."""
        failure = None
        try:
            with self._database.begin() as connection:
                for _, statements in writes:
                    for statement, rows in statements:
                        if rows:
                            connection.execute(statement, rows)
        except sa.exc.SQLAlchemyError as error:
            failure = self._failure(error)
        for write, _ in writes:
            write.error = failure
        return failure is None

    async def _read(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        def read() -> Sequence[sa.Row[Any]]:
            with self._database.connect() as connection:
                return connection.execute(query).all()

        try:
            return await to_thread.run_sync(read)
        except sa.exc.SQLAlchemyError as error:
            raise self._failure(error) from error

    def _failure(self, error: sa.exc.SQLAlchemyError) -> WeaverError:
        cause = getattr(error, "orig", None) or error
        away = isinstance(error, sa.exc.OperationalError) or (
            isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        )
        if away and self._database.dialect.name != "sqlite":
            return ServiceConnectionError(
                f"the database cannot be reached: {cause}", hint="Try again when it is back."
            )
        return StorageError(
            f"the database failed: {cause}", hint="Check the free space and the permissions of it."
        )


# --- rows ---------------------------------------------------------------------------------------


def insert_operations(rows: list[dict[str, Any]]) -> Statement:
    return operations_table.insert(), rows


def describe_runs(runs: Sequence[TrainingRun]) -> Statement:
    return DESCRIBE, [{"of_run": run.run_id, "description": wire.encode(run)} for run in runs]


def executed_row(submission: Submission, settled: Settled) -> dict[str, Any]:
    """Of an operation that is written down after it was carried out; its outcome is not kept."""
    return _new_row(settled.session_id, submission) | {
        "cursor": settled.outcome.cursor,
        "number": settled.number,
        "error": error_code(settled),
    }


def error_code(settled: Settled) -> str | None:
    return settled.outcome.error.code if settled.outcome.error else None


def _new_row(session_id: str, submission: Submission) -> dict[str, Any]:
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


def _settled_row(settled: Settled) -> dict[str, Any]:
    outcome = settled.outcome
    return {
        "of_session": settled.session_id,
        "of_submission": outcome.submission_id,
        "cursor": outcome.cursor,
        "outcome": wire.encode(outcome),
        "number": settled.number,
        "error": error_code(settled),
        "lost_gradient": settled.lost_gradient,
    }


def _entry(row: sa.Row[Any]) -> Entry:
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


def _executed(run_id: str, row: sa.Row[Any]) -> Executed:
    where = f"operation {row.number} of {run_id}"
    submission = _decode(row.body, SUBMISSION, where)
    if submission.operation is None:
        raise _damaged(where, "it is withdrawn, but was executed")
    return Executed(number=row.number, operation=submission.operation, error=row.error)


def _run_record(row: sa.Row[Any]) -> RunRecord:
    return RunRecord(
        run=_decode(row.description, RUN, row.run_id),
        model=_decode(row.model, MODEL, row.run_id),
        seed=row.seed,
        snapshot=row.snapshot,
        executed=max(row.newest or 0, row.snapshot),
    )


def _metric_row(run_id: str, point: MetricPoint) -> dict[str, Any]:
    row = point.model_dump(mode="python")
    return row | {
        "run_id": run_id,
        "occurred_at": point.occurred_at and point.occurred_at.isoformat(),
    }


def _point(row: sa.Row[Any]) -> MetricPoint:
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
