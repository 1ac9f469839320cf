"""`train`: reinforcement learning from a reward in one blocking call; the top of the three levels.

`fine_tune`, its sibling for given answers, is in `weaver_rl.fine_tuning`.

Below it are `on_policy` and its friends, which take a trainer of yours, and the verbs of `weaver`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from anyio.from_thread import start_blocking_portal

from weaver import AsyncServiceClient, AsyncTrainingClient
from weaver.errors import ConfigError
from weaver.types import SamplingParams
from weaver_rl.advantages import AdvantageFn
from weaver_rl.algorithms.policy import off_policy
from weaver_rl.algorithms.run import Run, open_run
from weaver_rl.credit.marks import Credit
from weaver_rl.curriculum import Curriculum
from weaver_rl.data import check_tasks, digest
from weaver_rl.evaluation import evaluator
from weaver_rl.objectives import Objective
from weaver_rl.plan import MaxGap, Plan, Schedule, Steps
from weaver_rl.report import write_report
from weaver_rl.rewards import GroupReward, Reward
from weaver_rl.rollouts import Environment, GroupEnvironment, played_by
from weaver_rl.serving import serving
from weaver_rl.trackers import Tracking
from weaver_rl.types import Task

__all__ = ["Trained", "train"]

AnyPlan = TypeVar("AnyPlan", bound=Steps)

LORA = {"rank": 8, "alpha": 32}
DEFAULT = Plan(steps=60, sampling=SamplingParams(max_tokens=64), evaluate_every=10)
"""What `train` does unless it is told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What `train` ends with."""

    metrics: Mapping[str, float]
    """Those of the last step, and `eval/...` of the held-out tasks."""
    weights: str
    """`weaver://...` of the final weights: for `create_sampling_client`, or to train on."""
    report: Path | None
    """`report.html` of the run's folder."""


def chosen_plan(given: AnyPlan | None, own: AnyPlan, default: AnyPlan) -> AnyPlan:
    """The plan that was given, or the one made of single arguments.

    Raises:
        ConfigError: both were given; names the argument.
    """
    if given is None:
        return own
    for one in fields(default):
        if getattr(own, one.name) != getattr(default, one.name):
            raise ConfigError(
                "is given beside a plan.", field=one.name, hint="Say it in the plan alone."
            )
    return given


def in_one_call(
    opening: AbstractContextManager[Run],
    play: Callable[[AsyncTrainingClient, Run], Awaitable[Mapping[str, float]]],
    *,
    model: str,
    lora_config: Mapping[str, object],
    seed: int,
    base_url: str | None,
    deterministic: bool = False,
) -> Trained:
    """Opens the run and a service, plays a loop to its end, saves the weights, writes the report.

    Args:
        play: the loop; answers its last metrics.
    """

    async def work(run: Run) -> tuple[Mapping[str, float], str]:
        async with AsyncServiceClient(base_url, deterministic=deterministic) as service:
            trainer = await run.open_trainer(service, model, lora_config, seed=seed)
            with serving(service):
                metrics = await play(trainer, run)
            saved = await trainer.save_weights_for_sampler("final", overwrite=True)
            run.finish(metrics, weights=saved.path)
            return metrics, saved.path

    with opening as run:
        if done := run.finished:
            metrics, weights = done.metrics, done.weights or ""
        else:
            with start_blocking_portal() as portal:  # a loop of its own: works in notebooks too
                metrics, weights = portal.call(work, run)
    report = write_report(run.folder) if run.folder is not None else None
    return Trained(metrics=metrics, weights=weights, report=report)


def train(
    model: str,
    tasks: Sequence[Task],
    reward: Reward | GroupReward | None = None,
    *,
    environment: Environment | GroupEnvironment | None = None,
    plan: Plan | None = None,
    steps: int = 60,
    groups_per_step: int = 32,
    group_size: int = 8,
    learning_rate: float | Schedule | None = None,
    sampling: SamplingParams | None = None,
    objective: str | Objective = "importance_sampling",
    advantage: str | AdvantageFn | None = None,
    credit: Credit | None = None,
    curriculum: Curriculum | None = None,
    max_staleness: int = 0,
    held_out: Sequence[Task] = (),
    evaluate_every: int = 10,
    max_logprob_gap: MaxGap = "auto",
    lora_config: Mapping[str, object] | None = None,
    seed: int = 0,
    name: str | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 10,
    display: bool = True,
    wandb_project: str | None = None,
    track: Sequence[Tracking] = (),
    base_url: str | None = None,
) -> Trained:
    """Trains a LoRA adapter by `on_policy`, or by `off_policy` where `max_staleness` is above 0.

    Args:
        reward: of the reply to `task["prompt"]`; or give an `environment`.
        plan: in place of the arguments that it has, such as `steps`, and for those that are
            only there, such as `passes`.
        held_out: tasks that are only evaluated, greedily.
        lora_config: rank 8, alpha 32 by default.
        name: of the run, on the service and for trackers; None: that of the folder.
        folder: gets config, metrics, transcripts, checkpoints and the report; None: nothing.
        resume: goes on in that folder behind its last checkpoint, exactly, if there is one. What
            has finished there is answered at once.
        wandb_project: another place for the numbers; see `open_run`.
        track: more such places.
        base_url: a server; None: WEAVER_BASE_URL, or this process.

    The others are those of `Plan`.

    Raises:
        ConfigError, InvalidRequestError: before anything is sampled; names the argument.
        ConfigError: `max_staleness` with a folder, on a server that is not deterministic.
        ConflictError: the folder holds a run and `resume` is off.
        RolloutsFailedError, LogprobGapError: see `Plan`.
    """
    own = Plan(
        steps=steps,
        groups_per_step=groups_per_step,
        group_size=group_size,
        learning_rate=learning_rate,
        sampling=sampling or DEFAULT.sampling,
        objective=objective,
        advantage=advantage,
        credit=credit,
        curriculum=curriculum,
        max_staleness=max_staleness,
        evaluate_every=evaluate_every,
        max_logprob_gap=max_logprob_gap,
        seed=seed,
    )
    plan = chosen_plan(plan, own, DEFAULT)
    played = played_by(reward, environment)
    check_tasks(tasks, fields=played.fields)
    lora = dict(lora_config or LORA)
    given = {"model": model, "lora_config": lora, "reward": reward or environment}
    asked = evaluator(held_out, environment=played, sampling=plan.sampling, seed=plan.seed)
    evaluate = asked if held_out else None

    async def play(trainer: AsyncTrainingClient, run: Run) -> Mapping[str, float]:
        result = await off_policy(trainer, tasks, played, plan, run=run, evaluate=evaluate)
        return result.metrics

    opening = open_run(
        Path(folder) if folder is not None else None,
        {**given, **plan.as_config(), "evaluation": digest(held_out)},
        tasks=tasks,
        steps=plan.steps,
        name=name,
        tags=(plan.loss.loss_fn,),
        resume=resume,
        checkpoint_every=checkpoint_every,
        display=display,
        wandb_project=wandb_project,
        track=track,
    )
    return in_one_call(
        opening,
        play,
        model=model,
        lora_config=lora,
        seed=plan.seed,
        base_url=base_url,
        # What is killed must go on exactly, though rollouts of several steps share the engine.
        deterministic=plan.max_staleness > 0 and folder is not None,
    )
