"""The database: opened by `weaver serve`, `weaver keys` and the embedded engine.

SQLite in WAL mode below the home, or whatever SQLAlchemy URL is given. Its tables carry a version,
so that a newer program brings them up to date before it uses them. A list of functions serves for
that: Alembic would add a dependency, a folder of scripts and a configuration for a few tables.

A commit to SQLite (`synchronous=NORMAL`) outlives the process, kill -9 included, but the last ones
may be lost when the machine itself loses power; PostgreSQL waits for the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from weaver.errors import ConfigError
from weaver.server.tables import metadata, schema_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

UPGRADES: tuple[Callable[[sa.Connection], None], ...] = (metadata.create_all,)
"""The n-th brings the tables from version n to n + 1. Before version 1 there were no runs."""
LOCK = 0x57454156
"""PostgreSQL's advisory lock under which tables are brought up to date."""


def open_database(home: Path, url: str | None = None, *, file: str = "server.db") -> sa.Engine:
    """Connects, and brings the tables up to date. The SQLite file is its owner's alone.

    Raises:
        ConfigError: it cannot be reached, or a newer version of this program has used it.
    """
    try:
        if url is None:
            home.mkdir(parents=True, exist_ok=True)
            path = home / file
            path.touch(mode=0o600)
            url = f"sqlite:///{path}"
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _prepare_sqlite)
        with engine.begin() as connection:
            upgrade(connection)
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        raise ConfigError(
            f"cannot be opened: {getattr(error, 'orig', None) or error}",
            field="database_url",
            hint="Such as postgresql://user:password@host/name; without it, a file in the home.",
        ) from None
    return engine


def upgrade(connection: sa.Connection) -> None:
    """Brings the tables of any former version to this one, within the caller's transaction.

    Raises:
        ConfigError: the tables are of a later version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    elif connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins only before it writes
    schema_table.create(connection, checkfirst=True)
    version = connection.scalar(sa.select(schema_table.c.version)) or 0
    if version > len(UPGRADES):
        raise ConfigError(
            f"has tables of version {version}, this program knows {len(UPGRADES)}.",
            field="database_url",
            hint="Install the version of weaver that used it last.",
        )
    for step in UPGRADES[version:]:
        step(connection)
    if version < len(UPGRADES):
        connection.execute(schema_table.delete())
        connection.execute(schema_table.insert().values(version=len(UPGRADES)))


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA busy_timeout=5000")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
