"""The tables of the database, and the larger statements on them; used by the files that they name.

Arrays and values are kept as messages of `weaver.wire`. The statements are the journal's.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()
IDENTITY = sa.BigInteger().with_variant(sa.Integer, "sqlite")

schema_table = sa.Table("schema", metadata, sa.Column("version", sa.Integer, primary_key=True))
"""One row: which version of these tables the database has."""

keys_table = sa.Table(
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
"""keys.py"""

owners_table = sa.Table(
    "owners",
    metadata,
    sa.Column("resource", sa.String(160), primary_key=True),
    sa.Column("project", sa.String(64), nullable=False, index=True),
)
"""journal.py; of each run, of deleted ones too, the project. A resource is `run/` and its id."""

runs_table = sa.Table(
    "runs",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, unique=True),
    sa.Column("description", sa.LargeBinary, nullable=False),
    sa.Column("model", sa.LargeBinary, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("snapshot", sa.BigInteger, nullable=False),
)
"""journal.py; `snapshot` is the number of the last operation that the run's snapshot holds."""

sessions_table = sa.Table(
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
"""journal.py; the open ones, and closed ones with pending work; with their callers' rights."""

operations_table = sa.Table(
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
"""journal.py; the journal. `cursor` is set once there is an outcome, which goes when its client
has it; `number` counts what a run has executed, and `body` goes when a snapshot holds it. What was
refused or cancelled has no number."""

answers_table = sa.Table(
    "answers",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, index=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
)
"""journal.py; the numbers that a run's operations answered, for its curves."""

requests_table = sa.Table(
    "requests",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)
"""journal.py; keys of requests, beside operations, that have changed something or are about to;
with seconds since 1970."""

metrics_table = sa.Table(
    "metrics",
    metadata,
    sa.Column("position", IDENTITY, primary_key=True),
    sa.Column("run_id", sa.String(128), nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("step", sa.BigInteger),
    sa.Column("occurred_at", sa.String(40)),
)
"""journal.py"""

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
PENDING = operations.cursor.is_(None)
ENTRIES = (
    sa.select(
        *(column for column in operations if column is not operations.body),
        sa.case((PENDING, operations.body)).label("body"),
    )
    .where(sa.or_(PENDING, sa.and_(IS_OPEN, sa.not_(IS_PASSED))))
    .order_by(operations.position)
)
PLACE = operations.session_id, operations.run_id
IN_TURN = sa.func.row_number().over(partition_by=PLACE, order_by=operations.seq)
ISLANDS = (
    sa.select(*PLACE, operations.seq, operations.cursor, (operations.seq - IN_TURN).label("island"))
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
