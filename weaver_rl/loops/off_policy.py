"""`off_policy`: reinforcement learning whose rollouts overlap training. Recipes call it.

A pipeline: step t trains on rollouts that were begun max_staleness steps before, with the weights
of then, while those of the steps behind it are being played. One step's rollouts are admitted for
each step that is trained on, so at most max_staleness + 1 of them are under way, none is dropped,
and the staleness is bounded by construction; every token carries the version of its weights. What
is trained on at which step depends on the seed alone, not on which rollout was faster. A checkpoint
waits for the rollouts under way and keeps them, so that a resumed run is exact here too; but only a
deterministic engine repeats them, since elsewhere the last bits depend on what shares a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from weaver.errors import ConfigError
from weaver_rl.gather import task_group
from weaver_rl.loops.collect import collect, from_json, to_json
from weaver_rl.loops.on_policy import on_policy
from weaver_rl.loops.policy import Result, check_inputs, policy_loop
from weaver_rl.loops.run import Run
from weaver_rl.rollouts import FailureWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anyio.abc import TaskGroup

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.environments import Environment, GroupEnvironment
    from weaver_rl.evaluation import Evaluate
    from weaver_rl.filters import Filtered
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
        ready: Mapping[str, Any],
    ) -> None:
        """
        Args:
            ready: what `drain` gave, after a journey through JSON.
        """
        self._tasks = tasks
        self._environment = environment
        self._plan = plan
        self._group = group
        self._watch = FailureWatch(plan.max_failure_rate)
        self._found = {int(step): from_json(rollouts) for step, rollouts in ready.items()}
        self._finished = {step: anyio.Event() for step in self._found}
        for event in self._finished.values():
            event.set()

    async def play(self, step: int, sampler: AsyncSamplingClient) -> Filtered:
        """Begins all rollouts that may begin with these weights; answers those of `step`."""
        for ahead in range(step, min(step + self._plan.max_staleness + 1, self._plan.steps)):
            if ahead not in self._finished:
                self._finished[ahead] = anyio.Event()
                self._group.start_soon(self._collect, ahead, sampler)
        await self._finished[step].wait()
        del self._finished[step]
        return self._found.pop(step)

    async def drain(self, step: int) -> Mapping[str, Any]:
        """Waits for all that is under way behind `step`, and gives it for a checkpoint."""
        for event in self._finished.values():
            await event.wait()
        return {"pending": {str(ahead): to_json(found) for ahead, found in self._found.items()}}

    async def _collect(self, step: int, sampler: AsyncSamplingClient) -> None:
        self._found[step] = await collect(
            sampler, self._tasks, self._environment, self._plan, step=step, watch=self._watch
        )
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

    Arguments and errors are those of `on_policy`.

    Raises:
        ConfigError: the run has a folder, `run.exact` is on, and the engine is not deterministic.
    """
    if plan.max_staleness == 0:
        return await on_policy(
            trainer, tasks, environment, plan, run=run, reference=reference, evaluate=evaluate
        )
    played = check_inputs(tasks, environment, plan, reference)
    run = run or Run()
    if run.folder is not None and run.exact and not trainer.deterministic:
        raise ConfigError(
            "is above 0: on this engine a run that was killed would not go on exactly.",
            field="max_staleness",
            hint="Use AsyncServiceClient(deterministic=True), WEAVER_DETERMINISTIC=1 or "
            "`weaver serve --deterministic`; or do without, by Run(exact=False).",
        )
    done = await run.restore(trainer)
    async with task_group() as group:
        pipeline = Pipeline(tasks, played, plan, group=group, ready=done.extra.get("pending", {}))
        result = await policy_loop(
            trainer,
            plan,
            run=run,
            done=done,
            play=pipeline.play,
            pending=pipeline.drain,
            reference=reference,
            evaluate=evaluate,
        )
    return result
