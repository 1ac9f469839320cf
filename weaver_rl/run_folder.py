"""The folder of one run: what lies where, and whether a run may go on in it; loops open it first.

runs/reverse/
├── config.json                 what the run was started with
├── metrics.jsonl               one line a step
├── transcripts/000012.jsonl    the rollouts of step 12
├── checkpoints/000010.json     one manifest each: see `weaver_rl.resume`
└── report.html                 see `weaver_rl.report`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError, ConflictError
from weaver_rl.storage import (
    encode,
    naming_storage,
    plain,
    read_lines,
    write_atomically,
    write_lines,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

OLD = {f"task_set.{name}": "tasks, in their order" for name in ("count", "sha256")}
"""What a digest in a config stands for."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`RunFolder(Path("runs/reverse")).metrics` is `runs/reverse/metrics.jsonl`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def transcripts(self) -> Path:
        return self.path / "transcripts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def open_run_folder(
    path: Path,
    config: Mapping[str, object],
    *,
    resume: bool = False,
    may_differ: Collection[str] = (),
) -> RunFolder:
    """Makes the folder, or opens the one of a run that goes on, and writes its config.

    Args:
        config: everything that decides the results; compared with the folder's own on resume.
        may_differ: top-level names that a resumed run may change, such as `steps`.

    Raises:
        ConflictError: the folder holds a run and `resume` is off.
        ConfigError: it holds a run of another config; names the first field that differs.
        StorageError: it cannot be written.
    """
    folder = RunFolder(path)
    wanted = plain(config)
    if folder.config.exists():
        if not resume:
            raise ConflictError(
                f"{path} already holds a run.",
                field="folder",
                hint="Pass resume=True to go on with it, or choose another folder.",
            )
        _check_same(read_config(folder), wanted, path, may_differ)
    with naming_storage(path):
        folder.transcripts.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
    write_atomically(folder.config, encode(wanted, indent=2) + b"\n")
    return folder


def read_config(folder: RunFolder) -> dict[str, Any]:
    """What the run was started with.

    Raises:
        ConfigError: the file was damaged.
    """
    try:
        config: dict[str, Any] = json.loads(folder.config.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{folder.config} is not JSON: {error}.", hint="Restore it, or choose another folder."
        ) from None
    return config


def rewind(folder: RunFolder, step: int) -> None:
    """Forgets metrics and transcripts beyond `step`, so that no step stands twice."""
    write_lines(folder.metrics, [row for row in read_lines(folder.metrics) if row["step"] <= step])
    with naming_storage(folder.transcripts):
        for file in folder.transcripts.glob("*.jsonl"):
            if int(file.stem) > step:
                file.unlink()


def _check_same(
    old: Mapping[str, Any], new: Mapping[str, Any], path: Path, may_differ: Collection[str]
) -> None:
    for name, before, after in _differences(old, new):
        if name.partition(".")[0] not in may_differ:
            raise ConfigError(
                f"the run in {path} was started with {before!r}, now it is {after!r}.",
                field=name,
                hint=f"Resume with the old {OLD.get(name, 'value')}, or choose another folder.",
            )


def _differences(old: object, new: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Dotted name, old and new value of every leaf that differs; a missing one is None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield name, old, new
