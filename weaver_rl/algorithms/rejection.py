"""`rejection`: fine-tuning on a model's own best samples. Recipes call it.

Best-of-n; RAFT (Dong et al., arXiv:2304.06767); expert iteration (Anthony et al., 1705.08439).
Each round: 1. sample P tasks G times; 2. keep replies with a reward of at least the threshold,
equal ones once, at most `top_k` of a task, the best first; 3. cross-entropy on the sampled tokens
of what was kept, `passes` times in `minibatches` steps. Left out: restarts from the first weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from weaver import AsyncTrainingClient
from weaver.errors import ConfigError
from weaver_rl.algorithms.policy import off_policy
from weaver_rl.algorithms.run import Result, Run
from weaver_rl.evaluation import Evaluate
from weaver_rl.plan import Plan
from weaver_rl.rollouts import Environment, GroupEnvironment
from weaver_rl.types import BoolPG, Filtered, FloatPG, Group, Rollout, Task

__all__ = ["Keep", "rejection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which samples are learned: `Keep(threshold=1.0)`, or best-of-n: `Keep(top_k=1)`."""

    threshold: float = float("-inf")
    """The least reward."""
    top_k: int | None = None
    """The most replies of a task, the best first, of equal ones the first; None: all."""
    unique: bool = True
    """Equal token sequences count once."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"is {self.top_k}.", field="top_k", hint="At least 1, or None.")


async def rejection(
    trainer: AsyncTrainingClient,
    tasks: Sequence[Task],
    environment: Environment | GroupEnvironment,
    plan: Plan,
    *,
    keep: Keep,
    run: Run | None = None,
    evaluate: Evaluate | None = None,
) -> Result:
    """Runs `plan.steps` rounds, or what is left of them in a run that goes on.

    The plan's objective, credit and filter of groups are not used. Other arguments and errors
    are those of `on_policy`.
    """
    plan = replace(
        plan,
        objective="cross_entropy",
        advantage=_ones,
        credit=None,
        zero_variance="keep",
        max_staleness=0,
    )
    choose = partial(select, keep=keep)
    return await off_policy(
        trainer, tasks, environment, plan, run=run, evaluate=evaluate, choose=choose
    )


def select(found: Filtered, keep: Keep) -> Filtered:
    """What of a round is learned, and the shares of it; groups are cut in two."""
    groups: list[Group] = []
    rejected: list[Group] = []
    duplicates = 0
    for group in found.kept:
        good = [r for r in group.rollouts if r.failure is None and r.reward >= keep.threshold]
        good.sort(key=lambda rollout: -rollout.reward)
        distinct: dict[object, Rollout] = {}
        for number, rollout in enumerate(good):
            said = tuple(segment.tokens for segment in rollout.trajectory.segments)
            distinct.setdefault(said if keep.unique else number, rollout)
        duplicates += len(good) - len(distinct)
        chosen = tuple(distinct.values())[: keep.top_k]
        ids = {id(rollout) for rollout in chosen}
        rest = tuple(rollout for rollout in group.rollouts if id(rollout) not in ids)
        groups += [replace(group, rollouts=chosen)] if chosen else []
        rejected += [replace(group, rollouts=rest)] if rest else []
    count = sum(len(group.rewards) for group in found.kept)
    kept = sum(len(group.rollouts) for group in groups)
    rewards = [rollout.reward for group in groups for rollout in group.rollouts]
    metrics = {
        "rejection/kept": float(kept),
        "rejection/accept_rate": kept / max(count, 1),
        "rejection/duplicates": float(duplicates),
        "rejection/tasks_kept": len(groups) / max(len(found.kept), 1),
    }
    if rewards:
        metrics["rejection/reward_kept"] = sum(rewards) / len(rewards)
    return Filtered(kept=tuple(groups), dropped=(*rejected, *found.dropped), metrics=metrics)


def _ones(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    return valid_P_G.astype(rewards_P_G.dtype)
