"""The rollouts of one step, as a pure function of weights, seed and step. Both RL loops call it.

No state passes from step to step: which tasks are played and every sampling seed come from
(seed, step, round), so that a resumed run and an uninterrupted one play the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from weaver_rl import filters
from weaver_rl.data import TaskStream
from weaver_rl.filters import Filtered
from weaver_rl.rollouts import FailureWatch, sample_groups
from weaver_rl.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver import AsyncSamplingClient
    from weaver_rl.environments import GroupEnvironment
    from weaver_rl.plan import Plan
    from weaver_rl.types import Task

MAX_ROUNDS = 5
"""Of resampling, the first included; after these a step makes do with what it has."""


def tasks_of_step(
    tasks: Sequence[Task], count: int, *, seed: int, step: int, round_number: int = 0
) -> list[Task]:
    """Round 0 walks through all tasks in seeded epochs; further rounds draw from all anew."""
    if round_number == 0:
        return TaskStream(tasks, seed=seed, position=step * count).take(count)
    return TaskStream(tasks, seed=derive_seed(seed, step, round_number)).take(count)


async def collect(
    sampler: AsyncSamplingClient,
    tasks: Sequence[Task],
    environment: GroupEnvironment,
    plan: Plan,
    *,
    step: int,
    watch: FailureWatch,
) -> Filtered:
    """Plays and filters the groups of a step, from 0.

    Raises:
        RolloutsFailedError: too many failed.
        WeaverError: the service failed.
    """
    done = Filtered(kept=())
    for number in range(MAX_ROUNDS if plan.zero_variance == "resample" else 1):
        # Whole steps are drawn, so that what is drawn does not depend on how many are missing.
        drawn = tasks_of_step(
            tasks, plan.groups_per_step, seed=plan.seed, step=step, round_number=number
        )
        groups = await sample_groups(
            sampler,
            drawn[: plan.groups_per_step - len(done.kept)],
            environment,
            group_size=plan.group_size,
            sampling=plan.sampling,
            seed=derive_seed(plan.seed, step, number),
        )
        watch.check(groups)
        done = done.plus(filters.apply(groups, plan.zero_variance))
        if len(done.kept) == plan.groups_per_step:
            break
    return done


FILTERED: TypeAdapter[Filtered] = TypeAdapter(Filtered)


def to_json(done: Filtered) -> dict[str, Any]:
    """Rollouts that a checkpoint must keep, since the weights that sampled them will be gone."""
    data: dict[str, Any] = FILTERED.dump_python(done, mode="json")
    return data


def from_json(data: Mapping[str, Any]) -> Filtered:
    """What `to_json` made, after a journey through JSON."""
    return FILTERED.validate_python(data)
