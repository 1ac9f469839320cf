"""Folders that are being written: whose they are, and when they are on the disk.

Called by `Checkpoints`. A draft is locked while its process lives, so that one without a lock is
what a killed process has left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ABANDONED_AFTER_S = 24 * 3600.0
"""A draft this old belongs to a process that died, where the file system has no locks to tell."""


def make_own(draft: Path) -> int | None:
    """Makes the folder and locks it, until its descriptor is closed or the process ends."""
    while True:
        draft.mkdir(parents=True, exist_ok=True)
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(draft.stat(), os.fstat(lock)):
                return lock
        except FileNotFoundError:  # another process swept it before it was locked
            pass
        except OSError:  # no locks on this file system, or none of folders
            os.close(lock)
            return None
        os.close(lock)


def is_abandoned(draft: Path) -> bool:
    try:
        lock = os.open(draft, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(lock).st_mtime > ABANDONED_AFTER_S
    finally:
        os.close(lock)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
