"""What the recipes share: their common flags, a run's folder and loggers, the dry run, the end.

Nothing of an algorithm is here; read a recipe first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import weaver_rl as rl
from weaver import AsyncServiceClient, AsyncTrainingClient
from weaver.errors import ConfigError, WeaverError
from weaver.types import Head, LoraConfig, SamplingParams

F = TypeVar("F")
Train = Callable[[F], Coroutine[Any, Any, Mapping[str, float]]]
Plan = TypeVar("Plan", rl.Plan, rl.SupervisedPlan, rl.PreferencePlan, rl.DistilPlan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """What every recipe takes; each adds its own flags, and may change a default.

    Raises:
        ConfigError: at construction; names the flag.
    """

    model: str = "weaver-nano"
    """A bundled model, a Hugging Face id or a local folder."""
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder with `prompt` and `answer`; none: the recipe's own."""
    held_out: int = 100
    """Tasks that are only evaluated."""
    steps: int = 60
    max_tokens: int = 12
    """Tokens of a reply, at most."""
    learning_rate: float | None = None
    """AdamW's, gradients clipped at a norm of 1; none: by the model's size, 1e-3 for weaver-nano,
    4e-5 to 1e-5 for billions of parameters."""
    rank: int = 8
    """The LoRA adapter's; its alpha is four times that."""
    seed: int = 0
    out: Path | None = None
    """The run's folder; none: a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out behind its last checkpoint, exactly."""
    dry_run: bool = False
    """Validate everything, score four replies, and leave."""
    base_url: str | None = None
    """A Weaver server; none: WEAVER_BASE_URL, or this process."""
    wandb_project: str | None = None
    """Log there as well; offline with WANDB_MODE=offline."""
    mlflow_project: str | None = None
    """Log to this experiment as well, of MLFLOW_TRACKING_URI."""
    trackio_project: str | None = None
    """Log there as well, below TRACKIO_DIR."""
    wandb_entity: str | None = None
    """The user or team of --wandb-project."""
    run_name: str | None = None
    """On the service and for the trackers; none: that of --out, or the recipe's."""
    run_group: str | None = None
    """For the trackers, like the tags; none: the recipe's name."""
    run_tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise ConfigError("is on, no run is named.", field="resume", hint="Pass --out FOLDER.")

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(rank=self.rank, alpha=4 * self.rank)

    @property
    def track(self) -> list[rl.Tracking]:
        """The trackers whose project is named."""
        found = []
        for to in ("wandb", "mlflow", "trackio"):
            if project := getattr(self, f"{to}_project"):
                tracking = rl.Tracking(
                    project,
                    to=to,
                    name=self.run_name,
                    group=self.run_group,
                    tags=self.run_tags,
                    entity=self.wandb_entity if to == "wandb" else None,
                )
                found.append(tracking)
        return found

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens)


def plan_of(kind: type[Plan], flags: Flags, **more: Any) -> Plan:
    """A plan whose fields are the flags of the same names, and `more`."""
    named = {one.name: getattr(flags, one.name) for one in fields(kind) if hasattr(flags, one.name)}
    return kind(**(named | more))


def split_tasks(
    flags: Flags, own: Sequence[rl.Task], *, asked: Sequence[str] = ("prompt", "answer")
) -> tuple[list[rl.Task], list[rl.Task]]:
    """Those of `--tasks`, which have the fields `asked`, or the recipe's `own`: to train on, and
    held out.

    Raises:
        InvalidRequestError: a task lacks a field, or too many are held out; names it.
    """
    tasks = rl.read_tasks(Path(flags.tasks), fields=asked) if flags.tasks else own
    return rl.split_tasks(tasks, held_out=flags.held_out)


@contextmanager
def opened(
    service: AsyncServiceClient,
    flags: Flags,
    name: str,
    *,
    tasks: Sequence[rl.Task],
    plan: Mapping[str, object],
) -> Iterator[rl.Run]:
    """`rl.open_run` in `--out`, or a new folder called `name` and the time.

    Raises:
        FinishedError: the run has its result.
    """
    evaluation = {"held_out": flags.held_out, "max_tokens": flags.max_tokens}
    with rl.open_run(
        flags.out or Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}"),
        {"model": flags.model, "lora": flags.lora, **plan, "evaluation": evaluation},
        tasks=tasks,
        steps=flags.steps,
        name=flags.run_name or (None if flags.out else name),
        resume=flags.resume,
        track=flags.track,
        group=name,
        tags=(name,),
    ) as run:
        if run.finished is not None:
            raise FinishedError(run.finished.metrics)
        run.delete = service.delete_checkpoint
        yield run


class FinishedError(Exception):
    """The run has its result already: `metrics`."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        super().__init__("the run is finished.")
        self.metrics = metrics


def once(train: Train[F]) -> Train[F]:
    """Decorates a recipe: one that is repeated, with `--resume`, answers the result that it has."""

    @wraps(train)
    async def play(flags: F) -> Mapping[str, float]:
        try:
            return await train(flags)
        except FinishedError as done:
            return done.metrics

    return play


async def trainer(
    service: AsyncServiceClient, flags: Flags, run: rl.Run, *, head: Head | None = None
) -> AsyncTrainingClient:
    """The run's model on the service, the same if the run goes on."""
    return await run.open_trainer(service, flags.model, flags.lora, head=head, seed=flags.seed)


async def dry_run(
    service: AsyncServiceClient, flags: Flags, tasks: Sequence[rl.Task], reward: rl.Reward
) -> Mapping[str, float]:
    """Shows the model's replies to four tasks with their rewards; nothing is trained or written.

    Raises:
        RolloutsFailedError: the reward raised, hung or gave no number; shows its traceback.
        WeaverError: the service has no such model, or a task does not fit it.
    """
    adapter = f"LoRA of rank {flags.lora.rank}"
    sampler = await service.create_sampling_client(base_model=flags.model)
    found = await rl.evaluate(sampler, tasks[:4], reward=reward, sampling=flags.sampling)
    for rollout in (rollout for group in found.groups for rollout in group.rollouts):
        if rollout.failure is not None:
            raise rl.RolloutsFailedError(rollout.failure.traceback or rollout.failure.message)
        print(f"{rollout.reward:5.2f}  {rollout.task['prompt']!r} → {rollout.text!r}")
    print(f"Flags, tasks, {flags.model}, {adapter} and the reward are sound; nothing was trained.")
    return found.metrics


def finished(run: rl.Run, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Keeps the result, writes the report; says how good the model became, and where to read on."""
    assert run.folder is not None
    if "eval/mean" in metrics:
        low, high = metrics["eval/low"], metrics["eval/high"]
        print(f"Held out, greedy: {metrics['eval/mean']:.3f} [{low:.3f}, {high:.3f}]")
    elif "eval/loss" in metrics:
        print(f"Held out: a loss of {metrics['eval/loss']:.3f} nats per token")
    run.finish(metrics)
    print(f"Report: {rl.write_report(run.folder)}")
    return metrics


def leave(work: Callable[[], object]) -> None:
    """Runs a recipe and ends the process: status 0, or 1 and the error as one line."""
    try:
        work()
    except WeaverError as error:
        sys.exit(f"{type(error).__name__}: {error}")
