"""What the shell offers for a name: runs, checkpoints, models, projects, as they are now.

Typer calls these while somebody types, so each ends within a second, and what goes wrong is
silence. Without a server, files of the home are read: no engine is opened, nor torch imported.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from importlib import import_module
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from weaver.config import load_settings
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from pathlib import Path

    from weaver.config import Settings
    from weaver.protocol import Service

T = TypeVar("T")
PATIENCE_S = 1.0
SCHEME = "weaver://"
SILENT = (WeaverError, OSError, sqlite3.Error, ValueError, ImportError, RuntimeError)


def runs(incomplete: str) -> list[str]:
    """Names and ids."""
    return _offered(incomplete, _runs)


def checkpoints(incomplete: str) -> list[str]:
    """Paths; without their scheme, which bash takes for several words, unless it is typed."""
    return _offered(incomplete, _checkpoints)


def models(incomplete: str) -> list[str]:
    """Base models, and checkpoints once `weaver:` is typed."""
    if incomplete.startswith("weaver:"):
        return checkpoints(incomplete)
    return _offered(incomplete, _models)


def projects(incomplete: str) -> list[str]:
    return _offered(incomplete, _projects)


def _runs(settings: Settings) -> Iterable[str]:
    if settings.base_url is not None:
        listed = _asked(settings, lambda service: service.list_runs())
        return [name for run in listed for name in (run.name, run.run_id) if name]
    database = settings.home / "embedded.db"
    named = _rows(database, "SELECT name FROM runs WHERE name IS NOT NULL ORDER BY position")
    return [*named, *_rows(database, "SELECT run_id FROM runs ORDER BY position")]


def _checkpoints(settings: Settings) -> Iterable[str]:
    if settings.base_url is not None:
        listed = _asked(settings, lambda service: service.list_checkpoints())
    else:
        from weaver.server.checkpoints import Checkpoints

        listed = Checkpoints(settings.home, folder="runs").list()
    paths = [checkpoint.path for checkpoint in listed]
    return [*paths, *(path.removeprefix(SCHEME) for path in paths)]


def _models(settings: Settings) -> Iterable[str]:
    if settings.base_url is None:
        return ["weaver-nano"]
    return [model.name for model in _asked(settings, lambda service: service.list_models())]


def _projects(settings: Settings) -> Iterable[str]:
    """Of the keys of this home's server."""
    return _rows(settings.home / "server.db", "SELECT DISTINCT project FROM keys")


def _asked(
    settings: Settings, question: Callable[[Service], Awaitable[Sequence[T]]]
) -> Sequence[T]:
    import anyio

    from weaver.client.http import HttpService

    async def ask() -> Sequence[T]:
        address, key = settings.base_url or "", settings.api_key
        async with HttpService(address, api_key=key, outage_s=PATIENCE_S) as service:
            return await question(service)

    return anyio.run(ask)


def _rows(database: Path, query: str) -> list[str]:
    """The first column; nothing is waited for, nor made."""
    address = f"{database.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=0.2)) as connection:
        return [str(first) for (first,) in connection.execute(query)]


def _offered(incomplete: str, names: Callable[[Settings], Iterable[str]]) -> list[str]:
    """Those that begin so. In a thread, as nothing bounds the time of a name server or a disk."""
    logging.disable(logging.CRITICAL)
    found: SimpleQueue[Iterable[str]] = SimpleQueue()

    def look(settings: Settings) -> None:
        try:
            found.put(names(settings))
        except SILENT:
            found.put([])

    try:
        settings = load_settings()
        import_module("weaver.server.checkpoints")  # the time of imports is not the server's
        import_module("weaver.client.http")
        Thread(target=look, args=[settings], daemon=True).start()
        known = found.get(timeout=PATIENCE_S)
    except (WeaverError, Empty):
        return []
    # A path of a checkpoint is offered once: with its scheme only where that is begun.
    return [
        name
        for name in dict.fromkeys(known)
        if name.startswith(incomplete) and (incomplete or not name.startswith(SCHEME))
    ]
