"""`Pipeline`: the rollouts of a policy loop, which are played when and with which weights.

Step t trains on rollouts that were begun max_staleness steps before, with the weights of then,
while those of the steps behind it are being played; at 0 playing and training take turns. One
step's rollouts are admitted for each step that is trained on, so at most max_staleness + 1 of them
are under way, none is dropped, and the staleness is bounded by construction.

Which tasks are played and every sampling seed come from (seed, step, round), so what is trained on
at which step depends on the seed alone, not on which rollout was faster, and a resumed run plays
what an uninterrupted one does. A checkpoint waits for the rollouts under way and keeps them; but
only a deterministic engine repeats those that overlap, since elsewhere the last bits depend on what
shares a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio.abc import TaskGroup
from pydantic import TypeAdapter

from weaver import AsyncSamplingClient
from weaver_rl.agent import derive_seed
from weaver_rl.data import TaskStream
from weaver_rl.plan import Plan, ZeroVariance
from weaver_rl.rollouts import FailureWatch, GroupEnvironment, sample_groups
from weaver_rl.types import Group, Task

Groups = tuple[Group, ...]
MAX_ROUNDS = 5
"""Of resampling, the first included; after these a step makes do with what it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """`Filtered(kept=(g1, g3), dropped=(g2,), metrics={"groups/kept": 2.0, ...})`"""

    kept: Groups
    """What is learned; a task that has nothing is not among them."""
    dropped: Groups = ()
    metrics: dict[str, float] = field(default_factory=dict)


PENDING: TypeAdapter[dict[int, Filtered]] = TypeAdapter(dict[int, Filtered])


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
        self._epochs = TaskStream(tasks, seed=plan.seed)
        self._environment = environment
        self._plan = plan
        self._group = group
        self._watch = FailureWatch(plan.max_failure_rate)
        self._found = PENDING.validate_python(ready)
        self._finished = {step: anyio.Event() for step in self._found}
        for event in self._finished.values():
            event.set()

    async def play(self, step: int, sampler: AsyncSamplingClient) -> Filtered:
        """Begins all rollouts that may begin with these weights; answers those of `step`, from 0.

        Raises through the task group:
            RolloutsFailedError: too many failed.
            WeaverError: the service failed.
        """
        for ahead in range(step, min(step + self._plan.max_staleness + 1, self._plan.steps)):
            if ahead not in self._finished:
                self._finished[ahead] = anyio.Event()
                self._group.start_soon(self._collect, ahead, sampler)
        await self._finished[step].wait()
        del self._finished[step]
        return self._found.pop(step)

    async def drain(self) -> dict[str, Any]:
        """Waits for all that is under way, and gives it as JSON for a checkpoint.

        The weights that sampled it will be gone.
        """
        for event in self._finished.values():
            await event.wait()
        pending: dict[str, Any] = PENDING.dump_python(self._found, mode="json")
        return pending

    async def _collect(self, step: int, sampler: AsyncSamplingClient) -> None:
        """Plays and filters the groups of a step; resamples those that teach nothing, if asked."""
        plan, count = self._plan, self._plan.groups_per_step
        groups: list[Group] = []
        found = Filtered(kept=())
        for number in range(MAX_ROUNDS if plan.zero_variance == "resample" else 1):
            seed = derive_seed(plan.seed, step, number)
            stream = TaskStream(self._tasks, seed=seed) if number else self._epochs
            stream.position = 0 if number else step * count
            # Whole steps are drawn, so that what is drawn does not depend on how many are missing.
            new = await sample_groups(
                sampler,
                stream.take(count)[: count - len(found.kept)],
                self._environment,
                group_size=plan.group_size,
                sampling=plan.sampling,
                seed=seed,
            )
            self._watch.check(new)
            groups += new
            found = filtered(groups, plan.zero_variance)
            if len(found.kept) == count:
                break
        self._found[step] = found
        self._finished[step].set()


def filtered(groups: Sequence[Group], zero_variance: ZeroVariance = "keep") -> Filtered:
    """Sorts groups into kept and dropped; one in which every rollout failed is never kept.

    Resampling is the pipeline's: here it means to drop.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    for group in groups:
        wanted = bool(group.rewards) and (zero_variance == "keep" or not group.zero_variance)
        (kept if wanted else dropped).append(group)
    metrics = {
        "groups/kept": float(len(kept)),
        "groups/dropped": float(len(dropped)),
        "groups/empty": float(sum(not group.rewards for group in groups)),
    }
    return Filtered(kept=tuple(kept), dropped=tuple(dropped), metrics=metrics)
