"""Checkpoints: the last intact one is taken, whatever happened to those behind it."""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pytest

from weaver.errors import CheckpointCorruptError, CheckpointNotFoundError, StorageError
from weaver.types import CheckpointInfo
from weaver_rl.run_folder import (
    Manifest,
    RunFolder,
    manifests,
    open_run_folder,
    restore,
    save_checkpoint,
)
from weaver_rl.storage import append_line, read_lines

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


class Trainer:
    """Weights are the number of the step; `saved` is the store."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}
        self.weights = 0
        self.full = False

    async def save_state(self, name: str, *, overwrite: bool) -> CheckpointInfo:
        if self.full:
            raise StorageError("disk full.")
        path = f"weaver://run/weights/{name}"
        self.saved[path] = self.weights
        return CheckpointInfo(
            path=path,
            run_id="run",
            name=name,
            kind="weights_and_optimizer",
            base_model="weaver-nano",
            training_mode="lora",
            lora_config=None,
            step=self.weights,
            created_at=datetime.now(UTC),
            size_bytes=1,
        )

    async def load_state_with_optimizer(self, path: str) -> None:
        if path not in self.saved:
            raise CheckpointNotFoundError(f"{path} does not exist.")
        self.weights = self.saved[path]

    async def delete(self, path: str) -> None:
        del self.saved[path]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(tmp_path / "run", {})


async def run(folder: RunFolder, trainer: Trainer, steps: range, *, keep: int = 3) -> None:
    for step in steps:
        trainer.weights = step
        append_line(folder.metrics, {"step": step})
        if step % 2 == 0:
            manifest = Manifest(
                step=step,
                data_position=step * 32,
                random={"rng": np.random.default_rng(step).bit_generator.state},
                loggers={"wandb": {"run_id": "abc"}},
            )
            await save_checkpoint(
                folder, trainer, manifest=manifest, keep=keep, delete=trainer.delete
            )


async def test_everything_comes_back(folder: RunFolder) -> None:
    trainer = Trainer()
    assert await restore(folder, trainer) is None
    await run(folder, trainer, range(1, 6))
    trainer.weights = -1
    manifest = await restore(folder, trainer)
    assert manifest is not None
    assert (manifest.step, manifest.data_position, trainer.weights) == (4, 128, 4)
    assert manifest.loggers == {"wandb": {"run_id": "abc"}}
    rng = np.random.default_rng(0)
    rng.bit_generator.state = manifest.random["rng"]
    assert rng.random() == np.random.default_rng(4).random()
    assert [row["step"] for row in read_lines(folder.metrics)] == [1, 2, 3, 4]


async def test_only_the_last_are_kept(folder: RunFolder) -> None:
    trainer = Trainer()
    await run(folder, trainer, range(1, 11), keep=2)
    assert [manifest.step for manifest in manifests(folder)] == [10, 8]
    assert sorted(trainer.saved.values()) == [8, 10]


async def test_a_damaged_manifest_is_passed_over(folder: RunFolder) -> None:
    trainer = Trainer()
    await run(folder, trainer, range(1, 7))
    newest = folder.checkpoints / "000006.json"
    whole = newest.read_bytes()
    changed = whole.replace(b'"data_position": 1', b'"data_position": 2')
    for content in (whole[: len(whole) // 2], b"", b"[]", changed):
        newest.write_bytes(content)
        manifest = await restore(folder, trainer)
        assert manifest is not None
        assert manifest.step == 4


async def test_lost_weights_are_passed_over(folder: RunFolder) -> None:
    trainer = Trainer()
    await run(folder, trainer, range(1, 7))
    del trainer.saved["weaver://run/weights/step-000006"]
    manifest = await restore(folder, trainer)
    assert manifest is not None
    assert (manifest.step, trainer.weights) == (4, 4)


async def test_none_intact_is_an_error_and_loses_nothing(folder: RunFolder) -> None:
    trainer = Trainer()
    await run(folder, trainer, range(1, 7))
    trainer.saved.clear()
    with pytest.raises(CheckpointCorruptError, match="none of the 3 checkpoints"):
        await restore(folder, trainer)
    assert len(read_lines(folder.metrics)) == 6


async def test_a_full_disk_leaves_the_last_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer()
    await run(folder, trainer, range(1, 5))
    trainer.full = True
    with pytest.raises(StorageError, match="disk full"):
        await run(folder, trainer, range(5, 7))
    trainer.full = False

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space"):
            await save_checkpoint(folder, trainer, manifest=Manifest(step=6), keep=1)
    manifest = await restore(folder, trainer)
    assert manifest is not None
    assert manifest.step == 4


async def test_a_run_killed_before_its_first_checkpoint_starts_over(folder: RunFolder) -> None:
    append_line(folder.metrics, {"step": 1})
    assert await restore(folder, Trainer()) is None
    assert read_lines(folder.metrics) == []
