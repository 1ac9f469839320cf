"""The database: opened by `weaver serve`, `weaver keys` and the embedded engine.

SQLite in WAL mode below the home, or whatever SQLAlchemy URL is given. Its tables carry a version,
so that a program refuses those of another one.

A commit to SQLite (`synchronous=NORMAL`) outlives the process, kill -9 included, but the last ones
may be lost when the machine itself loses power, unless it is flushed, as before anything that it
replaces is deleted; PostgreSQL waits for the disk.
"""

from __future__ import annotations

import sqlite3
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import sqlalchemy as sa
from anyio import CancelScope, to_thread

from weaver import errors
from weaver.server.naming import name_runs
from weaver.server.tables import metadata, schema
from weaver.wire import LARGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")
Rows = list[dict[str, Any]]
Statements = list[tuple[sa.Executable, Rows]]
"""Each with its rows; without any it is left out."""
ONCE: Rows = [{}]
"""The rows of a statement that has no parameters."""
NOT_WRITTEN = errors.StorageError("the database was not written, through a defect.")
VERSION = 8
"""That of the tables; any change of them makes it one more."""
LOCK = 0x57454156
"""PostgreSQL's advisory lock under which tables are made."""
SERVING = 0x57454157
"""PostgreSQL's advisory lock that a server holds while it serves."""
DISK_FULL, LOCK_TIMEOUT = "53100", "55P03"
"""PostgreSQL's codes."""
CONNECT_S = 5
NORMAL, FULL = 1, 2
"""SQLite's `synchronous`: whether a commit waits for the disk."""
BUSY_S = 5
"""A write to SQLite waits so long for that of another process; a server at its start for another
that ends on its PostgreSQL database."""


@dataclass(slots=True, eq=False)
class _Write:
    """A change on its way into the database."""

    make: Callable[[], Statements]
    """Called in the thread that commits; it answers the same when it is called again."""
    size_bytes: int
    """About; little for a file is there before a thread has begun."""
    flush: bool
    error: errors.WeaverError | None = NOT_WRITTEN
    """None once it is in the database; this one until that was tried."""


class Writer:
    """The one who writes a database, and reads it meanwhile.

    Writes that wait for each other are committed together, one transaction at a time, in a worker
    thread unless they are small and SQLite is free to take them at once.

    On PostgreSQL one who writes `alone` uses a single connection, which holds a lock for as long as
    it lives: whoever has lost the connection cannot write beside the next owner.
    """

    def __init__(self, database: sa.Engine) -> None:
        self.database = database
        self._alone = False
        self._connection: sa.Connection | None = None
        self._in_memory = isinstance(database.pool, sa.StaticPool)
        self._writes: list[_Write] = []
        self._writing = anyio.Lock()

    async def read(self, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
        """What it finds of what was written before."""

        def read() -> Sequence[sa.Row[Any]]:
            with transaction(self.database) as connection:
                return connection.execute(query).all()

        return await self._in_thread(read)

    async def change(self, *statements: sa.Executable, flush: bool = False) -> None:
        """Writes statements without rows, all or none."""
        await self.write(lambda: [(one, ONCE) for one in statements], flush=flush)

    async def write(
        self,
        make: Callable[[], Statements],
        *,
        size_bytes: int = LARGE_BYTES + 1,
        flush: bool = False,
    ) -> None:
        """Durable when it returns. Who finds the database free commits what all others wait for.

        `make` is called in the thread that commits; `flush` as in `transaction`.
        """
        write = _Write(cache(make), size_bytes=size_bytes, flush=flush)
        self._writes.append(write)
        with CancelScope(shield=True):
            async with self._writing:
                if write.error is NOT_WRITTEN:
                    batch, self._writes = self._writes, []
                    small = sum(waiting.size_bytes for waiting in batch) <= LARGE_BYTES
                    quick = small and self.database.dialect.name == "sqlite"
                    if not quick or self._execute(batch, at_once=True) is not None:
                        await self._in_thread(lambda: self._commit(batch))
        if write.error is not None:
            raise write.error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """But not for a database in memory, whose one connection all threads would share."""
        return work() if self._in_memory else await to_thread.run_sync(work)

    def _commit(self, batch: Sequence[_Write]) -> None:
        failure = self._execute(batch)
        if failure is not None and not isinstance(failure, errors.ServiceConnectionError):
            for write in batch:  # the fault of one is not that of the others
                self._execute([write])

    def _execute(
        self, writes: Sequence[_Write], *, at_once: bool = False
    ) -> errors.WeaverError | None:
        """All in one transaction; answers why it failed, which each of them is told."""
        failure = None
        try:
            made = [statement for write in writes for statement in write.make()]
            flush = any(write.flush for write in writes)
            with transaction(self, at_once=at_once, flush=flush) as connection:
                for statement, rows in made:
                    if rows:
                        connection.execute(statement, rows)
        except errors.WeaverError as error:
            failure = error
        for write in writes:
            write.error = failure
        return failure

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other servers off a PostgreSQL database; SQLite's home has a lock file for that.

        Raises:
            ConflictError: another server has it.
            ServiceConnectionError, StorageError: it is out of reach, or failed.
        """
        self._alone = self.database.dialect.name == "postgresql"
        try:
            with transaction(self):
                pass
            yield
        finally:
            self._alone = False
            self._close()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A connection in a transaction of its own."""
        if not self._alone:
            with self.database.begin() as connection:
                yield connection
            return
        held = self._held()
        with held.begin():
            yield held

    def _held(self) -> sa.Connection:
        if self._connection is not None:
            try:
                with self._connection.begin():
                    self._connection.execute(sa.select(1))
                return self._connection
            except sa.exc.DBAPIError:  # the server was started anew, or the way to it was cut
                self._close()
        self._connection = self.database.connect()
        try:
            with self._connection.begin():
                self._connection.exec_driver_sql(f"SET LOCAL lock_timeout = {1000 * BUSY_S}")
                self._connection.execute(sa.select(sa.func.pg_advisory_lock(SERVING)))
        except sa.exc.DBAPIError as error:
            self._close()
            if getattr(error.orig, "sqlstate", None) != LOCK_TIMEOUT:
                raise
            raise errors.ConflictError(
                "another server uses this PostgreSQL database.",
                field="database_url",
                hint="Stop that one, or give each server a database of its own.",
            ) from None
        return self._connection

    def _close(self) -> None:
        """Lets go of the lock with the connection, which does not go back to the pool."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


@contextmanager
def transaction(
    database: sa.Engine | Writer, *, at_once: bool = False, flush: bool = False
) -> Iterator[sa.Connection]:
    """A connection whose changes are kept together, or not at all.

    `at_once` does not wait where another process writes to SQLite. `flush` makes SQLite wait until
    these changes, and all before them, are on the disk.

    Raises:
        ServiceConnectionError: the database is away; it may be waited for.
        StorageError: it failed.
        ConflictError: another server has taken it over, or a row's id was used before.
    """
    try:
        with database.begin() as connection:
            if connection.dialect.name == "sqlite":
                _set(connection, "busy_timeout", 0 if at_once else int(1000 * BUSY_S))
                _set(connection, "synchronous", FULL if flush else NORMAL)
            yield connection
    except (sa.exc.SQLAlchemyError, OverflowError, UnicodeError) as error:  # drivers raise such too
        cause = getattr(error, "orig", None) or error
        away = isinstance(error, sa.exc.OperationalError) or (
            isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        )
        full = getattr(cause, "sqlstate", None) == DISK_FULL
        if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise errors.ServiceConnectionError(
                "another process holds the database.", hint="Try again when it lets go of it."
            ) from error
        if away and not full and not isinstance(cause, sqlite3.Error):
            raise errors.ServiceConnectionError(
                f"the database cannot be reached: {cause}", hint="Try again when it is back."
            ) from error
        if isinstance(error, sa.exc.IntegrityError):
            raise errors.ConflictError(
                f"an id was used before: {cause}.", hint="Give each operation an id of its own."
            ) from error
        raise errors.StorageError(
            f"the database failed: {cause}",
            hint="Check the free space and the permissions of it.",
        ) from error


def open_database(home: Path, url: str | None = None, *, file: str = "server.db") -> sa.Engine:
    """Connects, and makes the tables where there are none. The SQLite file is its owner's alone.

    Those of the three versions before are brought up to date.

    Raises:
        ConfigError: it cannot be reached, or another version of this program has made its tables.
    """
    own = None if url else sa.URL.create("sqlite", database=str(_own_file(home, file)))
    try:
        address = own or sa.make_url(
            (url or "").replace("postgresql://", "postgresql+psycopg://", 1)
        )
        afar = {} if address.drivername.startswith("sqlite") else {"connect_timeout": CONNECT_S}
        engine = sa.create_engine(address, pool_pre_ping=bool(afar), connect_args=afar)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _prepare_sqlite)
        with engine.begin() as connection:
            version = _make_tables(connection)
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        why = f"cannot be opened: {getattr(error, 'orig', None) or error}"
        if own is not None:
            hint = "Is it another program's, or held by another process?"
            raise errors.ConfigError(f"{own.database} {why}.", field="home", hint=hint) from None
        raise errors.ConfigError(
            why,
            field="database_url",
            hint="Such as postgresql://user:password@host/name; without it, a file in the home.",
        ) from None
    if version != VERSION:
        engine.dispose()
        raise errors.ConfigError(
            (f"{own.database} " if own else "")
            + f"has tables of version {version}, this program knows {VERSION}.",
            field="home" if own else "database_url",
            hint="Install the version of weaver that used it last, or move the home (or the "
            "database) away and begin anew.",
        )
    return engine


def in_memory() -> sa.Engine:
    """An empty SQLite on one connection, which closes when nobody has the engine any more."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool, creator=lambda: connection)
    weakref.finalize(engine, connection.close)
    metadata.create_all(engine)
    return engine


def _own_file(home: Path, file: str) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / file).touch(mode=0o600)
    except OSError as error:
        raise errors.ConfigError(
            f"{home} cannot be written to: {error.strerror}.",
            field="home",
            hint="Choose a folder of yours with --home or WEAVER_HOME.",
        ) from None
    return home / file


def _make_tables(connection: sa.Connection) -> int:
    """Unless they are there; answers their version."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
    elif connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins only before it writes
    schema.create(connection, checkfirst=True)
    version = connection.scalar(sa.select(schema.c.version))
    if version is None:
        metadata.create_all(connection)
        connection.execute(schema.insert().values(version=VERSION))
    elif version in (5, 6, 7):
        if version == 5:  # whose owners were kinds of things, of which runs had remained
            connection.exec_driver_sql("ALTER TABLE owners RENAME COLUMN resource TO run_id")
            connection.exec_driver_sql("UPDATE owners SET run_id = substr(run_id, 5)")  # of run/
        metadata.create_all(connection)
        name_runs(connection)
        connection.execute(schema.update().values(version=VERSION))
        return VERSION
    return version or VERSION


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")


def _set(connection: sa.Connection, pragma: str, value: int) -> None:
    if connection.info.get(pragma) != value:
        connection.connection.cursor().execute(f"PRAGMA {pragma}={value}")
        connection.info[pragma] = value
