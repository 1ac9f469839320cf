"""Tasks from files, split and put in order; recipes and loops call it.

Readers for JSONL, Parquet and Hugging Face datasets on disk; a seeded order whose whole state is
one integer; a held-out part that depends on the tasks' content alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weaver.errors import InvalidRequestError, MissingDependencyError, NotFoundError, requiring
from weaver_rl.storage import encode, plain
from weaver_rl.types import Task

__all__ = ["TaskStream", "read_tasks", "split_tasks"]


class Row(dict[str, Any]):
    """A row of a file, which knows its place through splits and shuffles: `"words.jsonl[3]"`."""

    def __init__(self, row: Task, *, where: str) -> None:
        super().__init__(row)
        self.where = where


def read_tasks(path: Path, *, fields: Sequence[str] = ("prompt",)) -> list[Task]:
    """Tasks of a `.jsonl` or `.parquet` file, or of a folder that `datasets` saved.

    Raises:
        NotFoundError: nothing stands at `path`.
        InvalidRequestError: another format, no rows, a broken row, or a row without one of
            `fields`; names the row, from 0, and the field.
        MissingDependencyError: pyarrow or datasets is not installed.
    """
    if not path.exists():
        raise NotFoundError(f"{path} does not exist.", field="path", hint="Check the spelling.")
    if path.is_dir():
        rows = _read_dataset(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        rows = _read_jsonl(path)
    elif path.suffix in (".parquet", ".pq"):
        rows = _read_parquet(path)
    else:
        raise InvalidRequestError(
            f"{path} has no known format.", field="path", hint="Use .jsonl, .parquet or a dataset."
        )
    check_tasks(rows, fields=fields, source=str(path))
    return [Row(row, where=f"{path}[{i}]") for i, row in enumerate(rows)]


def check_tasks(
    tasks: Sequence[Task], *, fields: Sequence[str] = ("prompt",), source: str = "tasks"
) -> None:
    """Raises `InvalidRequestError` for no tasks, or for one without a field that is needed."""
    if not tasks:
        raise InvalidRequestError("there are no tasks.", field=source, hint="Give at least one.")
    for i, task in enumerate(tasks):
        if not hasattr(task, "keys"):
            raise InvalidRequestError(
                f"is a {type(task).__name__}.",
                field=f"{source}[{i}]",
                hint='A task is a mapping, such as {"prompt": "...", "answer": "..."}.',
            )
        missing = [name for name in fields if task.get(name) is None]
        if missing:
            raise InvalidRequestError(
                f"has no field {missing[0]!r}.",
                field=f"{source}[{i}]",
                hint=f"It has {', '.join(map(repr, task)) or 'none'}.",
            )
        check_unicode(task, field=f"{source}[{i}]")


def check_unicode(value: object, *, field: str) -> None:
    """Raises `InvalidRequestError` where a text in `value`, at any depth, is no Unicode; names it.

    JSON may hold one half of a surrogate pair, which no tokenizer and no file takes.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"has half a surrogate pair at character {error.start}.",
                field=field,
                hint="Write the whole character, or leave it out.",
            ) from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_unicode(name, field=field)
            check_unicode(item, field=f"{field}.{name}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_unicode(item, field=f"{field}[{i}]")


def split_tasks(
    tasks: Sequence[Task], *, held_out: int, seed: int = 0
) -> tuple[list[Task], list[Task]]:
    """Tasks to train on and at least `held_out` to test on, each in the order given.

    The choice hashes each task's content with the seed: it does not depend on their order, and a
    task that stands twice is never on both sides.

    Raises:
        InvalidRequestError: nothing would be left to train on.
    """
    marks = [hashlib.sha256(encode([seed, _content(task)])).digest() for task in tasks]
    border = sorted(marks)[held_out - 1] if 0 < held_out <= len(marks) else b""
    train = [task for task, mark in zip(tasks, marks, strict=True) if mark > border]
    test = [task for task, mark in zip(tasks, marks, strict=True) if mark <= border]
    if held_out < 0 or held_out > len(tasks) or not train:
        raise InvalidRequestError(
            f"is {held_out} of {len(tasks)} tasks.",
            field="held_out",
            hint="Leave some to train on; equal tasks stay together.",
        )
    return train, test


def digest(tasks: Sequence[Task]) -> dict[str, object]:
    """Which tasks these are, in their order: `{"count": 40, "sha256": "9f2a..."}`.

    For a run's config. The address in the text of an object without a form of its own is left out,
    so that another process finds the same.
    """
    content = hashlib.sha256()
    for task in tasks:
        content.update(re.sub(r" at 0x[0-9a-f]+", "", _content(task)).encode() + b"\n")
    return {"count": len(tasks), "sha256": content.hexdigest()}


class TaskStream:
    """Tasks without an end, in a new order each epoch. `position` is all its state.

    The order of epoch e is a permutation drawn from (seed, e) alone (numpy's PCG64 through
    `SeedSequence`), so a stream that is set to a position goes on exactly as the first one would.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0, position: int = 0) -> None:
        """
        Raises:
            InvalidRequestError: no tasks, or a negative position.
        """
        check_tasks(tasks, fields=())
        if position < 0:
            raise InvalidRequestError(f"is {position}.", field="position", hint="It starts at 0.")
        self.position = position
        """How many tasks were taken since the start."""
        self._tasks = tasks
        self._seed = seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks."""
        taken: list[Task] = []
        for _ in range(count):
            epoch, index = divmod(self.position, len(self._tasks))
            if epoch != self._epoch:
                generator = np.random.default_rng([self._seed, epoch])
                self._epoch, self._order = epoch, generator.permutation(len(self._tasks))
            taken.append(self._tasks[int(self._order[index])])
            self.position += 1
        return taken


def _content(task: Task) -> str:
    return json.dumps(plain(task), sort_keys=True, ensure_ascii=False)


def _read_jsonl(path: Path) -> list[Task]:
    rows: list[Task] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    rows.append(json.loads(text))
            except (ValueError, RecursionError) as error:
                broken = isinstance(error, UnicodeDecodeError)
                raise InvalidRequestError(
                    f"line {number} is not {'UTF-8' if broken else 'JSON'}: {error}.",
                    field=str(path),
                    hint="Save it as UTF-8." if broken else "Write one object a line.",
                ) from None
    return rows


def _read_parquet(path: Path) -> list[Task]:
    with requiring("Parquet", "rl"):
        from pyarrow import ArrowException, parquet
    try:
        table = parquet.read_table(path)
        rows: list[Task] = table.to_pylist()
    except ArrowException as error:
        raise InvalidRequestError(
            f"is not a Parquet file: {error}", field=str(path), hint="Write it again."
        ) from None
    except UnicodeDecodeError as error:
        raise _not_utf8(path, table, error) from None
    return rows


def _read_dataset(path: Path) -> list[Task]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise MissingDependencyError(
            "datasets is not installed.", field=str(path), hint="pip install datasets"
        ) from None
    try:
        dataset: Any = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InvalidRequestError(
            f"is not a dataset: {error}", field=str(path), hint="Use Dataset.save_to_disk."
        ) from None
    if not isinstance(dataset, Dataset):
        raise InvalidRequestError(
            f"holds the splits {', '.join(dataset)}.",
            field=str(path),
            hint=f"Choose one: {path / next(iter(dataset))}.",
        )
    try:
        rows: list[Task] = list(dataset)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, dataset.with_format("arrow")[:], error) from None
    return rows


def _not_utf8(path: Path, table: Any, error: UnicodeDecodeError) -> InvalidRequestError:
    """Names the first text of an Arrow table whose bytes are none."""
    place = ""
    for name in table.column_names:
        for i, value in enumerate(table[name]):
            try:
                value.as_py()
            except UnicodeDecodeError:
                place = place or f"[{i}].{name}"
    return InvalidRequestError(
        f"is not UTF-8: {error}.", field=f"{path}{place}", hint="Write it again as UTF-8."
    )
