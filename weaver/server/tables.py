"""The tables of the server's database; `database.py` makes them, each is used by the file it names.

Arrays and values are kept as messages of `weaver.wire`.
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
"""sql_store.py; of each run, of deleted ones too, the project. A resource is `run/` and its id."""

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
"""sql_store.py; `snapshot` is the number of the last operation that the run's snapshot holds."""

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
"""sql_store.py; the open ones, and closed ones with pending work; with their callers' rights."""

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
"""sql_store.py; the journal. `cursor` is set once there is an outcome, which goes when its client
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
"""sql_store.py; the numbers that a run's operations answered, for its curves."""

requests_table = sa.Table(
    "requests",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)
"""sql_store.py; keys of requests, beside operations, that have changed something or are about to;
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
"""sql_store.py"""
