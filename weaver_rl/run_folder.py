"""The folder of one run: what lies where, and where a run goes on in it; loops open it first.

runs/reverse/
├── lock                        held by the process that writes the folder
├── config.json                 what the run was started with
├── service.json                which run of the service it is
├── metrics.jsonl               one line a step
├── transcripts/000012.jsonl    the rollouts of step 12
├── checkpoints/000010.json     one manifest each, for all that a step left behind
├── finished.json               its result, once it has one
└── report.html                 see `weaver_rl.report`

A manifest is written, atomically, after the weights it names are safe. So at any moment, a kill -9
included, the newest manifest is whole and what it names exists; one that is damaged all the same
is passed over for the one before. Going on from it repeats the steps behind it exactly: metrics
and transcripts beyond its step are forgotten first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from weaver import AsyncTrainingClient, errors
from weaver.files import hold_lock, release_lock
from weaver_rl import storage

__all__ = ["Manifest", "RunFolder", "manifests", "open_run_folder", "restore", "save_checkpoint"]

log = logging.getLogger(__name__)
OLD = {f"task_set.{name}": "tasks, in their order" for name in ("count", "sha256")}
"""What a digest in a config stands for."""
OTHER_FOLDER = "Wait for it or end it, or choose another folder."
_locks: dict[tuple[int, Path], int] = {}
"""The locks of folders that this process has opened, by its number: a fork has opened none."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`RunFolder(Path("runs/reverse")).metrics` is `runs/reverse/metrics.jsonl`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def service(self) -> Path:
        return self.path / "service.json"

    @property
    def finished(self) -> Path:
        return self.path / "finished.json"

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

    This process has the folder from then on, until it ends or calls `release_run_folder`.

    Args:
        config: everything that decides the results; compared with the folder's own on resume.
        may_differ: top-level names that a resumed run may change, such as `steps`.

    Raises:
        ConflictError: the folder holds a run and `resume` is off, or another process has it.
        ConfigError: it holds a run of another config; names the first field that differs.
        StorageError: it cannot be written.
    """
    folder = RunFolder(path)
    wanted = storage.plain(config)
    with storage.naming_storage(path), ExitStack() as stack:
        if _key(folder) not in _locks:
            what = f"the run folder {path}"
            _locks[_key(folder)] = hold_lock(path, what=what, hint=OTHER_FOLDER)
            stack.callback(release_run_folder, folder)
        if folder.config.exists():
            if not resume:
                raise errors.ConflictError(
                    f"{path} already holds a run.",
                    field="folder",
                    hint="Pass resume=True to go on with it, or choose another folder.",
                )
            _check_same(folder, wanted, may_differ)
        folder.transcripts.mkdir(parents=True, exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        storage.write_atomically(folder.config, storage.encode(wanted, indent=2) + b"\n")
        stack.pop_all()
    return folder


def release_run_folder(folder: RunFolder) -> None:
    """Lets other processes open the folder; nothing more is written there by this one."""
    if (lock := _locks.pop(_key(folder), None)) is not None:
        release_lock(lock)


def _key(folder: RunFolder) -> tuple[int, Path]:
    return os.getpid(), folder.path.resolve()


def read_config(folder: RunFolder) -> dict[str, Any]:
    """What the run was started with.

    Raises:
        ConfigError: the file was damaged.
    """
    try:
        config: dict[str, Any] = json.loads(folder.config.read_bytes())
    except ValueError as error:
        raise errors.ConfigError(
            f"{folder.config} is not JSON: {error}.", hint="Restore it, or choose another folder."
        ) from None
    return config


def note_service(folder: RunFolder, trainer: AsyncTrainingClient) -> None:
    """Keeps which run of the service trains, for the same to go on."""
    known = {"run_id": trainer.model_id, "name": trainer.name}
    storage.write_atomically(folder.service, storage.encode(known, indent=2) + b"\n")


def read_service(folder: RunFolder) -> tuple[str | None, str | None]:
    """Id and name of that run; None: it is not known."""
    try:
        known = json.loads(folder.service.read_bytes())
        return known["run_id"], known["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a run ended with."""

    steps: int
    metrics: Mapping[str, float]
    weights: str | None = None
    """`weaver://...` of the final ones, where they were saved."""


def note_finished(folder: RunFolder, done: Finished, *, asked: Mapping[str, object]) -> None:
    """Keeps the result, with what was `asked` of that the run may be asked otherwise."""
    content = {**asdict(done), "asked": storage.plain(asked)}
    storage.write_atomically(folder.finished, storage.encode(content, indent=2) + b"\n")


def read_finished(folder: RunFolder, *, asked: Mapping[str, object]) -> Finished | None:
    """The result, if it is of just what is asked."""
    try:
        content = json.loads(folder.finished.read_bytes())
        same = content.pop("asked") == storage.plain(asked)
        return Finished(**content) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rewind(folder: RunFolder, step: int) -> None:
    """Forgets metrics and transcripts beyond `step`, so that no step stands twice."""
    kept = [row for row in storage.read_lines(folder.metrics) if row["step"] <= step]
    storage.write_lines(folder.metrics, kept)
    with storage.naming_storage(folder.transcripts):
        for file in folder.transcripts.glob("*.jsonl"):
            if int(file.stem) > step:
                file.unlink()


def _check_same(folder: RunFolder, wanted: Any, may_differ: Collection[str]) -> None:
    for name, before, after in _differences(read_config(folder), wanted):
        if name.partition(".")[0] not in may_differ:
            raise errors.ConfigError(
                f"the run in {folder.path} was started with {before!r}, now it is {after!r}.",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`Manifest(step=10, data_position=320, weights="weaver://run-1/weights/step-000010")`"""

    step: int
    """Steps of the loop that are done."""
    data_position: int = 0
    """`TaskStream.position` behind the last task that these steps used."""
    random: Mapping[str, Any] = field(default_factory=dict)
    """Seeds, and states of generators, as JSON."""
    loggers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """What each logger needs to go on: `{"wandb": {"run_id": "a1b2"}}`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a loop adds, as JSON."""
    weights: str = ""
    """Path of the weights with the optimizer's state; set by `save_checkpoint`."""


async def save_checkpoint(
    folder: RunFolder,
    trainer: AsyncTrainingClient,
    *,
    manifest: Manifest,
    keep: int = 3,
    delete: Callable[[str], Awaitable[object]] | None = None,
) -> Manifest:
    """Saves the weights, then the manifest, then forgets all but the last `keep`.

    Args:
        delete: `service.delete_checkpoint`, to free the weights of what is forgotten.

    Raises:
        StorageError: disk full or not writable; the checkpoints before are intact.
    """
    saved = await trainer.save_state(f"step-{manifest.step:06d}", overwrite=True)
    manifest = replace(manifest, weights=saved.path)
    content = storage.plain(asdict(manifest))
    file = folder.checkpoints / f"{manifest.step:06d}.json"
    storage.write_atomically(
        file, storage.encode({**content, "sha256": _digest(content)}, indent=2) + b"\n"
    )
    for file in _manifest_files(folder)[max(1, keep) :]:
        forgotten = None
        with suppress(errors.CheckpointCorruptError):
            forgotten = read_manifest(file).weights
        with storage.naming_storage(file):
            file.unlink()  # before its weights, so that none dangles
        if delete is not None and forgotten not in (None, manifest.weights):
            with suppress(errors.CheckpointNotFoundError):
                await delete(forgotten)
    return manifest


async def restore(folder: RunFolder, trainer: AsyncTrainingClient) -> Manifest | None:
    """Loads the last intact checkpoint and forgets what was logged beyond it.

    None: there was none yet, and the run starts from the beginning.

    Raises:
        CheckpointCorruptError: there are checkpoints, and not one is intact.
    """
    refused: list[str] = []
    for file in _manifest_files(folder):
        try:
            manifest = read_manifest(file)
            await trainer.load_state_with_optimizer(manifest.weights)
        except (errors.CheckpointCorruptError, errors.CheckpointNotFoundError) as error:
            log.warning("%s is not intact, trying the checkpoint before: %s", file, error)
            refused.append(str(error))
            continue
        rewind(folder, manifest.step)
        return manifest
    if refused:
        raise errors.CheckpointCorruptError(
            f"none of the {len(refused)} checkpoints is intact; the newest: {refused[0]}",
            field=str(folder.checkpoints),
            hint="Restore the folder and the weights it names, or start in a new folder.",
        )
    rewind(folder, -1)
    return None


def read_manifest(file: Path) -> Manifest:
    """
    Raises:
        CheckpointCorruptError: half written, or changed by someone.
    """
    try:
        content = json.loads(file.read_bytes())
        digest = content.pop("sha256")
        intact = digest == _digest(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise errors.CheckpointCorruptError(
            "the manifest is not what was written.", field=str(file), hint="Delete it."
        )
    return Manifest(**content)


def manifests(folder: RunFolder) -> Iterator[Manifest]:
    """The readable manifests, newest first."""
    for file in _manifest_files(folder):
        with suppress(errors.CheckpointCorruptError):
            yield read_manifest(file)


def _manifest_files(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("[0-9]*.json"), key=lambda f: int(f.stem), reverse=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
