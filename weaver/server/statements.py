"""The statements of the journal that are more than one line; used by `sql_store.py`."""

from __future__ import annotations

import sqlalchemy as sa

from weaver.server.tables import (
    metrics_table,
    operations_table,
    owners_table,
    runs_table,
    sessions_table,
)

operations = operations_table.c
OUTCOME_COLUMNS = ("cursor", "outcome", "number", "error", "lost_gradient")
IS_THAT = sa.and_(
    operations.session_id == sa.bindparam("of_session"),
    operations.submission_id == sa.bindparam("of_submission"),
)
SETTLE = (
    operations_table.update()
    .where(IS_THAT)
    .values(
        {name: sa.bindparam(name) for name in OUTCOME_COLUMNS}
        | {"body": sa.case((sa.bindparam("executed", type_=sa.Boolean), operations.body))}
    )
)
"""What was not executed is not replayed, so that its body goes."""
ACKNOWLEDGE = operations_table.update().where(IS_THAT).values(outcome=None)
FORGET_REPEATABLE = operations_table.delete().where(
    IS_THAT,
    sa.or_(*(operations.kind == one for one in ("sample", "open_sampler", "release_sampler"))),
)
"""What changes no run: it may be forgotten as soon as its client has the outcome."""
IS_ACKNOWLEDGED = sa.and_(operations.cursor.is_not(None), operations.outcome.is_(None))
IS_PASSED = sa.and_(
    IS_ACKNOWLEDGED,
    operations.number.is_(None),
    sa.not_(operations.lost_gradient),
    operations.run_id.is_not(None),
    operations.seq.is_not(None),
)
IS_OPEN = operations.session_id.in_(
    sa.select(sessions_table.c.session_id).where(sa.not_(sessions_table.c.closed))
)
FORGET = sessions_table.delete().where(
    sessions_table.c.closed,
    ~sa.exists().where(
        operations.session_id == sessions_table.c.session_id, operations.cursor.is_(None)
    ),
)
"""Closed sessions that wait for nothing."""
NEWEST = sa.select(sa.func.max(operations.number)).where(operations.run_id == runs_table.c.run_id)
RUN = "run/"
OWNER = sa.select(owners_table.c.project).where(
    owners_table.c.resource == sa.literal(RUN) + runs_table.c.run_id
)
UNSAVED = sa.select(sa.func.sum(sa.func.length(operations.body))).where(
    operations.run_id == runs_table.c.run_id, operations.number > runs_table.c.snapshot
)
RECORD = sa.select(
    runs_table,
    NEWEST.scalar_subquery().label("newest"),
    UNSAVED.scalar_subquery().label("unsaved_bytes"),
    OWNER.scalar_subquery().label("project"),
)
DESCRIBE = (
    runs_table.update()
    .where(runs_table.c.run_id == sa.bindparam("of_run"))
    .values(description=sa.bindparam("description"))
)


def forget_up_to(run_id: str, number: int) -> list[sa.Executable]:
    """Deletes what a snapshot holds, but for what tells order and resends of open sessions.

    That is the last executed operation of each kind and session, and whatever lost a gradient. What
    was refused before the last step in its session goes with it: neither its place nor its cursor
    is the last, and no batch lacks it.
    """
    held = sa.and_(operations.run_id == run_id, operations.number <= number)
    newest = (
        sa.select(sa.func.max(operations.number))
        .where(held)
        .group_by(operations.session_id, operations.kind)
    )
    needed = sa.or_(operations.lost_gradient, operations.number.in_(newest))
    last = (
        sa.select(
            operations.session_id,
            sa.func.max(operations.seq).label("seq"),
            sa.func.max(operations.cursor).label("cursor"),
        )
        .where(
            operations.run_id == run_id,
            operations.number.in_(newest),
            operations.kind.in_(("optim_step", "load_checkpoint")),
        )
        .group_by(operations.session_id)
        .subquery()
    )
    passed = sa.exists().where(
        last.c.session_id == operations.session_id,
        last.c.seq > operations.seq,
        last.c.cursor > operations.cursor,
    )
    return [
        operations_table.delete().where(held, sa.not_(IS_OPEN)),
        operations_table.delete().where(held, IS_ACKNOWLEDGED, sa.not_(needed)),
        operations_table.delete().where(operations.run_id == run_id, IS_PASSED, passed),
        operations_table.update().where(held, operations.body.is_not(None)).values(body=None),
    ]


def metric_counts(run_id: str) -> sa.Select[tuple[str, int]]:
    """How many points a run has of each name."""
    name = metrics_table.c.name
    mine = metrics_table.c.run_id == run_id
    return sa.select(name, sa.func.count().label("points")).where(mine).group_by(name)
