"""`on_policy` and `off_policy`: reinforcement learning. `rl.train` and recipes call them.

Each step: 1. publish the weights; 2. play P tasks G times with them, or take what older weights
have played (`Pipeline`); 3. drop failed rollouts, and groups that teach nothing if so planned;
4. advantages, datums, passes of forward_backward and optim_step (`policy_step`); 5. metrics,
transcripts, checkpoint. Importance sampling with group-centred advantages is the default: at the
first pass r = 1, and the gradient is that of REINFORCE with a baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from weaver import AsyncSamplingClient, AsyncTrainingClient
from weaver.errors import ConfigError
from weaver_rl.algorithms.pipeline import Filtered, Pipeline
from weaver_rl.algorithms.run import Run
from weaver_rl.algorithms.step import policy_step
from weaver_rl.data import check_tasks
from weaver_rl.evaluation import Evaluate
from weaver_rl.guard import task_group
from weaver_rl.metrics import rollout_metrics
from weaver_rl.plan import Plan
from weaver_rl.rollouts import Environment, GroupEnvironment, as_group_environment
from weaver_rl.run_folder import Manifest
from weaver_rl.types import Task

__all__ = ["Result", "off_policy", "on_policy"]


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
        evaluate: called with the weights before the first step, behind every
            `plan.evaluate_every` steps and at the end; its numbers are logged as they are.

    Raises:
        ConfigError: the plan is asynchronous, or lacks its reference.
        InvalidRequestError: no tasks, or one without a field that the environment needs.
        RolloutsFailedError, LogprobGapError: see `Plan`.
    """
    if plan.max_staleness:
        raise ConfigError("is above 0.", field="max_staleness", hint="Use off_policy.")
    return await off_policy(
        trainer, tasks, environment, plan, run=run, reference=reference, evaluate=evaluate
    )


async def off_policy(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
    choose: Callable[[Filtered], Filtered] = lambda found: found,
) -> Result:
    """`on_policy` with rollouts up to `plan.max_staleness` steps old; at 0 it is `on_policy`.

    Args:
        choose: what of a step's rollouts is learned, and the metrics of that; all by default.

    Other arguments and errors are those of `on_policy`.

    Raises:
        ConfigError: the run has a folder, `run.exact` is on, rollouts overlap training, and the
            engine is not deterministic.
    """
    run = run or Run()
    _check(trainer, plan, run, reference)
    played = as_group_environment(environment)
    check_tasks(tasks, fields=played.fields)
    done, version = await run.restore(trainer)
    sampler = await trainer.save_weights_and_get_sampling_client()
    measure = evaluate and partial(evaluate, sampler)
    metrics = await run.evaluate_first(measure, plan, done=done.step, steps=plan.steps)
    async with task_group() as group:
        pipeline = Pipeline(tasks, played, plan, group=group, ready=done.extra.get("pending", {}))
        for step in range(done.step, plan.steps):
            begin = time.monotonic()
            run.waiting_for(f"rollouts of step {step + 1}")
            found = await pipeline.play(step, sampler)
            chosen, collected = choose(found), time.monotonic()
            run.waiting_for(f"training of step {step + 1}")
            stepped = await policy_step(
                trainer, chosen.kept, plan, step=step, version=version, reference=reference
            )
            now = time.monotonic()
            sampled = [*found.kept, *found.dropped]
            metrics = {
                **rollout_metrics(sampled, weights_version=version, seconds=now - begin),
                **chosen.metrics,
                **stepped.metrics,
                "time/rollout_s": collected - begin,
                "time/train_s": now - collected,
                "time/step_s": now - begin,
            }
            version = stepped.version
            run.log_rollouts(chosen, stepped, step=step + 1)
            sampler = await trainer.save_weights_and_get_sampling_client()
            if evaluate is not None and plan.evaluates(step + 1, steps=plan.steps):
                run.waiting_for(f"the evaluation behind step {step + 1}")
                metrics |= await evaluate(sampler)
            await run.log(metrics, step=step + 1)
            if run.is_due(step + 1, plan.steps):
                position = (step + 1) * plan.groups_per_step
                extra = {"version": version, "pending": await pipeline.drain()}
                manifest = Manifest(step=step + 1, data_position=position, extra=extra)
                await run.checkpoint(trainer, manifest)
    return Result(sampler=sampler, steps=plan.steps, version=version, metrics=metrics)


def _check(
    trainer: AsyncTrainingClient, plan: Plan, run: Run, reference: AsyncSamplingClient | None
) -> None:
    if plan.loss.needs_reference and reference is None:
        raise ConfigError(
            "the objective has a KL penalty, and there is no reference.",
            field="reference",
            hint="Pass reference=await service.create_sampling_client(base_model=...).",
        )
    exact = run.folder is None or not run.exact or trainer.deterministic
    if plan.max_staleness and not exact:
        raise ConfigError(
            "is above 0: on this engine a run that was killed would not go on exactly.",
            field="max_staleness",
            hint="Use AsyncServiceClient(deterministic=True), WEAVER_DETERMINISTIC=1 or "
            "`weaver serve --deterministic`; or do without, by Run(exact=False).",
        )
