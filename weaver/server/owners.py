"""`Owners`: which project a session or a run belongs to; asked by `ScopedService`.

In the database, so that a project finds its checkpoints again after a restart.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import sqlalchemy as sa
from anyio import to_thread

from weaver.server.tables import owners_table

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Owners:
    """A cache before a table: what has an owner keeps it, so nothing in it grows stale."""

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._known: dict[str, str] = {}

    async def claim(self, resource: str, project: str) -> None:
        """Gives the resource to a project, unless it has an owner already."""
        if await self.of(resource) is None:
            await to_thread.run_sync(self._insert, resource, project)

    async def of(self, resource: str) -> str | None:
        owner = self._known.get(resource)
        if owner is None and (owner := await to_thread.run_sync(self._select, resource)):
            self._known[resource] = owner
        return owner

    async def forget(self, resource: str) -> None:
        self._known.pop(resource, None)
        await to_thread.run_sync(self._delete, resource)

    async def all_of(self, project: str, *, prefix: str) -> Collection[str]:
        """The project's resources whose names begin with `prefix`, without it."""
        return await to_thread.run_sync(self._list, project, prefix)

    async def projects(self) -> Mapping[str, str]:
        """The project of every resource."""
        return await to_thread.run_sync(self._all)

    def _all(self) -> dict[str, str]:
        query = sa.select(owners_table.c.resource, owners_table.c.project)
        with self._database.connect() as connection:
            return {row.resource: row.project for row in connection.execute(query)}

    def _insert(self, resource: str, project: str) -> None:
        row = owners_table.insert().values(resource=resource, project=project)
        with suppress(sa.exc.IntegrityError), self._database.begin() as connection:  # a twin won
            connection.execute(row)

    def _delete(self, resource: str) -> None:
        with self._database.begin() as connection:
            connection.execute(owners_table.delete().where(owners_table.c.resource == resource))

    def _select(self, resource: str) -> str | None:
        query = sa.select(owners_table.c.project).where(owners_table.c.resource == resource)
        with self._database.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def _list(self, project: str, prefix: str) -> frozenset[str]:
        query = sa.select(owners_table.c.resource).where(
            owners_table.c.project == project, owners_table.c.resource.startswith(prefix)
        )
        with self._database.connect() as connection:
            return frozenset(row[0].removeprefix(prefix) for row in connection.execute(query))
