"""Locks on folders, each for one holder at a time; and when what was written is on the disk.

Homes, runs and run folders are held by a file in them, drafts of checkpoints by themselves. A lock
ends with its process, however that ends; a fork does not prolong it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from weaver.errors import ConflictError

with suppress(ImportError):  # Windows has none: there folders are not locked
    import fcntl

DRAFT = ".draft-"
ABANDONED_AFTER_S = 24 * 3600.0
"""A draft this old belongs to a process that died, where the file system has no locks to tell."""
_held: set[int] = set()


def hold_lock(folder: Path, *, what: str, hint: str) -> int:
    """A descriptor of the lock file in `folder`, which is made if it is missing.

    Raises:
        ConflictError: another process, or somebody else in this one, holds it; names the process.
        OSError: the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _is_ours(lock) is False:
        holder = os.pread(lock, 200, 0).decode("utf-8", "replace") or "of unknown number"
        os.close(lock)
        raise ConflictError(
            f"{what} is in use by another process or client (process {holder}).", hint=hint
        )
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


def draft_in(folder: Path) -> Path:
    """A name for what is being written there, or deleted."""
    return folder / f"{DRAFT}{secrets.token_hex(8)}"


def hold_draft(folder: Path) -> tuple[Path, int]:
    """A new draft, which is empty, and the lock that keeps it from `sweep_draft`."""
    while True:
        draft = draft_in(folder)
        draft.mkdir(parents=True)
        with suppress(FileNotFoundError):  # it was swept before it was locked
            lock = os.open(draft, os.O_RDONLY)
            if _is_ours(lock) is not False and draft.is_dir():
                _held.add(lock)
                return draft, lock
            os.close(lock)


def size_of(folder: Path) -> int:
    """Bytes of the files in it; of one that is going, of those that are left."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def sweep_draft(draft: Path) -> int:
    """Deletes it if the process that has made it is dead; answers the bytes that were in it."""
    freed_bytes = 0
    with suppress(OSError):  # it is gone, or somebody else's
        lock = os.open(draft, os.O_RDONLY)
        ours = _is_ours(lock)
        if ours is None:
            ours = time.time() - os.fstat(lock).st_mtime > ABANDONED_AFTER_S
        if ours:
            freed_bytes = size_of(draft)
            shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)
    return freed_bytes


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(lock: int) -> bool | None:
    """Takes the lock; None where the file system, or Windows, has none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (NameError, OSError):
        return None
    return True


def _close_inherited() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
