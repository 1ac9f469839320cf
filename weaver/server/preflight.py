"""What a server needs of its machine, looked at before anything is loaded: address and home.

Called by `weaver serve` before torch is imported, so that who has to mend something is told within
a second, and by `run_server` where it listens in earnest.
"""

from __future__ import annotations

import shutil
import socket
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from weaver.config import is_loopback
from weaver.errors import ConfigError, requiring
from weaver.files import hold_lock, release_lock

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.server.settings import ServerSettings

LIVE = "live"
"""The folder of a home with the snapshots of runs, and the lock of the server that has the home."""
OTHER_HOME = "Close that one, or use another home (WEAVER_HOME)."
LEAST_FREE_BYTES = 2**26
"""Of the home's disk: with less, the first snapshot of a run may fail already."""


def check_start(settings: ServerSettings) -> None:
    """
    Raises:
        ConfigError: it cannot listen there, or would be open to others without keys; the home
            cannot be written to, its disk is full, or the database cannot be used.
        ConflictError: another server has the home.
        MissingDependencyError: the `server` extra is not installed.
    """
    check_keys(settings)
    listen(settings.host, settings.port).close()
    check_home(settings.home)
    try:
        lock = hold_lock(settings.home / LIVE, what=f"the home {settings.home}", hint=OTHER_HOME)
    except OSError as error:
        raise _unusable(settings.home, error) from None
    release_lock(lock)
    with requiring("the server", "server,engine"):
        from weaver.server.database import open_database
    open_database(settings.home, settings.database_url).dispose()


def check_keys(settings: ServerSettings) -> None:
    """Raises ConfigError: others could reach a server that asks for no keys."""
    if not settings.auth and not is_loopback(settings.host):
        raise ConfigError(
            f"is {settings.host!r}, which others can reach, and keys are off.",
            field="host",
            hint="Leave out --no-auth, or listen on 127.0.0.1.",
        )


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError: it cannot listen there."""
    if not host:  # to a socket, that is every address of the machine
        raise ConfigError("is empty.", field="host", hint="Name an address, such as 127.0.0.1.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}.",
            field="port",
            hint="Choose another --port or --host; 0 takes any free port.",
        ) from None


def check_home(home: Path, *, least_bytes: int = LEAST_FREE_BYTES) -> None:
    """Raises ConfigError: it cannot be made or written to, or has less than that left."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=home) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise _unusable(home, error) from None
    free_bytes = shutil.disk_usage(home).free
    if free_bytes < least_bytes:
        raise ConfigError(
            f"{home} is on a disk with {free_bytes / 1e6:.0f} MB left.",
            field="home",
            hint=f"Free {least_bytes / 1e6:.0f} MB at least, or choose another --home.",
        )


def _unusable(home: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{home} cannot be written to: {error.strerror}.",
        field="home",
        hint="Choose a folder of yours with --home or WEAVER_HOME.",
    )
