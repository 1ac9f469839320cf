"""Rollouts: P tasks, G samples each, played at the same time. Called by loops and evaluation.

What a user's code did wrong is attributed here: failed rollouts are kept, counted, shown once with
their traceback, and end the run when they are too many.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from weaver.errors import ConfigError, WeaverError
from weaver_rl.agent import Agent
from weaver_rl.boundary import attempt_async
from weaver_rl.gather import gather
from weaver_rl.rewards import scores_of
from weaver_rl.seeds import derive_seed
from weaver_rl.types import Failure, Group, Rollout, Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver import AsyncSamplingClient
    from weaver.types import SamplingParams
    from weaver_rl.environments import GroupEnvironment
    from weaver_rl.types import Task

log = logging.getLogger(__name__)


class RolloutsFailedError(WeaverError):
    """More rollouts failed than the run allows: the reward or the environment is broken."""

    code = "rollouts_failed"


async def sample_groups(
    sampler: AsyncSamplingClient,
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
        agents = [
            Agent(
                sampler,
                tokenizer,
                sampling=sampling,
                seed=derive_seed(group_seed, sample),
                budget=environment.budget,
            )
            for sample in range(group_size)
        ]
        begin = time.monotonic()
        playing = partial(environment.play, agents, task)
        played = await attempt_async(playing, "environment", through=(WeaverError,))
        outcomes = scores_of(played, group_size, "the environment", where="environment")
        seconds = time.monotonic() - begin
        rollouts = [
            _rollout(task, agent, outcome, seconds)
            for agent, outcome in zip(agents, outcomes, strict=True)
        ]
        return Group(task=task, rollouts=tuple(rollouts))

    return await gather([partial(play, problem, task) for problem, task in enumerate(tasks)])


def _rollout(task: Task, agent: Agent, outcome: Score | Failure, seconds: float) -> Rollout:
    failure = outcome if isinstance(outcome, Failure) else None
    score = Score(0.0) if isinstance(outcome, Failure) else outcome
    return Rollout(
        task=task,
        trajectory=agent.trajectory,
        reward=score.reward,
        metrics=score.metrics,
        failure=failure,
        seconds=seconds,
    )


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
