"""Locks on folders, each for one holder at a time: homes, runs and run folders are held so.

A lock ends with its process, however that ends; a fork does not prolong it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from weaver.errors import ConflictError

with suppress(ImportError):  # Windows has none: there folders are not locked
    import fcntl

_held: set[int] = set()


def hold_lock(folder: Path, *, what: str, hint: str) -> int:
    """A descriptor of the lock file in `folder`, which is made if it is missing.

    Raises:
        ConflictError: another process, or somebody else in this one, holds it; names the process.
        OSError: the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode("utf-8", "replace") or "of unknown number"
        os.close(lock)
        raise ConflictError(
            f"{what} is in use by another process or client (process {holder}).", hint=hint
        ) from None
    except (NameError, OSError):
        pass  # a file system without locks is used as it is
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held.add(lock)
    return lock


def release_lock(lock: int) -> None:
    """Lets others have it."""
    _held.discard(lock)
    with suppress(NameError, OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # a fork may have the descriptor as well
    os.close(lock)


def _close_inherited() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
