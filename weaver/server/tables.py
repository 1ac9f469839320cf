"""The tables of the database, and the larger statements on them; of the journal and of `Keys`.

Arrays and values are kept as messages of `weaver.wire`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Sequence

metadata = sa.MetaData()
IDENTITY = sa.BigInteger().with_variant(sa.Integer, "sqlite")

schema = sa.Table("schema", metadata, sa.Column("version", sa.Integer, primary_key=True))
"""One row: which version of these tables the database has."""

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("project", sa.String(64), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("admin", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("revoked_at", sa.DateTime(timezone=True)),
)

owners = sa.Table(
    "owners",
    metadata,
    sa.Column("run_id", sa.String(128), primary_key=True),
    sa.Column("project", sa.String(64), nullable=False, index=True),
)
"""The project of each run, of deleted ones too."""

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, unique=True),
    sa.Column("description", sa.LargeBinary, nullable=False),
    sa.Column("model", sa.LargeBinary, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("snapshot", sa.BigInteger, nullable=False),
    sa.Column("project", sa.String(64)),
    sa.Column("name", sa.String(128)),
    sa.Index("runs_by_name", "project", "name", unique=True),
)
"""`snapshot` is the number of the last operation that the run's snapshot holds; `name` counts, not
that in the description."""

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("session_id", sa.String(64), primary_key=True),
    sa.Column("project", sa.String(64), nullable=False),
    sa.Column("admin", sa.Boolean, nullable=False),
    sa.Column("local", sa.Boolean, nullable=False),
    sa.Column("lasting", sa.Boolean, nullable=False),
    sa.Column("closed", sa.Boolean, nullable=False),
    sa.Column("user_metadata", sa.LargeBinary),
)
"""The open ones, and closed ones with pending work; with their callers' rights."""

names = sa.Table(
    "names",
    metadata,
    sa.Column("session_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
"""What clients of a wire format call things of their session by."""

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("session_id", sa.String(64), nullable=False),
    sa.Column("submission_id", sa.String, nullable=False),
    sa.Column("run_id", sa.String),
    sa.Column("seq", sa.BigInteger),
    sa.Column("kind", sa.String(32)),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary),
    sa.Column("cursor", sa.BigInteger),
    sa.Column("outcome", sa.LargeBinary),
    sa.Column("number", sa.BigInteger),
    sa.Column("error", sa.String(64)),
    sa.Column("lost_gradient", sa.Boolean, nullable=False),
    sa.UniqueConstraint("session_id", "submission_id"),
    sa.Index("operations_of_runs", "run_id", "number"),
)
"""`cursor` is set once there is an outcome, which goes when its client
has it; `number` counts what a run has executed, and `body` goes when a snapshot holds it. What was
refused or cancelled has no number."""

answers = sa.Table(
    "answers",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, index=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
)
"""The numbers that a run's operations answered, for its curves."""

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)
"""Keys of requests, beside operations, that have changed something or are about to;
with seconds since 1970."""

metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("step", sa.BigInteger),
    sa.Column("occurred_at", sa.String(40)),
)

columns = operations.c
OUTCOME_COLUMNS = ("cursor", "outcome", "number", "error", "lost_gradient")
IS_THAT = sa.and_(
    columns.session_id == sa.bindparam("of_session"),
    columns.submission_id == sa.bindparam("of_submission"),
)
SETTLE = (
    operations.update()
    .where(IS_THAT)
    .values(
        {name: sa.bindparam(name) for name in OUTCOME_COLUMNS}
        | {"body": sa.case((sa.bindparam("executed", type_=sa.Boolean), columns.body))}
    )
)
"""What was not executed is not replayed, so that its body goes."""
ACKNOWLEDGE = operations.update().where(IS_THAT).values(outcome=None)
FORGET_REPEATABLE = operations.delete().where(
    IS_THAT,
    sa.or_(*(columns.kind == one for one in ("sample", "open_sampler", "release_sampler"))),
)
"""What changes no run: it may be forgotten as soon as its client has the outcome."""
IS_ACKNOWLEDGED = sa.and_(columns.cursor.is_not(None), columns.outcome.is_(None))
IS_PASSED = sa.and_(
    IS_ACKNOWLEDGED,
    columns.number.is_(None),
    sa.not_(columns.lost_gradient),
    columns.run_id.is_not(None),
    columns.seq.is_not(None),
)
IS_OPEN = columns.session_id.in_(sa.select(sessions.c.session_id).where(sa.not_(sessions.c.closed)))
FORGET = sessions.delete().where(
    sessions.c.closed,
    ~sa.exists().where(columns.session_id == sessions.c.session_id, columns.cursor.is_(None)),
)
"""Closed sessions that wait for nothing."""
PENDING = columns.cursor.is_(None)
ENTRIES = (
    sa.select(
        *(column for column in columns if column is not columns.body),
        sa.case((PENDING, columns.body)).label("body"),
    )
    .where(sa.or_(PENDING, sa.and_(IS_OPEN, sa.not_(IS_PASSED))))
    .order_by(columns.position)
)
PLACE = columns.session_id, columns.run_id
IN_TURN = sa.func.row_number().over(partition_by=PLACE, order_by=columns.seq)
ISLANDS = (
    sa.select(*PLACE, columns.seq, columns.cursor, (columns.seq - IN_TURN).label("island"))
    .where(IS_PASSED, IS_OPEN)
    .subquery()
    .c
)
"""What is passed over; of each island without a gap, it is the same number."""
PASSED = sa.select(
    ISLANDS.session_id,
    ISLANDS.run_id,
    sa.func.min(ISLANDS.seq).label("first"),
    sa.func.max(ISLANDS.seq).label("last"),
    sa.func.max(ISLANDS.cursor).label("cursor"),
).group_by(ISLANDS.session_id, ISLANDS.run_id, ISLANDS.island)
NEWEST = sa.select(sa.func.max(columns.number)).where(columns.run_id == runs.c.run_id)
UNSAVED = sa.select(sa.func.sum(sa.func.length(columns.body))).where(
    columns.run_id == runs.c.run_id, columns.number > runs.c.snapshot
)
RECORD = sa.select(
    runs,
    NEWEST.scalar_subquery().label("newest"),
    UNSAVED.scalar_subquery().label("unsaved_bytes"),
)
DESCRIBE = (
    runs.update()
    .where(runs.c.run_id == sa.bindparam("of_run"))
    .values(description=sa.bindparam("description"))
)


def snapshotted(run_id: str, number: int) -> list[sa.Executable]:
    """Notes a snapshot and deletes what it holds, but for order and resends of open sessions.

    That is the last executed operation of each kind and session, and whatever lost a gradient. What
    was refused before the last step in its session goes with it: neither its place nor its cursor
    is the last, and no batch lacks it.
    """
    held = sa.and_(columns.run_id == run_id, columns.number <= number)
    newest = (
        sa.select(sa.func.max(columns.number))
        .where(held)
        .group_by(columns.session_id, columns.kind)
    )
    needed = sa.or_(columns.lost_gradient, columns.number.in_(newest))
    last = (
        sa.select(
            columns.session_id,
            sa.func.max(columns.seq).label("seq"),
            sa.func.max(columns.cursor).label("cursor"),
        )
        .where(
            columns.run_id == run_id,
            columns.number.in_(newest),
            columns.kind.in_(("optim_step", "load_checkpoint")),
        )
        .group_by(columns.session_id)
        .subquery()
    )
    passed = sa.exists().where(
        last.c.session_id == columns.session_id,
        last.c.seq > columns.seq,
        last.c.cursor > columns.cursor,
    )
    return [
        runs.update().where(runs.c.run_id == run_id).values(snapshot=number),
        operations.delete().where(held, sa.not_(IS_OPEN)),
        operations.delete().where(held, IS_ACKNOWLEDGED, sa.not_(needed)),
        operations.delete().where(columns.run_id == run_id, IS_PASSED, passed),
        operations.update().where(held, columns.body.is_not(None)).values(body=None),
    ]


def newest(
    numbers: sa.Table, run_ids: Sequence[str], which: sa.ColumnElement[bool], *, by: str
) -> sa.Select[Any]:
    """Of `metrics` or `answers` the last row of each run and value of the column `by`, in order.

    Looked for among the newest 128 of each run, so that it costs the same however long a run is.
    """
    of_run = numbers.alias()
    first = (
        sa.select(of_run.c.position)
        .where(of_run.c.run_id == runs.c.run_id)
        .order_by(of_run.c.position.desc())
        .offset(127)
        .limit(1)
        .correlate(runs)
        .scalar_subquery()
    )
    since = (
        sa.select(runs.c.run_id, sa.func.coalesce(first, 0).label("position"))
        .where(runs.c.run_id.in_(run_ids))
        .cte("since")
        .prefix_with("MATERIALIZED", dialect="postgresql")  # else looked for anew for each row
    )
    mine = (numbers.c.run_id == since.c.run_id) & (numbers.c.position >= since.c.position)
    last = sa.select(sa.func.max(numbers.c.position)).join_from(since, numbers, mine).where(which)
    last = last.group_by(numbers.c.run_id, numbers.c[by])
    return sa.select(numbers).where(numbers.c.position.in_(last)).order_by(numbers.c.position)
