"""`name_runs`: the names of runs, taken up from tables that had no place for them.

Called by `open_database` when it brings tables up to date.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import sqlalchemy as sa
from pydantic import TypeAdapter

from weaver import wire
from weaver.errors import WeaverError
from weaver.names import numbered, run_name_of
from weaver.server.tables import owners, runs
from weaver.types import TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = TypeAdapter(TrainingRun)
LIMITS = wire.WireLimits(header_bytes=2**30, array_bytes=2**34, trusted=True)


def name_runs(connection: sa.Connection) -> None:
    """A run is called what its `user_metadata` names it, the oldest of a name just so."""
    for column in (runs.c.project, runs.c.name):
        kind = column.type.compile(connection.dialect)
        connection.exec_driver_sql(f"ALTER TABLE runs ADD COLUMN {column.name} {kind}")
    for index in runs.indexes:
        index.create(connection)
    taken: set[tuple[str, str]] = set()
    query = sa.select(runs.c.run_id, runs.c.description, owners.c.project)
    for row in connection.execute(
        query.join(owners, owners.c.run_id == runs.c.run_id).order_by(runs.c.position)
    ).all():
        name = next((one for one in _names(row.description) if (row.project, one) not in taken), "")
        taken.add((row.project, name))
        change = runs.update().where(runs.c.run_id == row.run_id)
        connection.execute(change.values(project=row.project, name=name or None))


def _names(description: bytes) -> Iterator[str]:
    """What a run may be called, the best first; none, if it had no name or cannot be read."""
    try:
        described = wire.decode(description, RUN, limits=LIMITS)
    except WeaverError:
        return
    if name := run_name_of(described.user_metadata.get("name")):
        yield from (numbered(name, number) for number in count(1))
