"""One server at a time writes a PostgreSQL database, whatever happens to its connections.

A database in memory lasts as long as its engine.
"""

from __future__ import annotations

import gc
import sqlite3
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from weaver.errors import ConflictError
from weaver.server import database as module
from weaver.server.database import SERVING, Writer, in_memory, open_database, transaction
from weaver.server.tables import names, owners, schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.postgres import Postgres

HOLDERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
    f"AND objid = {SERVING}"
)


@pytest.fixture
def url(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "BUSY_S", 0.2)
    return postgres.emptied()


@pytest.fixture
def writers(url: str, tmp_path: Path) -> Iterator[tuple[Writer, Writer]]:
    first, second = (open_database(tmp_path, url) for _ in range(2))
    yield Writer(first), Writer(second)
    first.dispose()
    second.dispose()


def write(writer: Writer, run_id: str) -> None:
    with transaction(writer) as connection:
        row = {"run_id": run_id, "project": "default"}
        connection.execute(owners.insert(), [row])


def written(writer: Writer) -> set[str]:
    with writer.database.begin() as connection:
        return set(connection.scalars(sa.select(owners.c.run_id)))


def lose_connection(writer: Writer) -> None:
    """As a network does: the database ends the session that holds the lock."""
    with writer.database.begin() as connection:
        assert connection.exec_driver_sql(HOLDERS).all()


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_tables_of_earlier_versions_are_brought_up_to_date(
    on: str, version: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("url") if on == "postgresql" else None
    database = open_database(tmp_path, url)
    write(Writer(database), "run-1")
    with database.begin() as connection:
        names.drop(connection)
        if version == 5:
            connection.execute(owners.update().values(run_id="run/run-1"))
            connection.exec_driver_sql("ALTER TABLE owners RENAME COLUMN run_id TO resource")
        connection.execute(schema.update().values(version=version))
    database.dispose()
    for _ in range(2):
        database = open_database(tmp_path, url)
        assert written(Writer(database)) == {"run-1"}
        with database.begin() as connection:
            assert not connection.execute(names.select()).all()
        database.dispose()


def test_a_second_server_is_refused_until_the_first_has_ended(
    writers: tuple[Writer, Writer],
) -> None:
    first, second = writers
    with first.alone():
        write(first, "run-1")
        with pytest.raises(ConflictError, match="another server"), second.alone():
            pass
        write(first, "run-2")
    with second.alone():
        write(second, "run-3")
    assert written(first) == {"run-1", "run-2", "run-3"}


def test_who_has_lost_the_database_writes_nothing_beside_the_next_owner(
    writers: tuple[Writer, Writer],
) -> None:
    first, second = writers
    with first.alone():
        lose_connection(first)
        with second.alone():
            for _ in range(2):
                with pytest.raises(ConflictError, match="another server"):
                    write(first, "run-1")
        write(first, "run-2")
    assert written(first) == {"run-2"}


def test_a_lost_connection_is_made_anew(writers: tuple[Writer, Writer]) -> None:
    first, second = writers
    with first.alone():
        write(first, "run-1")
        lose_connection(first)
        write(first, "run-2")
        with pytest.raises(ConflictError), second.alone():
            pass
    assert written(first) == {"run-1", "run-2"}


def test_a_database_in_memory_closes_when_nobody_has_it() -> None:
    database = in_memory()
    connection = database.raw_connection().dbapi_connection
    assert connection is not None
    del database
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.cursor()
