"""`on_policy`: reinforcement learning in lockstep. `rl.train` and recipes call it.

Each step: 1. publish the weights; 2. play P tasks G times with them; 3. drop failed rollouts, and
groups that teach nothing if so planned; 4. advantages, datums, passes of forward_backward and
optim_step; 5. metrics, transcripts, checkpoint. Importance sampling with group-centred advantages
is the default: at the first pass r = 1, and the gradient is that of REINFORCE with a baseline.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weaver.errors import ConfigError
from weaver_rl.data import check_tasks
from weaver_rl.environments import as_group_environment
from weaver_rl.loops.collect import collect
from weaver_rl.loops.run import Run
from weaver_rl.loops.step import policy_step
from weaver_rl.metrics import rollout_metrics
from weaver_rl.rollouts import FailureWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.environments import Environment, GroupEnvironment
    from weaver_rl.filters import Filtered
    from weaver_rl.plan import Plan
    from weaver_rl.types import Task

    Evaluate = Callable[[AsyncSamplingClient], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a loop ends with."""

    sampler: AsyncSamplingClient
    """Of the final weights."""
    steps: int
    """Of the loop, all of them; those before a resume included."""
    version: int
    """Optimizer steps of the weights."""
    metrics: Mapping[str, float]
    """Of the last step, and of the final evaluation."""


async def on_policy(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Trains for `plan.steps` steps, or what is left of them in a run that goes on.

    Args:
        environment: an async function of (agent, task), or `single_turn(reward)`.
        reference: the model of the objective's KL penalties.
        evaluate: called with the weights every `plan.evaluate_every` steps and at the end; its
            numbers are logged as they are.

    Raises:
        ConfigError: the plan is asynchronous, or lacks its reference.
        InvalidRequestError: no tasks, or one without a field that the environment needs.
        RolloutsFailedError, LogprobGapError: see `Plan`.
    """
    if plan.max_staleness:
        raise ConfigError("is above 0.", field="max_staleness", hint="Use off_policy.")
    environment = check_inputs(tasks, environment, plan, reference)
    run, watch = run or Run(), FailureWatch(plan.max_failure_rate)
    done = await run.restore(trainer)
    version = await first_version(trainer, done.extra)
    metrics: dict[str, float] = {}
    for step in range(done.step, plan.steps):
        begin = time.monotonic()
        sampler = await trainer.save_weights_and_get_sampling_client()
        metrics = await evaluated(evaluate, sampler, plan, step)
        run.waiting_for(f"rollouts of step {step + 1}")
        found = await collect(sampler, tasks, environment, plan, step=step, watch=watch)
        numbers, version = await train_on(
            trainer,
            found,
            plan,
            run=run,
            reference=reference,
            step=step,
            version=version,
            begin=begin,
            collected=time.monotonic(),
        )
        metrics |= numbers
        run.log(metrics, step=step + 1)
        if run.is_due(step + 1, plan.steps):
            await run.checkpoint(
                trainer,
                step=step + 1,
                version=version,
                position=(step + 1) * plan.groups_per_step,
            )
    sampler = await trainer.save_weights_and_get_sampling_client()
    metrics |= dict(await evaluate(sampler)) if evaluate is not None else {}
    return Result(sampler=sampler, steps=plan.steps, version=version, metrics=metrics)


async def train_on(
    trainer: AsyncTrainingClient,
    found: Filtered,
    plan: Plan,
    *,
    run: Run,
    reference: AsyncSamplingClient | None,
    step: int,
    version: int,
    begin: float,
    collected: float,
) -> tuple[dict[str, float], int]:
    """The second half of a step: trains on what was collected, records it; metrics and version.

    `begin` and `collected` are monotonic times, in seconds.
    """
    run.waiting_for(f"training of step {step + 1}")
    stepped = await policy_step(
        trainer, found.kept, plan, step=step, version=version, reference=reference
    )
    now = time.monotonic()
    metrics = rollout_metrics(
        [*found.kept, *found.dropped], weights_version=version, seconds=now - begin
    )
    metrics |= found.metrics | stepped.metrics
    metrics |= {
        "time/rollout_s": collected - begin,
        "time/train_s": now - collected,
        "time/step_s": now - begin,
    }
    run.log_rollouts(
        found.kept,
        step=step + 1,
        dropped=found.dropped,
        advantages_P_G=stepped.advantages_P_G,
        trained=stepped.trained,
    )
    return metrics, stepped.version


def check_inputs(
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    reference: AsyncSamplingClient | None,
) -> GroupEnvironment:
    """Raises what is wrong before anything is sampled; see `on_policy`."""
    if plan.loss.needs_reference and reference is None:
        raise ConfigError(
            "the objective has a KL penalty, and there is no reference.",
            field="reference",
            hint="Pass reference=await service.create_sampling_client(base_model=...).",
        )
    environment = as_group_environment(environment)
    check_tasks(tasks, fields=environment.fields)
    return environment


async def first_version(trainer: AsyncTrainingClient, extra: Mapping[str, object]) -> int:
    """Optimizer steps before the first step of this loop."""
    known = extra.get("version")
    return int(known) if isinstance(known, int) else (await trainer.get_info()).step


async def evaluated(
    evaluate: Evaluate | None, sampler: AsyncSamplingClient, plan: Plan, step: int
) -> dict[str, float]:
    """The numbers of an evaluation before step `step`, if one is due."""
    if evaluate is None or not plan.evaluate_every or step % plan.evaluate_every:
        return {}
    return dict(await evaluate(sampler))
