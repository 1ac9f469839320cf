"""`on_policy`: reinforcement learning in lockstep. `rl.train` and recipes call it.

Each step: 1. publish the weights; 2. play P tasks G times with them; 3. drop failed rollouts, and
groups that teach nothing if so planned; 4. advantages, datums, passes of forward_backward and
optim_step; 5. metrics, transcripts, checkpoint. Importance sampling with group-centred advantages
is the default: at the first pass r = 1, and the gradient is that of REINFORCE with a baseline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.errors import ConfigError
from weaver_rl.loops.policy import Result, lockstep
from weaver_rl.loops.run import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver import AsyncSamplingClient, AsyncTrainingClient
    from weaver_rl.environments import Environment, GroupEnvironment
    from weaver_rl.evaluation import Evaluate
    from weaver_rl.plan import Plan
    from weaver_rl.types import Task


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
    return await lockstep(
        trainer,
        tasks,
        environment,
        plan,
        run=run or Run(),
        reference=reference,
        evaluate=evaluate,
    )
