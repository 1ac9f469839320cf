"""What the recipes share: a run's folder and loggers, the dry run, the last words, the exit code.

Nothing of an algorithm is here; read a recipe first.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import weaver_rl as rl
from weaver.errors import ConfigError, WeaverError
from weaver.types import SamplingParams
from weaver_rl.display import Display
from weaver_rl.resume import manifests

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from weaver import AsyncSamplingClient, AsyncServiceClient
    from weaver_rl.rewards import Reward

TRIES = 4
"""Replies that a dry run scores."""


@contextmanager
def opened(
    name: str,
    service: AsyncServiceClient,
    *,
    config: Mapping[str, object],
    out: Path | None,
    steps: int,
    resume: bool,
    wandb_project: str | None,
) -> Iterator[rl.Run]:
    """A run with metrics, transcripts, checkpoints and a display, until it ends.

    Args:
        config: what must not change when it goes on; its `steps` may.
        out: its folder; None: a new one under runs/.

    Raises:
        ConfigError: `resume` without `out`, or another config than the run was started with.
        ConflictError: `out` holds a run and `resume` is off.
    """
    if resume and out is None:
        raise ConfigError("is on, and no run is named.", field="resume", hint="Pass --out FOLDER.")
    path = out or Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = rl.open_run_folder(path, config, resume=resume, may_differ=("steps",))
    display = Display(steps=steps)
    loggers: list[rl.Logger] = [rl.JsonlLogger(folder.metrics), display]
    if wandb_project is not None:
        newest = next(manifests(folder), None)
        state = newest.loggers.get("wandb") if newest is not None else None
        loggers.append(rl.WandbLogger(wandb_project, config=config, folder=path, state=state))
    run = rl.Run(
        folder=folder,
        loggers=rl.Loggers(*loggers),
        delete=service.delete_checkpoint,
        waiting_for=display.waiting_for,
    )
    try:
        yield run
    finally:
        run.loggers.close()


def greedily(
    tasks: Sequence[rl.Task], reward: Reward, *, max_tokens: int
) -> Callable[[AsyncSamplingClient], Awaitable[Mapping[str, float]]]:
    """An evaluation that loops call: the mean reward of one greedy reply to each task."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)

    async def evaluated(sampler: AsyncSamplingClient) -> Mapping[str, float]:
        return (await rl.evaluate(sampler, tasks, reward=reward, sampling=sampling)).metrics

    return evaluated


async def dry_run(
    service: AsyncServiceClient,
    model: str,
    *,
    tasks: Sequence[rl.Task],
    reward: Reward,
    max_tokens: int,
) -> Mapping[str, float]:
    """Shows the model's replies to four tasks with their rewards; nothing is trained or written.

    Raises:
        RolloutsFailedError: the reward raised, hung or gave no number; shows its traceback.
        WeaverError: the service has no such model, or a task does not fit it.
    """
    sampler = await service.create_sampling_client(base_model=model)
    sampling = SamplingParams(max_tokens=max_tokens)
    found = await rl.evaluate(sampler, tasks[:TRIES], reward=reward, sampling=sampling)
    for rollout in (rollout for group in found.groups for rollout in group.rollouts):
        if rollout.failure is not None:
            raise rl.RolloutsFailedError(rollout.failure.traceback or rollout.failure.message)
        print(f"{rollout.reward:5.2f}  {rollout.task['prompt']!r} → {rollout.text!r}")
    print(f"Flags, tasks, {model} and the reward are sound; nothing was trained.")
    return found.metrics


def finished(run: rl.Run, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Writes the report; says how good the model became, and where to read on."""
    assert run.folder is not None
    low, high = metrics["eval/low"], metrics["eval/high"]
    print(f"Held out, greedy: {metrics['eval/mean']:.3f} [{low:.3f}, {high:.3f}]")
    print(f"Report: {rl.write_report(run.folder)}")
    return metrics


def leave(work: Callable[[], object]) -> None:
    """Runs a recipe and ends the process: status 0, or 1 and the error as one line."""
    try:
        work()
    except WeaverError as error:
        sys.exit(f"{type(error).__name__}: {error}")
