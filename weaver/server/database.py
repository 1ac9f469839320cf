"""The server's database: opened by `weaver serve` and `weaver keys`; tables are defined by users.

SQLite in WAL mode below the server's home, or whatever SQLAlchemy URL is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

metadata = sa.MetaData()


def open_database(home: Path, url: str | None = None) -> sa.Engine:
    """Connects, and makes tables that are missing. The SQLite file is its owner's alone."""
    if url is None:
        home.mkdir(parents=True, exist_ok=True)
        path = home / "server.db"
        path.touch(mode=0o600)
        url = f"sqlite:///{path}"
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _use_wal)
    metadata.create_all(engine)
    return engine


def _use_wal(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=5000")
