"""`policy_loop`: the steps that `on_policy`, `off_policy` and `rejection` share.

They differ in which rollouts a step has, and in which of them it learns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError
from weaver_rl.data import check_tasks
from weaver_rl.environments import as_group_environment
from weaver_rl.loops.collect import collect
from weaver_rl.loops.step import policy_step
from weaver_rl.metrics import rollout_metrics
from weaver_rl.rollouts import FailureWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.environments import Environment, GroupEnvironment
    from weaver_rl.evaluation import Evaluate
    from weaver_rl.filters import Filtered
    from weaver_rl.loops.run import Run
    from weaver_rl.plan import Plan
    from weaver_rl.resume import Manifest
    from weaver_rl.types import Group, Task


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """`Chosen(groups=(...), rejected=(...), metrics={"rejection/accept_rate": 0.4, ...})`"""

    groups: tuple[Group, ...]
    """Of what is learned; a task that has nothing is not among them."""
    rejected: tuple[Group, ...]
    metrics: dict[str, float]


def all_kept(found: Filtered) -> Chosen:
    """What the filter kept."""
    return Chosen(groups=found.kept, rejected=found.dropped, metrics=found.metrics)


async def lockstep(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run,
    choose: Callable[[Filtered], Chosen] = all_kept,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """The steps of `plan`, each on rollouts of the weights before it."""
    played = check_inputs(tasks, environment, plan, reference)
    watch = FailureWatch(plan.max_failure_rate)

    async def play(step: int, sampler: AsyncSamplingClient) -> Filtered:
        return await collect(sampler, tasks, played, plan, step=step, watch=watch)

    return await policy_loop(
        trainer,
        plan,
        run=run,
        done=await run.restore(trainer),
        play=play,
        choose=choose,
        reference=reference,
        evaluate=evaluate,
    )


async def policy_loop(
    trainer: AsyncTrainingClient,
    plan: Plan,
    *,
    run: Run,
    done: Manifest,
    play: Callable[[int, AsyncSamplingClient], Awaitable[Filtered]],
    choose: Callable[[Filtered], Chosen] = all_kept,
    pending: Callable[[int], Awaitable[Mapping[str, Any]]] | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Plays, learns, evaluates, records: the steps of `plan` that are not `done`.

    Args:
        play: the rollouts of a step, from 0; it is given a sampler of the weights before it.
        pending: what a checkpoint behind a step must keep besides.
    """
    version = await first_version(trainer, done)
    sampler = await trainer.save_weights_and_get_sampling_client()
    metrics: dict[str, float] = {}
    if evaluate is not None:
        measure = partial(evaluate, sampler)
        metrics = await run.evaluate_first(measure, plan, done=done.step, steps=plan.steps)
    for step in range(done.step, plan.steps):
        begin = time.monotonic()
        run.waiting_for(f"rollouts of step {step + 1}")
        found = await play(step, sampler)
        chosen, collected = choose(found), time.monotonic()
        run.waiting_for(f"training of step {step + 1}")
        stepped = await policy_step(
            trainer, chosen.groups, plan, step=step, version=version, reference=reference
        )
        now = time.monotonic()
        sampled = [*found.kept, *found.dropped]
        metrics = rollout_metrics(sampled, weights_version=version, seconds=now - begin)
        metrics |= chosen.metrics | stepped.metrics
        metrics |= {
            "time/rollout_s": collected - begin,
            "time/train_s": now - collected,
            "time/step_s": now - begin,
        }
        version = stepped.version
        run.log_rollouts(
            chosen.groups,
            step=step + 1,
            dropped=chosen.rejected,
            advantages_P_G=stepped.advantages_P_G,
            trained=stepped.trained,
        )
        sampler = await trainer.save_weights_and_get_sampling_client()
        if evaluate is not None and plan.evaluates(step + 1, steps=plan.steps):
            run.waiting_for(f"the evaluation behind step {step + 1}")
            metrics |= await evaluate(sampler)
        await run.log(metrics, step=step + 1)
        if run.is_due(step + 1, plan.steps):
            await run.checkpoint(
                trainer,
                step=step + 1,
                version=version,
                position=(step + 1) * plan.groups_per_step,
                extra=await pending(step) if pending is not None else {},
            )
    return Result(sampler=sampler, steps=plan.steps, version=version, metrics=metrics)


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


async def first_version(trainer: AsyncTrainingClient, done: Manifest) -> int:
    """Optimizer steps before the first step of this loop."""
    known = done.extra.get("version")
    return int(known) if isinstance(known, int) else (await trainer.get_info()).step
