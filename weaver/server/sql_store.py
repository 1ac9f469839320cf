"""`SqlStore`: the `Store` in a database; opened by `weaver serve`.

Writes that wait for each other are committed together, one transaction at a time, in a worker
thread unless they are small and SQLite is free to take them at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import sqlalchemy as sa
from anyio import CancelScope, to_thread

from weaver import wire
from weaver.errors import ServiceConnectionError, StorageError, WeaverError
from weaver.server import statements as sql
from weaver.server.database import Writer, transaction
from weaver.server.rows import (
    entry_of,
    executed_of,
    metric_row,
    new_row,
    point_of,
    run_record_of,
    session_of,
    session_row,
    settled_row,
)
from weaver.server.store import Answer, Passed
from weaver.server.tables import (
    answers_table,
    metrics_table,
    operations_table,
    owners_table,
    requests_table,
    runs_table,
    sessions_table,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weaver.protocol import Submission
    from weaver.server.store import Entry, Executed, Keeps, RunRecord, SessionRecord, Settled
    from weaver.types import MetricPoint, ModelInfo, TrainingRun

logger = logging.getLogger(__name__)
T = TypeVar("T")
ALWAYS: list[dict[str, Any]] = [{}]
"""The rows of a statement that has no parameters; a statement without rows is left out."""
Statement = tuple[sa.Executable, list[dict[str, Any]]]
Statements = list[Statement]
operations = operations_table.c
ACKNOWLEDGED = 64
"""So many outcomes that their clients have are forgotten together."""
RESEND_S = 86_400.0
"""So long a request that was carried out is known by its key."""
NOT_WRITTEN = StorageError("the database was not written, through a defect.")


@dataclass(slots=True, eq=False)
class _Write:
    """A change on its way into the database."""

    make: Callable[[], Statements]
    """Called in the thread that commits; it answers the same when it is called again."""
    size_bytes: int
    """About; little for a file is there before a thread has begun."""
    flush: bool
    done: bool = False
    error: WeaverError | None = NOT_WRITTEN
    """None once it is in the database."""


class SqlStore:
    """On a database that `open_database` opened; whoever opened it disposes of it."""

    keeps: Keeps = "everything"

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self.writer = Writer(database)
        self._writes: list[_Write] = []
        self._writing = anyio.Lock()
        self._acknowledged: list[dict[str, Any]] = []
        self._last: dict[str, dict[str, Any]] = {}
        """Of each session the last that was acknowledged, which keeps the session's cursor."""

    async def open_session(self, session: SessionRecord) -> None:
        def make() -> Statements:
            return [(sessions_table.insert(), [session_row(session)])]

        await self._write(make)

    async def close_session(self, session_id: str) -> None:
        unneeded = operations_table.delete().where(
            operations.session_id == session_id,
            operations.cursor.is_not(None),
            sa.or_(operations.number.is_(None), operations.body.is_(None)),
        )
        closed = sessions_table.update().where(sessions_table.c.session_id == session_id)
        await self._write(
            lambda: [(closed.values(closed=True), ALWAYS), (unneeded, ALWAYS), (sql.FORGET, ALWAYS)]
        )

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        def make() -> Statements:
            return [insert_operations([new_row(session_id, one) for one in submissions])]

        await self._write(make, size_bytes=wire.about_bytes(submissions))

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        def make() -> Statements:
            seen: list[dict[str, Any]] = []
            unneeded: list[dict[str, Any]] = []
            if len(self._acknowledged) >= ACKNOWLEDGED:
                seen, self._acknowledged = self._acknowledged, []
                before, last = self._last, {one["of_session"]: one for one in seen}
                unneeded = [one for one in seen if one is not last[one["of_session"]]]
                unneeded += [before[session_id] for session_id in last if session_id in before]
                self._last = before | last
            return [
                (sql.SETTLE, [settled_row(one) for one in settled]),
                describe_runs(runs),
                (sql.ACKNOWLEDGE, seen),
                (sql.FORGET_REPEATABLE, unneeded),
                (answers_table.insert(), [asdict(one.answer) for one in settled if one.answer]),
            ]

        await self._write(make, size_bytes=sum(wire.about_bytes(one.outcome) for one in settled))

    def acknowledge(self, session_id: str, submission_ids: Sequence[str]) -> None:
        self._acknowledged += [
            {"of_session": session_id, "of_submission": submission_id}
            for submission_id in submission_ids
        ]

    async def sessions(self) -> Sequence[SessionRecord]:
        return [session_of(row) for row in await self._read(sa.select(sessions_table))]

    async def entries(self) -> Sequence[Entry]:
        pending = operations.cursor.is_(None)
        query = (
            sa.select(
                *(column for column in operations_table.c if column is not operations.body),
                sa.case((pending, operations.body)).label("body"),
            )
            .where(sa.or_(pending, sa.and_(sql.IS_OPEN, sa.not_(sql.IS_PASSED))))
            .order_by(operations.position)
        )
        return [entry_of(row) for row in await self._read(query)]

    async def passed(self) -> Sequence[Passed]:
        place = operations.session_id, operations.run_id
        count = sa.func.row_number().over(partition_by=place, order_by=operations.seq)
        islands = (
            sa.select(
                *place, operations.seq, operations.cursor, (operations.seq - count).label("island")
            )
            .where(sql.IS_PASSED, sql.IS_OPEN)
            .subquery()
        )
        found = islands.c
        query = sa.select(
            found.session_id,
            found.run_id,
            sa.func.min(found.seq).label("first"),
            sa.func.max(found.seq).label("last"),
            sa.func.max(found.cursor).label("cursor"),
        ).group_by(found.session_id, found.run_id, found.island)
        return [Passed(**row._mapping) for row in await self._read(query)]

    async def put_run(self, run: TrainingRun, *, model: ModelInfo, seed: int) -> None:
        row = {
            "run_id": run.run_id,
            "description": wire.encode(run),
            "model": wire.encode(model),
            "seed": seed,
            "snapshot": 0,
        }
        owner = {"resource": sql.RUN + run.run_id, "project": run.project}
        again = runs_table.delete().where(runs_table.c.run_id == run.run_id)
        owned = owners_table.delete().where(owners_table.c.resource == owner["resource"])
        await self._write(
            lambda: [
                (again, ALWAYS),
                (owned, ALWAYS),
                (runs_table.insert(), [row]),
                (owners_table.insert(), [owner]),
            ]
        )

    async def delete_run(self, run_id: str) -> None:
        mine = operations.run_id == run_id
        settled = sa.and_(mine, operations.cursor.is_not(None))
        await self._write(
            lambda: [
                (runs_table.delete().where(runs_table.c.run_id == run_id), ALWAYS),
                (metrics_table.delete().where(metrics_table.c.run_id == run_id), ALWAYS),
                (answers_table.delete().where(answers_table.c.run_id == run_id), ALWAYS),
                (operations_table.delete().where(mine, sa.not_(sql.IS_OPEN)), ALWAYS),
                (operations_table.update().where(settled).values(body=None), ALWAYS),
            ]
        )

    async def runs(self) -> Sequence[RunRecord]:
        records = []
        for row in await self._read(sql.RECORD.order_by(runs_table.c.position)):
            try:
                records.append(run_record_of(row))
            except StorageError as error:
                logger.error("left out: %s", error)
        return records

    async def run(self, run_id: str) -> RunRecord | None:
        rows = await self._read(sql.RECORD.where(runs_table.c.run_id == run_id))
        return next((run_record_of(row) for row in rows), None)

    async def owners(self) -> Mapping[str, str]:
        rows = await self._read(sa.select(owners_table))
        return {row.resource.removeprefix(sql.RUN): row.project for row in rows}

    async def executed(self, run_id: str, *, after: int) -> Sequence[Executed]:
        query = (
            sa.select(operations.number, operations.body, operations.error)
            .where(operations.run_id == run_id, operations.number > after)
            .order_by(operations.number)
        )
        rows = await self._read(query)
        return await to_thread.run_sync(lambda: [executed_of(run_id, row) for row in rows])

    async def put_snapshot(self, run_id: str, number: int) -> None:
        snapshot = runs_table.update().where(runs_table.c.run_id == run_id).values(snapshot=number)
        await self._write(
            lambda: [
                (snapshot, ALWAYS),
                *((statement, ALWAYS) for statement in sql.forget_up_to(run_id, number)),
            ],
            flush=True,
        )

    async def answers(self, run_id: str) -> Sequence[Answer]:
        fields = (column for name, column in answers_table.c.items() if name != "position")
        query = sa.select(*fields).where(answers_table.c.run_id == run_id)
        rows = await self._read(query.order_by(answers_table.c.position))
        return [Answer(**row._mapping) for row in rows]

    async def knows_request(self, key: str) -> bool:
        return bool(await self._read(sa.select(requests_table).where(requests_table.c.key == key)))

    async def keep_request(self, key: str) -> None:
        await self._write(lambda: _kept(key))

    async def drop_request(self, key: str) -> None:
        this = requests_table.delete().where(requests_table.c.key == key)
        await self._write(lambda: [(this, ALWAYS)])

    async def add_metrics(
        self, run_id: str, points: Sequence[MetricPoint], *, key: str | None = None
    ) -> None:
        if not points or (key is not None and await self.knows_request(key)):
            return
        rows = [metric_row(run_id, point) for point in points]
        kept = [] if key is None else _kept(key)
        await self._write(lambda: [(metrics_table.insert(), rows), *kept])

    async def metrics(
        self, run_id: str, *, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> Sequence[MetricPoint]:
        query = sa.select(metrics_table).where(metrics_table.c.run_id == run_id)
        if name is not None:
            query = query.where(metrics_table.c.name == name)
        part = query.order_by(metrics_table.c.position).offset(offset).limit(limit)
        rows = await self._read(part)
        return await to_thread.run_sync(lambda: [point_of(row) for row in rows])

    async def metric_counts(self, run_id: str) -> Mapping[str, int]:
        return {row.name: row.points for row in await self._read(sql.metric_counts(run_id))}

    # --- the database ---------------------------------------------------------------------------

    async def _write(
        self,
        make: Callable[[], Statements],
        *,
        size_bytes: int = wire.LARGE_BYTES + 1,
        flush: bool = False,
    ) -> None:
        """Durable when it returns. Who finds the database free commits what all others wait for."""
        write = _Write(cache(make), size_bytes=size_bytes, flush=flush)
        self._writes.append(write)
        with CancelScope(shield=True):
            async with self._writing:
                if not write.done:
                    batch, self._writes = self._writes, []
                    small = sum(waiting.size_bytes for waiting in batch) <= wire.LARGE_BYTES
                    quick = small and self._database.dialect.name == "sqlite"
                    if not quick or self._execute(batch, at_once=True) is not None:
                        await to_thread.run_sync(self._commit, batch)
        if write.error is not None:
            raise write.error

    def _commit(self, batch: Sequence[_Write]) -> None:
        failure = self._execute(batch)
        if failure is not None and not isinstance(failure, ServiceConnectionError):
            for write in batch:  # the fault of one is not that of the others
                self._execute([write])

    def _execute(self, writes: Sequence[_Write], *, at_once: bool = False) -> WeaverError | None:
        """All in one transaction; answers why it failed, which each of them is told."""
        failure = None
        try:
            made = [statement for write in writes for statement in write.make()]
            flush = any(write.flush for write in writes)
            with transaction(self.writer, at_once=at_once, flush=flush) as connection:
                for statement, rows in made:
                    if rows:
                        connection.execute(statement, rows)
        except WeaverError as error:
            failure = error
        for write in writes:
            write.done, write.error = True, failure
        return failure

    async def _read(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        def read() -> Sequence[sa.Row[Any]]:
            with transaction(self._database) as connection:
                return connection.execute(query).all()

        return await to_thread.run_sync(read)


def _kept(key: str) -> Statements:
    now = time.time()
    old = requests_table.delete().where(requests_table.c.at < now - RESEND_S)
    return [(old, ALWAYS), (requests_table.insert(), [{"key": key, "at": now}])]


def insert_operations(rows: list[dict[str, Any]]) -> Statement:
    return operations_table.insert(), rows


def describe_runs(runs: Sequence[TrainingRun]) -> Statement:
    return sql.DESCRIBE, [{"of_run": run.run_id, "description": wire.encode(run)} for run in runs]
