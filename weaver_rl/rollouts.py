"""Rollouts: how the G agents of a task are played and scored, and P tasks at the same time.

An environment is an async function of `(agent, task)` that returns a float or a `Score`; or
`single_turn(reward)`: one prompt, one reply, one reward. Loops and evaluation call `sample_groups`.
What a user's code did wrong is attributed here: failed rollouts are kept, counted, shown once with
their traceback, and end the run when they are too many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import anyio

from weaver import AsyncSamplingClient
from weaver.errors import ConfigError, WeaverError
from weaver.types import SamplingParams
from weaver_rl.agent import Agent, Budget, BudgetExceeded, derive_seed, respond_all
from weaver_rl.clock import merged, recording, timed_alone
from weaver_rl.guard import attempt_async, gather, is_async, name_of
from weaver_rl.in_flight import InFlight
from weaver_rl.rewards import GroupReward, Reward, checked, copy_of, scorer, scores_of
from weaver_rl.types import Failure, Group, Rollout, Score, Task

__all__ = [
    "Environment",
    "GroupEnvironment",
    "RolloutsFailedError",
    "each",
    "sample_groups",
    "single_turn",
]

Environment = Callable[[Agent, Task], Awaitable[float | Score]]
Outcomes = list[Score | Failure]


@dataclass(frozen=True, slots=True)
class GroupEnvironment:
    """How the G agents of a task are played and scored together."""

    play: Callable[[Sequence[Agent], Task], Awaitable[Outcomes]]
    fields: tuple[str, ...] = ()
    """What a task must have."""
    budget: Budget = field(default_factory=Budget)

    @property
    def __name__(self) -> str:
        return name_of(self.play)


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

    play.__name__ = name_of(reward)
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
        with timed_alone("environment"), anyio.move_on_after(budget.seconds):
            try:
                played = partial(environment, agent, copy_of(task))
                value = await attempt_async(played, "environment", through=through)
            except BudgetExceeded:
                return Score(0.0, {"budget_exceeded": 1.0})
            return checked(value, "the environment", where="environment")
        return Failure("environment", "timeout", f"did not end within {budget.seconds:g} s.")

    async def play(agents: Sequence[Agent], task: Task) -> Outcomes:
        return await gather([partial(one, agent, task) for agent in agents])

    play.__name__ = name_of(environment)
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


log = logging.getLogger(__name__)


class RolloutsFailedError(WeaverError):
    """More rollouts failed than the run allows: the reward or the environment is broken."""

    code = "rollouts_failed"


async def sample_groups(
    sampler: AsyncSamplingClient | InFlight,
    tasks: Sequence[Task],
    environment: GroupEnvironment,
    *,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
) -> list[Group]:
    """A group of `group_size` rollouts for each task; the same for the same weights and seed.

    Raises:
        WeaverError: the service failed; nothing is returned.
    """
    if group_size < 1:
        raise ConfigError(f"is {group_size}.", field="group_size", hint="At least 1.")
    tokenizer = await sampler.get_tokenizer()

    async def play(problem: int, task: Task) -> Group:
        group_seed = derive_seed(seed, problem)
        new = partial(Agent, sampler, tokenizer, sampling=sampling, budget=environment.budget)
        agents = [new(seed=derive_seed(group_seed, sample)) for sample in range(group_size)]
        begin = time.monotonic()
        playing = partial(environment.play, agents, task)
        with recording() as spent:
            played = await attempt_async(playing, "environment", through=(WeaverError,))
        outcomes = scores_of(played, group_size, "the environment", where="environment")
        seconds = time.monotonic() - begin
        rollouts = [
            _rollout(task, agent, outcome, seconds)
            for agent, outcome in zip(agents, outcomes, strict=True)
        ]
        return Group(task=task, rollouts=tuple(rollouts), spent=merged(spent))

    return await gather([partial(play, problem, task) for problem, task in enumerate(tasks)])


def _rollout(task: Task, agent: Agent, outcome: Score | Failure, seconds: float) -> Rollout:
    played = Rollout(task=task, trajectory=agent.trajectory, seconds=seconds)
    if isinstance(outcome, Failure):
        return replace(played, failure=outcome)
    return replace(played, reward=outcome.reward, metrics=outcome.metrics)


@dataclass(slots=True)
class FailureWatch:
    """Shows each kind of failure once and ends a run with too many. One for each run."""

    max_rate: float = 0.1
    """The share of a step's rollouts that may fail."""
    _shown: set[str] = field(default_factory=set)

    def check(self, groups: Sequence[Group]) -> None:
        """
        Raises:
            RolloutsFailedError: more than `max_rate` of these rollouts failed.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        failures = [rollout.failure for rollout in rollouts if rollout.failure is not None]
        for failure in failures:
            kind = f"{failure.where} {failure.kind}: {failure.message.partition(chr(10))[0]}"
            if kind not in self._shown and len(self._shown) < 20:
                self._shown.add(kind)
                log.error(
                    "A rollout failed and is left out (%s). Shown once.\n%s",
                    kind,
                    failure.traceback or failure.message,
                )
        if failures and len(failures) > self.max_rate * len(rollouts):
            raise RolloutsFailedError(
                f"{len(failures)} of {len(rollouts)} rollouts failed, the first with "
                f"{failures[0].message}\n{failures[0].traceback}",
                field=failures[0].where,
                hint="Try it with weaver_rl.check(reward, tasks), or raise max_failure_rate.",
            )
