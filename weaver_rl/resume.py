"""Checkpoints of a run: one manifest for all that a step left behind; loops save and restore here.

A manifest is written, atomically, after the weights it names are safe. So at any moment, a kill -9
included, the newest manifest is whole and what it names exists; one that is damaged all the same
is passed over for the one before. Going on from it repeats the steps behind it exactly: metrics
and transcripts beyond its step are forgotten first.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weaver.errors import CheckpointCorruptError, CheckpointNotFoundError
from weaver_rl.run_folder import rewind
from weaver_rl.storage import encode, naming_storage, plain, write_atomically

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from weaver import AsyncTrainingClient
    from weaver_rl.run_folder import RunFolder

log = logging.getLogger(__name__)


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
    content = plain(asdict(manifest))
    file = folder.checkpoints / f"{manifest.step:06d}.json"
    write_atomically(file, encode({**content, "sha256": _digest(content)}, indent=2) + b"\n")
    for file in _manifest_files(folder)[max(1, keep) :]:
        forgotten = None
        with suppress(CheckpointCorruptError):
            forgotten = read_manifest(file).weights
        with naming_storage(file):
            file.unlink()  # before its weights, so that none dangles
        if delete is not None and forgotten not in (None, manifest.weights):
            with suppress(CheckpointNotFoundError):
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
        except (CheckpointCorruptError, CheckpointNotFoundError) as error:
            log.warning("%s is not intact, trying the checkpoint before: %s", file, error)
            refused.append(str(error))
            continue
        rewind(folder, manifest.step)
        return manifest
    if refused:
        raise CheckpointCorruptError(
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
        raise CheckpointCorruptError(
            "the manifest is not what was written.", field=str(file), hint="Delete it."
        )
    return Manifest(**content)


def manifests(folder: RunFolder) -> Iterator[Manifest]:
    """The readable manifests, newest first."""
    for file in _manifest_files(folder):
        with suppress(CheckpointCorruptError):
            yield read_manifest(file)


def _manifest_files(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("[0-9]*.json"), key=lambda f: int(f.stem), reverse=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
