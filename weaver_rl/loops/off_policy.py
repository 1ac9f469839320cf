"""`off_policy`: reinforcement learning whose rollouts overlap training. Recipes call it.

A pipeline: step t trains on rollouts that were begun max_staleness steps before, with the weights
of then, while those of the steps behind it are being played. One step's rollouts are admitted for
each step that is trained on, so at most max_staleness + 1 of them are under way, none is dropped,
and the staleness is bounded by construction; every token carries the version of its weights. What
is trained on at which step depends on the seed alone, not on which rollout was faster. So a resumed
run is exact here too, on an engine in deterministic mode (no number depends on what shares the
batch): a checkpoint waits for the rollouts under way and keeps them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio

from weaver.errors import WeaverError
from weaver_rl.loops.collect import collect, from_json, to_json
from weaver_rl.loops.on_policy import (
    Result,
    check_inputs,
    evaluated,
    first_version,
    on_policy,
    train_on,
)
from weaver_rl.loops.run import Run
from weaver_rl.rollouts import FailureWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anyio.abc import TaskGroup

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.environments import Environment, GroupEnvironment
    from weaver_rl.filters import Filtered
    from weaver_rl.loops.on_policy import Evaluate
    from weaver_rl.plan import Plan
    from weaver_rl.types import Task


class Pipeline:
    """The rollouts that are under way, by step. Lives in the task group that plays them."""

    def __init__(
        self,
        tasks: Sequence[Task],
        environment: GroupEnvironment,
        plan: Plan,
        *,
        group: TaskGroup,
        ready: Mapping[int, Filtered],
    ) -> None:
        self._tasks = tasks
        self._environment = environment
        self._plan = plan
        self._group = group
        self._watch = FailureWatch(plan.max_failure_rate)
        self._outcomes: dict[int, Filtered | WeaverError] = dict(ready)
        self._finished = {step: anyio.Event() for step in ready}
        for event in self._finished.values():
            event.set()

    def admit(self, step: int, sampler: AsyncSamplingClient) -> None:
        """Begins the rollouts up to those of `step`, with these weights."""
        for admitted in range(max(self._finished, default=-1) + 1, step + 1):
            if admitted < self._plan.steps:
                self._finished[admitted] = anyio.Event()
                self._group.start_soon(self._play, admitted, sampler)

    async def take(self, step: int) -> Filtered:
        """The rollouts of a step, once they are there. Raises what stopped them."""
        await self._finished[step].wait()
        outcome = self._outcomes.pop(step)
        if isinstance(outcome, WeaverError):
            raise outcome
        return outcome

    async def drain(self, step: int) -> dict[int, Filtered]:
        """Waits for all that is under way behind `step`; it stays here as well."""
        ready = {}
        for later in sorted(self._finished):
            if later > step:
                ready[later] = await self.take(later)
                self._outcomes[later] = ready[later]
        return ready

    async def _play(self, step: int, sampler: AsyncSamplingClient) -> None:
        try:
            self._outcomes[step] = await collect(
                sampler,
                self._tasks,
                self._environment,
                self._plan,
                step=step,
                watch=self._watch,
            )
        except WeaverError as error:
            self._outcomes[step] = error
        self._finished[step].set()


async def off_policy(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    run: Run | None = None,
    reference: AsyncSamplingClient | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """`on_policy` with rollouts up to `plan.max_staleness` steps old; at 0 it is `on_policy`.

    Arguments and errors are those of `on_policy`. A service that fails while rollouts are played
    ends the run when their step is reached.
    """
    if plan.max_staleness == 0:
        return await on_policy(
            trainer, tasks, environment, plan, run=run, reference=reference, evaluate=evaluate
        )
    environment = check_inputs(tasks, environment, plan, reference)
    run = run or Run()
    done = await run.restore(trainer)
    kept = done.extra.get("pending", {})
    ready = {int(step): from_json(rollouts) for step, rollouts in kept.items()}
    version = await first_version(trainer, done.extra)
    failed: list[WeaverError] = []
    metrics: dict[str, float] = {}
    async with anyio.create_task_group() as group:
        pipeline = Pipeline(tasks, environment, plan, group=group, ready=ready)
        try:
            for step in range(done.step, plan.steps):
                version, metrics = await _step(
                    trainer,
                    pipeline,
                    plan,
                    run=run,
                    reference=reference,
                    evaluate=evaluate,
                    step=step,
                    version=version,
                )
        except WeaverError as error:  # out of a task group it would come wrapped
            failed.append(error)
        group.cancel_scope.cancel()
    if failed:
        raise failed[0]
    sampler = await trainer.save_weights_and_get_sampling_client()
    metrics |= dict(await evaluate(sampler)) if evaluate is not None else {}
    return Result(sampler=sampler, steps=plan.steps, version=version, metrics=metrics)


async def _step(
    trainer: AsyncTrainingClient,
    pipeline: Pipeline,
    plan: Plan,
    *,
    run: Run,
    reference: AsyncSamplingClient | None,
    evaluate: Evaluate | None,
    step: int,
    version: int,
) -> tuple[int, dict[str, float]]:
    """Admits, takes, trains, records; the version and the metrics after it."""
    begin = time.monotonic()
    sampler = await trainer.save_weights_and_get_sampling_client()
    pipeline.admit(step + plan.max_staleness, sampler)
    metrics = await evaluated(evaluate, sampler, plan, step)
    run.waiting_for(f"rollouts of step {step + 1}")
    found = await pipeline.take(step)
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
        pending = await pipeline.drain(step)
        await run.checkpoint(
            trainer,
            step=step + 1,
            version=version,
            position=(step + 1) * plan.groups_per_step,
            extra={"pending": {str(key): to_json(value) for key, value in pending.items()}},
        )
    return version, metrics
