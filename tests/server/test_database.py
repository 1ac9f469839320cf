"""One server at a time writes a PostgreSQL database, whatever happens to its connections.

A database in memory lasts as long as its engine.
"""

from __future__ import annotations

import gc
import sqlite3
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import sqlalchemy as sa

from weaver.errors import ConflictError
from weaver.server import database as module
from weaver.server.database import SERVING, Writer, in_memory, open_database, transaction
from weaver.server.journal import Journal
from weaver.server.tables import names, owners, runs, schema
from weaver.types import ModelInfo, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.postgres import Postgres

MODEL = ModelInfo(name="fake", architecture="x", vocab_size=9, context_length=9, num_parameters=9)
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


GIVEN: list[Any] = ["words", "words", "words", "a\nb", None, 7, "run-0123456789ab"]
NAMED = ["words", "words", "words-2", "a b", None, None, None]
"""The first is of another project."""


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_tables_of_earlier_versions_are_brought_up_to_date(
    on: str, version: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Runs are called what their metadata named them."""
    url = request.getfixturevalue("url") if on == "postgresql" else None
    database = open_database(tmp_path, url)
    for i, name in enumerate(GIVEN):
        anyio.run(put_run, Journal(database), i, name)
    with database.begin() as connection:
        for index in runs.indexes:
            index.drop(connection)
        for column in ("project", "name"):
            connection.exec_driver_sql(f"ALTER TABLE runs DROP COLUMN {column}")
        connection.execute(runs.update().where(runs.c.run_id == "run-6").values(description=b"?"))
        if version < 7:
            names.drop(connection)
        if version == 5:
            connection.exec_driver_sql("UPDATE owners SET run_id = 'run/' || run_id")
            connection.exec_driver_sql("ALTER TABLE owners RENAME COLUMN run_id TO resource")
        connection.execute(schema.update().values(version=version))
    database.dispose()
    for _ in range(2):
        database = open_database(tmp_path, url)
        with database.begin() as connection:
            assert not connection.execute(names.select()).all()
            assert [*connection.scalars(sa.select(runs.c.name).order_by(runs.c.position))] == NAMED
        database.dispose()


async def put_run(journal: Journal, number: int, name: object) -> None:
    """As earlier versions did, whose runs had no names but in their metadata."""
    now = datetime.now(UTC)
    run = TrainingRun(
        run_id=f"run-{number}",
        base_model="fake",
        training_mode="lora",
        lora_config=None,
        step=0,
        status="idle",
        created_at=now,
        last_request_at=now,
        user_metadata={} if name is None else {"name": name},
        project="alice" if number else "bob",
    )
    await journal.put_run(run, model=MODEL, seed=0)


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
