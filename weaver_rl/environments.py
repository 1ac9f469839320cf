"""Environments: what happens in a rollout. Loops and evaluation take one.

An environment is an async function of `(agent, task)` that returns a float or a `Score`; or
`single_turn(reward)`: one prompt, one reply, one reward.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import anyio

from weaver.errors import ConfigError, WeaverError
from weaver_rl.agent import Agent, Budget, BudgetExceeded, respond_all
from weaver_rl.boundary import attempt_async
from weaver_rl.gather import gather
from weaver_rl.rewards import checked, copy_of, is_async, scorer
from weaver_rl.types import Failure, Score, Task

if TYPE_CHECKING:
    from weaver_rl.rewards import GroupReward, Reward

Environment = Callable[[Agent, Task], Awaitable[float | Score]]
Outcomes = list[Score | Failure]


@dataclass(frozen=True, slots=True)
class GroupEnvironment:
    """How the G agents of a task are played and scored together."""

    play: Callable[[Sequence[Agent], Task], Awaitable[Outcomes]]
    fields: tuple[str, ...] = ()
    """What a task must have."""
    budget: Budget = field(default_factory=Budget)


def single_turn(
    reward: Reward | GroupReward,
    *,
    timeout_s: float = 30.0,
    processes: int = 0,
    concurrency: int = 256,
) -> GroupEnvironment:
    """Asks `task["prompt"]`, a text or a list of chat messages, and scores the reply.

    `timeout_s`, `processes` and `concurrency` are those of `rewards.scorer`.
    """
    score = scorer(reward, timeout_s=timeout_s, processes=processes, concurrency=concurrency)

    async def play(agents: Sequence[Agent], task: Task) -> Outcomes:
        return await score(task, await respond_all(agents, task["prompt"]))

    return GroupEnvironment(play, fields=("prompt",))


def each(environment: Environment, *, budget: Budget | None = None) -> GroupEnvironment:
    """Plays an environment with each agent on its own, all at the same time.

    An environment that raises, returns no number, or takes longer than the budget's seconds is a
    failure; one that ends by `BudgetExceeded` has reward 0 and the metric `budget_exceeded` 1.

    Raises:
        ConfigError: not an async function.
    """
    if not is_async(environment):
        raise ConfigError(
            f"{environment!r} is not an async function.",
            field="environment",
            hint="Write `async def play(agent, task)`; for a reward use single_turn(reward).",
        )
    budget = budget or Budget()

    async def one(agent: Agent, task: Task) -> Score | Failure:
        through = (WeaverError, BudgetExceeded)  # the service failed: the run must stop; no budget
        with anyio.move_on_after(budget.seconds):
            try:
                played = partial(environment, agent, copy_of(task))
                value = await attempt_async(played, "environment", through=through)
            except BudgetExceeded:
                return Score(0.0, {"budget_exceeded": 1.0})
            return checked(value, "the environment", where="environment")
        return Failure("environment", "timeout", f"did not end within {budget.seconds:g} s.")

    async def play(agents: Sequence[Agent], task: Task) -> Outcomes:
        return await gather([partial(one, agent, task) for agent in agents])

    return GroupEnvironment(play, budget=budget)


def as_group_environment(environment: Environment | GroupEnvironment) -> GroupEnvironment:
    """A plain function becomes `each(function)`."""
    return environment if isinstance(environment, GroupEnvironment) else each(environment)


def played_by(
    reward: Reward | GroupReward | None, environment: Environment | GroupEnvironment | None
) -> GroupEnvironment:
    """The one of both that is given.

    Raises:
        ConfigError: both, or neither.
    """
    if reward is not None and environment is None:
        return single_turn(reward)
    if environment is not None and reward is None:
        return as_group_environment(environment)
    raise ConfigError(
        "give a reward or an environment.", field="reward", hint="An environment has its own."
    )
