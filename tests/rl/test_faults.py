"""Bad input and faults of a whole run: a named error, nothing half written, the last checkpoint
intact, and a run that goes on from it as if nothing had happened."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.rl.fake import fake_service, vowels
from tests.rl.scripted import ScriptedSampler, byte_tokenizer
from tests.rl.test_loops import PLAN, RATIO, TASKS, Memory, weights, without_times
from weaver.errors import ConfigError, EngineError, InvalidRequestError, StorageError
from weaver_rl.algorithms.policy import off_policy
from weaver_rl.algorithms.run import Run
from weaver_rl.evaluation import evaluate
from weaver_rl.loggers import JsonlLogger, Loggers
from weaver_rl.rollouts import RolloutsFailedError, single_turn
from weaver_rl.run_folder import RunFolder, manifests, open_run_folder
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver import AsyncTrainingClient
    from weaver_rl.rewards import Reward
    from weaver_rl.run_folder import Manifest
    from weaver_rl.types import Reply, Task


class Faulty(Run):
    """A run whose checkpoint behind step 4 meets a full disk at its n-th flush."""

    flush: int
    patch: pytest.MonkeyPatch

    async def checkpoint(self, trainer: AsyncTrainingClient, manifest: Manifest) -> None:
        if manifest.step != 4:
            return await super().checkpoint(trainer, manifest)
        real, calls = os.fsync, iter(range(99))

        def full(handle: int) -> None:
            if next(calls) >= self.flush:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with self.patch.context() as patched:
            patched.setattr(os, "fsync", full)
            await super().checkpoint(trainer, manifest)
        return None


async def run_once(
    place: Path,
    *,
    reward: Reward = vowels,
    staleness: int = 0,
    run: Run | None = None,
    hook: Callable[[str, object], None] = lambda name, argument: None,
) -> tuple[list[float | None], list[dict[str, Any]]]:
    """Goes on in `place` to the end: what tells the weights, and the lines of metrics.jsonl."""
    plan = replace(PLAN, max_staleness=staleness, objective=RATIO)
    folder = open_run_folder(place / "run", plan.as_config(), resume=True)
    run = run or Run()
    run.folder, run.checkpoint_every = folder, 2
    run.loggers = Loggers(JsonlLogger(folder.metrics))
    async with fake_service(place / "home", hook=hook) as service:
        trainer = await service.create_model(base_model="fake")
        await off_policy(trainer, TASKS, single_turn(reward), plan, run=run)
        return await weights(trainer), read_lines(folder.metrics)


def timeless(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    return without_times({row["step"]: {**row, "time": 0.0} for row in rows})


def check_intact(place: Path) -> None:
    """The checkpoint behind step 2 is the last, and nothing is half written."""
    folder = RunFolder(place / "run")
    assert [one.step for one in manifests(folder)] == [2]
    assert not list(place.rglob("*.tmp"))
    for file in (folder.metrics, *folder.transcripts.iterdir()):
        assert file.read_bytes().count(b"\n") == len(read_lines(file))


async def check_goes_on(place: Path) -> None:
    check_intact(place)
    got, rows = await run_once(place)
    whole, expected = await run_once(place / "undisturbed")
    assert got == whole
    assert timeless(rows) == timeless(expected)


@pytest.mark.anyio
@pytest.mark.parametrize("flush", range(4))
async def test_a_full_disk_at_a_checkpoint(
    flush: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = Faulty()
    faulty.flush, faulty.patch = flush, monkeypatch
    with pytest.raises(StorageError, match=r"No space|disk is full"):
        await run_once(tmp_path, run=faulty)
    await check_goes_on(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_sampler_that_dies_in_a_batch(staleness: int, tmp_path: Path) -> None:
    optimizer_steps = 0

    def hook(name: str, argument: object) -> None:
        nonlocal optimizer_steps
        optimizer_steps += name == "optim_step"
        if name == "step" and optimizer_steps >= 3 - staleness:
            raise RuntimeError("the device fell off")

    with pytest.raises(EngineError, match="fell off"):
        await run_once(tmp_path, staleness=staleness, hook=hook)
    if not staleness:
        await check_goes_on(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "gave None"), (float("nan"), "must be finite"), ("1.0", "gave '1.0'")],
)
async def test_a_reward_that_is_no_number(value: Any, words: str, tmp_path: Path) -> None:
    calls = 0

    def broken(task: Task, reply: Reply) -> float:
        nonlocal calls
        calls += 1
        return vowels(task, reply) if calls <= 3 * 16 else value

    with pytest.raises(RolloutsFailedError, match=words):
        await run_once(tmp_path, reward=broken)
    await check_goes_on(tmp_path)


@pytest.mark.anyio
async def test_what_cannot_begin_leaves_no_trace(tmp_path: Path) -> None:
    folder, memory = open_run_folder(tmp_path / "run", {}), Memory()
    run = Run(folder=folder, loggers=Loggers(memory))
    async with fake_service(tmp_path) as service:
        trainer = await service.create_model(base_model="fake")
        for tasks, words in (
            ([], "no tasks"),
            ([*TASKS, {"question": "x"}], r"tasks\[10\].*'prom"),
        ):
            with pytest.raises(InvalidRequestError, match=words):
                await off_policy(trainer, tasks, single_turn(vowels), PLAN, run=run)
    assert memory.rows == {}
    files = {path.name for path in folder.path.rglob("*") if path.is_file()}
    assert files == {"config.json", "lock"}


def test_a_model_without_a_template() -> None:
    sampler: Any = ScriptedSampler(byte_tokenizer(None), lambda turn, prompt: "x")
    chat = [{"prompt": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(ConfigError, match="no chat template"):
        anyio.run(lambda: evaluate(sampler, chat, reward=vowels))
    assert sampler.prompts == []
