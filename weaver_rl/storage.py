"""Files that survive a kill at any moment; called by run folders, checkpoints, loggers, reports.

A whole file is replaced by a rename; a log of JSON lines is appended to line by line, and a line
that was torn is left out when it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from weaver.errors import StorageError
from weaver.files import flush


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path`, durably: readers see the old bytes or the new ones, never a part.

    A link stays one, and a device or a pipe is written to as it is.

    Raises:
        StorageError: disk full or not writable; what stood at `path` is untouched.
    """
    if path.exists() and not path.is_file():
        with naming_storage(path):
            path.write_bytes(data)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)  # else a power cut may bring the old name back
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: Path, record: object) -> None:
    """Adds one JSON line, durably.

    Raises:
        StorageError: disk full or not writable.
    """
    with naming_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write((b"" if _ends_whole(path) else b"\n") + encode(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, [] where there is none; a line that a kill tore is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_lines(path: Path, records: Iterable[object]) -> None:
    """Replaces a log of JSON lines, atomically."""
    write_atomically(path, b"".join(encode(record) + b"\n" for record in records))


def encode(record: object, *, indent: int | None = None) -> bytes:
    """Strict JSON; numpy numbers and arrays, mappings and tuples of any kind, NaN as null."""
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace")


def plain(value: Any) -> Any:
    """The value in the types of JSON; what has no such form becomes its text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if hasattr(value, "keys"):
        return {str(key): plain(value[key]) for key in value.keys()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=repr)  # their own order differs between processes
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts: `("objective.loss_fn", "ppo")`."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else encode(value).decode()
            yield f"{prefix}{name}", text


@contextmanager
def naming_storage(path: Path) -> Iterator[None]:
    """Turns the system's errors on `path` into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}.",
            hint="Free some space or choose another folder, then resume; "
            "the last checkpoint is intact.",
        ) from error


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")
