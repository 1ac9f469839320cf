"""`Journal`: where a service writes down what must outlive a crash.

`LocalService` journals a request before it acknowledges it and an outcome before it shows it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import sqlalchemy as sa
from anyio import to_thread

from weaver import wire
from weaver.errors import ConflictError, StorageError, WeaverError
from weaver.names import check_run_name, numbered
from weaver.protocol import ForwardBackward, LoadCheckpoint, OptimStep
from weaver.server import records, tables
from weaver.server.database import ONCE, Writer, in_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weaver.protocol import Operation, Submission
    from weaver.server.database import Rows, Statements
    from weaver.server.records import Settled
    from weaver.types import MetricPoint, ModelInfo, TrainingRun

logger = logging.getLogger(__name__)
Keeps = Literal["nothing", "runs", "everything"]
ACKNOWLEDGED = 64
"""So many outcomes that their clients have are forgotten together."""
RESEND_S = 86_400.0
"""So long a request that was carried out is known by its key."""


class Journal:
    """On a database that `open_database` opened, and that whoever opened it disposes of.

    With `keeps="runs"` it is that of an engine in a user's own process, whose client dies with it:
    a run is written down whenever an optimizer step (or a load) ends, with the gradients that went
    into it, in one commit. So nothing is written for samples or unfinished batches, and a run comes
    back in another process as it stood after its last step.

    Raises:
        StorageError: from any method that asks the database, if it failed.
        ServiceConnectionError: likewise, while it is out of reach.

    Args:
        database: without one, the journal is in memory, and keeps nothing.
        keeps: what outlives this process; of `everything`, clients do, so that their sessions must.
    """

    def __init__(self, database: sa.Engine | None = None, *, keeps: Keeps = "everything") -> None:
        self.keeps: Keeps = keeps if database else "nothing"
        self.writer = Writer(database or in_memory())
        self._acknowledged: Rows = []
        self._last: dict[str, dict[str, Any]] = {}
        """By session, the last that was acknowledged, which keeps the session's cursor."""
        self._submissions: dict[tuple[str, str], Submission] = {}
        """Where only runs are kept: what changes them and is pending, by its session and id."""
        self._batches: defaultdict[str, list[tuple[Submission, Settled]]] = defaultdict(list)
        """Likewise, by run: what was carried out since its last step."""

    # --- sessions -------------------------------------------------------------------------------

    async def open_session(self, session: records.SessionRecord) -> None:
        if self.keeps == "everything":
            await self.writer.change(tables.sessions.insert().values(session.row()))

    async def close_session(self, session_id: str) -> None:
        """Forgets it, but for what is pending and what its runs still need."""
        if self.keeps == "everything":
            columns = tables.operations.c
            unneeded = tables.operations.delete().where(
                columns.session_id == session_id,
                columns.cursor.is_not(None),
                sa.or_(columns.number.is_(None), columns.body.is_(None)),
            )
            closed = tables.sessions.update().where(tables.sessions.c.session_id == session_id)
            names = tables.names.delete().where(tables.names.c.session_id == session_id)
            await self.writer.change(closed.values(closed=True), unneeded, names, tables.FORGET)

    async def name(self, session_id: str, name: str, value: str) -> None:
        """Writes down a name that is new to the session."""
        if self.keeps == "everything":
            row = {"session_id": session_id, "name": name, "value": value}
            await self.writer.write(lambda: [(tables.names.insert(), [row])])

    async def names(self) -> Sequence[tuple[str, str, str]]:
        """Session, name and value of all."""
        rows = await self.writer.read(sa.select(tables.names))
        return [(row.session_id, row.name, row.value) for row in rows]

    async def sessions(self) -> Sequence[records.SessionRecord]:
        """The open ones, and those with pending work."""
        rows = await self.writer.read(sa.select(tables.sessions))
        return [records.SessionRecord.of(row) for row in rows]

    # --- operations -----------------------------------------------------------------------------

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        """Writes all of them down, or none. Their ids are new to the session."""
        if self.keeps == "runs":
            mine = {(session_id, one.id): one for one in submissions if _changes(one.operation)}
            self._submissions |= mine
        elif self.keeps == "everything":

            def make() -> Statements:
                rows = [records.submission_row(session_id, one) for one in submissions]
                return [(tables.operations.insert(), rows)]

            await self.writer.write(make, size_bytes=wire.about_bytes(submissions))

    async def settle(self, settled: Sequence[Settled], *, runs: Sequence[TrainingRun] = ()) -> None:
        """Writes down what became of submissions, once each, and of their runs: all or nothing."""
        if self.keeps == "runs":
            await self._settle_steps(settled, runs)
        elif self.keeps == "everything":
            await self.writer.write(
                lambda: [
                    (tables.SETTLE, [one.row() for one in settled]),
                    _described(runs),
                    *self._forgotten(),
                    (tables.answers.insert(), [asdict(s.answer) for s in settled if s.answer]),
                ],
                size_bytes=sum(one.size_bytes for one in settled),
            )

    async def _settle_steps(self, settled: Sequence[Settled], runs: Sequence[TrainingRun]) -> None:
        ended: list[str] = []
        for one in settled:
            submission = self._submissions.pop((one.session_id, one.outcome.submission_id), None)
            if submission is None or submission.run_id is None or one.number is None:
                continue
            self._batches[submission.run_id].append((submission, one))
            if not isinstance(submission.operation, ForwardBackward):
                ended.append(submission.run_id)
        if not ended:
            return
        written = [pair for run_id in ended for pair in self._batches[run_id]]

        def make() -> Statements:
            rows = [
                records.submission_row(one.session_id, submission)
                | {"cursor": one.outcome.cursor, "number": one.number, "error": one.error}
                for submission, one in written
            ]
            return [(tables.operations.insert(), rows), _described(runs)]

        try:
            await self.writer.write(make)
        except WeaverError:
            for run_id in ended:  # that step did not happen, its gradients did; it may come again
                submission, one = self._batches[run_id].pop()
                self._submissions[one.session_id, submission.id] = submission
            raise
        for run_id in ended:
            del self._batches[run_id]

    def acknowledge(self, session_id: str, submission_ids: Sequence[str]) -> None:
        """Their clients have these outcomes, which may be forgotten with the next write."""
        if self.keeps == "everything":
            self._acknowledged += [
                {"of_session": session_id, "of_submission": one} for one in submission_ids
            ]

    def _forgotten(self) -> Statements:
        """Takes what was acknowledged, once it is enough."""
        if len(self._acknowledged) < ACKNOWLEDGED:
            return []
        seen, self._acknowledged = self._acknowledged, []
        before, last = self._last, {one["of_session"]: one for one in seen}
        unneeded = [one for one in seen if one is not last[one["of_session"]]]
        unneeded += [before[session_id] for session_id in last if session_id in before]
        self._last = before | last
        return [(tables.ACKNOWLEDGE, seen), (tables.FORGET_REPEATABLE, unneeded)]

    async def entries(self) -> Sequence[records.Entry]:
        """What is pending, and what open sessions still need, in the order of `append`.

        A sample whose client has its outcome is forgotten, and so is what a snapshot holds, but for
        the last of each kind. What `passed` tells of is left out.
        """
        return [records.Entry.of(row) for row in await self.writer.read(tables.ENTRIES)]

    async def passed(self) -> Sequence[records.Passed]:
        """What open sessions' runs pass over, without having lost a gradient."""
        return [records.Passed(**row._mapping) for row in await self.writer.read(tables.PASSED)]

    # --- runs -----------------------------------------------------------------------------------

    async def put_run(self, run: TrainingRun, *, model: ModelInfo, seed: int) -> str | None:
        """Writes down a run at its beginning; answers the name that it has in its project."""
        id, project = run.run_id, run.project
        mine = [one.delete().where(one.c.run_id == id) for one in (tables.runs, tables.owners)]
        row = tables.runs.insert().values(
            run_id=id,
            description=wire.encode(run),
            model=wire.encode(model),
            seed=seed,
            snapshot=0,
            project=project,
        )
        owner = tables.owners.insert().values(run_id=id, project=project)
        return await self._named(run, run.name, lambda name: [*mine, row.values(name=name), owner])

    async def rename_run(self, run: TrainingRun, name: str) -> str | None:
        """Answers the name that it has from now on.

        Raises:
            InvalidNameError
        """
        row = tables.runs.update().where(tables.runs.c.run_id == run.run_id)
        return await self._named(run, check_run_name(name), lambda name: [row.values(name=name)])

    async def _named(
        self, run: TrainingRun, name: str | None, make: Callable[[str | None], list[sa.Executable]]
    ) -> str | None:
        """Writes a run under a name that no other one of its project has, and answers it.

        Two that ask for one name at the same time are told apart by the database, in which it is
        unique, so that one of them looks again.
        """
        known, found = tables.runs.c, None
        others = sa.and_(known.project == run.project, known.run_id != run.run_id)
        while True:
            if name is not None:
                alike = known.name.startswith(name[: -len("-9999")] or name, autoescape=True)
                query = sa.select(known.name).where(others, alike)
                taken = {row.name for row in await self.writer.read(query)}
                free = (one for n in count(1) if (one := numbered(name, n)) not in taken)
                before, found = found, next(free)
            try:
                await self.writer.change(*make(found))
                return found
            except ConflictError:
                if found == before:
                    raise

    async def delete_run(self, run_id: str) -> None:
        """Forgets a run, its metrics and what it has carried out; not outcomes still to be told."""
        mine = tables.operations.c.run_id == run_id
        settled = sa.and_(mine, tables.operations.c.cursor.is_not(None))
        await self.writer.change(
            *(
                table.delete().where(table.c.run_id == run_id)
                for table in (tables.runs, tables.metrics, tables.answers)
            ),
            tables.operations.delete().where(mine, sa.not_(tables.IS_OPEN)),
            tables.operations.update().where(settled).values(body=None),
        )

    async def runs(self) -> Sequence[records.RunRecord]:
        """In the order in which they were put."""
        found = []
        for row in await self.writer.read(tables.RECORD.order_by(tables.runs.c.position)):
            try:
                found.append(records.RunRecord.of(row))
            except StorageError as error:
                logger.error("left out: %s", error)
        return found

    async def run(self, run_id: str) -> records.RunRecord | None:
        rows = await self.writer.read(tables.RECORD.where(tables.runs.c.run_id == run_id))
        return next(map(records.RunRecord.of, rows), None)

    async def put_owner(self, run_id: str, project: str) -> None:
        """Whose checkpoints are that no run has written."""
        await self.writer.change(
            tables.owners.delete().where(tables.owners.c.run_id == run_id),
            tables.owners.insert().values(run_id=run_id, project=project),
        )

    async def owners(self) -> Mapping[str, str]:
        """The project of each run, of deleted ones too: their checkpoints may remain."""
        rows = await self.writer.read(sa.select(tables.owners))
        return {row.run_id: row.project for row in rows}

    async def executed(self, run_id: str, *, after: int) -> Sequence[records.Executed]:
        """What a run has carried out since its snapshot, in that order.

        Raises:
            StorageError: an entry is damaged.
        """
        columns = tables.operations.c
        query = (
            sa.select(columns.run_id, columns.number, columns.body, columns.error)
            .where(columns.run_id == run_id, columns.number > after)
            .order_by(columns.number)
        )
        rows = await self.writer.read(query)
        written = await to_thread.run_sync(lambda: [records.Executed.of(row) for row in rows])
        unwritten = [
            records.Executed(number=one.number, operation=submission.operation, error=one.error)
            for submission, one in self._batches.get(run_id, [])
            if submission.operation is not None and one.number is not None
        ]
        return [*written, *unwritten]

    async def put_snapshot(self, run_id: str, number: int) -> None:
        """A snapshot holds all up to `number`, which is not needed any more.

        Outlives a loss of power when it returns: former snapshots may then be deleted.
        """
        await self.writer.change(*tables.snapshotted(run_id, number), flush=True)

    # --- curves ---------------------------------------------------------------------------------

    async def answers(self, run_id: str) -> Sequence[records.Answer]:
        """Those of what was settled, in that order; none where clients do not outlive them."""
        fields = (column for name, column in tables.answers.c.items() if name != "position")
        query = sa.select(*fields).where(tables.answers.c.run_id == run_id)
        rows = await self.writer.read(query.order_by(tables.answers.c.position))
        return [records.Answer(**row._mapping) for row in rows]

    async def add_metrics(
        self, run_id: str, points: Sequence[MetricPoint], *, key: str | None = None
    ) -> None:
        """Keeps the request with them; nothing, if it is known."""
        if not points or (key is not None and await self.knows_request(key)):
            return
        rows = [records.metric_row(run_id, point) for point in points]
        kept = [] if key is None else _kept(key)
        await self.writer.write(lambda: [(tables.metrics.insert(), rows), *kept])

    async def rewind_metrics(self, run_id: str, *, logged: int, computed: int) -> None:
        """Forgets what was logged for steps behind `logged`, and answered behind `computed`."""
        await self.writer.change(
            *(
                table.delete().where(table.c.run_id == run_id, table.c.step > last)
                for table, last in ((tables.metrics, logged), (tables.answers, computed))
            )
        )

    async def metric_counts(self, run_id: str) -> Mapping[str, int]:
        """How many there are of each name."""
        name, mine = tables.metrics.c.name, tables.metrics.c.run_id == run_id
        query = sa.select(name, sa.func.count().label("points")).where(mine).group_by(name)
        return {row.name: row.points for row in await self.writer.read(query)}

    async def metrics(
        self, run_id: str, *, name: str | None = None, offset: int = 0, limit: int | None = None
    ) -> Sequence[MetricPoint]:
        """In the order in which they were added."""
        query = sa.select(tables.metrics).where(tables.metrics.c.run_id == run_id)
        if name is not None:
            query = query.where(tables.metrics.c.name == name)
        part = query.order_by(tables.metrics.c.position).offset(offset).limit(limit)
        rows = await self.writer.read(part)
        return await to_thread.run_sync(lambda: [records.point_of(row) for row in rows])

    async def last_metrics(self, run_id: str, most: int) -> Sequence[MetricPoint]:
        """The `most` that were added last, in that order."""
        total = sum((await self.metric_counts(run_id)).values())
        return await self.metrics(run_id, offset=max(0, total - most), limit=most)

    # --- requests -------------------------------------------------------------------------------

    async def knows_request(self, key: str) -> bool:
        """Whether it was kept within the last day, by any process."""
        query = sa.select(tables.requests).where(tables.requests.c.key == key)
        return bool(await self.writer.read(query))

    async def keep_request(self, key: str) -> None:
        await self.writer.write(lambda: _kept(key))

    async def drop_request(self, key: str) -> None:
        await self.writer.change(tables.requests.delete().where(tables.requests.c.key == key))


def _kept(key: str) -> Statements:
    now = time.time()
    old = tables.requests.delete().where(tables.requests.c.at < now - RESEND_S)
    return [(old, ONCE), (tables.requests.insert(), [{"key": key, "at": now}])]


def _described(runs: Sequence[TrainingRun]) -> tuple[sa.Executable, Rows]:
    rows = [{"of_run": run.run_id, "description": wire.encode(run)} for run in runs]
    return tables.DESCRIBE, rows


def _changes(operation: Operation | None) -> bool:
    """Whether it changes a run, so that it has to be replayed."""
    gradient = isinstance(operation, ForwardBackward) and operation.backward
    return gradient or isinstance(operation, (OptimStep, LoadCheckpoint))
