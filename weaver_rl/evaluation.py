"""How good a policy is: mean reward and pass@k with confidence intervals; in a run and alone.

A task is the unit: samples of one task are alike, so intervals count tasks, not samples (Miller,
arXiv:2411.00640, section 2.2). All are of 95%.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from weaver import AsyncSamplingClient
from weaver.errors import ConfigError
from weaver.types import SamplingParams
from weaver_rl.data import check_tasks
from weaver_rl.rewards import GroupReward, Reward
from weaver_rl.rollouts import Environment, GroupEnvironment, played_by, sample_groups
from weaver_rl.types import Group, Task

__all__ = ["Evaluate", "Evaluation", "evaluate", "evaluator"]

Evaluate = Callable[["AsyncSamplingClient"], Awaitable[Mapping[str, float]]]
"""Measures the weights that the sampler has, at some step of a loop."""
Floats = npt.NDArray[np.float64]
Z = 1.959964
"""The 97.5% quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """`Estimate(0.9, 0.744, 0.965, "wilson", tasks=30)`: 0.9, and 95% sure of 0.744 to 0.965."""

    value: float
    low: float
    high: float
    method: Literal["wilson", "normal"]
    tasks: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `evaluate` found. `print(evaluation.mean)` shows `0.900 [0.744, 0.965]`."""

    mean: Estimate | None
    """That of the tasks' mean rewards; None where every rollout failed."""
    pass_at: Mapping[int, Estimate]
    """By k: the chance that at least one of k samples passes."""
    failed: int
    """Rollouts without a reward; they are in no other number."""
    truncated_fraction: float
    """The share of rollouts that max_tokens cut off."""
    groups: tuple[Group, ...] = field(repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """For loggers: `eval/mean`, `/low`, `/high`, `/pass@k`, `/failed` and so on."""
        metrics = {
            "eval/failed": float(self.failed),
            "eval/truncated_fraction": self.truncated_fraction,
        }
        if self.mean is not None:
            metrics["eval/mean"] = self.mean.value
            metrics["eval/low"] = self.mean.low
            metrics["eval/high"] = self.mean.high
        return metrics | {f"eval/pass@{k}": one.value for k, one in self.pass_at.items()}


async def evaluate(
    sampler: AsyncSamplingClient,
    tasks: Sequence[Task],
    *,
    reward: Reward | GroupReward | None = None,
    environment: Environment | GroupEnvironment | None = None,
    num_samples: int = 1,
    sampling: SamplingParams | None = None,
    pass_at: Sequence[int] = (),
    passing: float = 1.0,
    seed: int = 0,
) -> Evaluation:
    """Plays every task `num_samples` times; give a reward or an environment.

    Args:
        sampling: None is greedy for one sample and temperature 1 for several.
        pass_at: each k for which to estimate pass@k; at most `num_samples`.
        passing: the reward from which a rollout passes.
        seed: the same seed and weights give the same numbers.

    Raises:
        ConfigError: both or neither of reward and environment, a k out of range, or several
            samples of a greedy policy.
        InvalidRequestError: no tasks, or one without a field that is needed.
        WeaverError: the service failed.
    """
    for k in pass_at:
        if not 1 <= k <= num_samples:
            raise ConfigError(
                f"has {k}, num_samples is {num_samples}.", field="pass_at", hint="Sample more."
            )
    sampling = sampling or SamplingParams(temperature=0.0 if num_samples == 1 else 1.0)
    if num_samples > 1 and sampling.temperature == 0:
        raise ConfigError(
            f"{num_samples} greedy samples are all the same.",
            field="num_samples",
            hint="Take 1, or set a temperature.",
        )
    played = played_by(reward, environment)
    check_tasks(tasks, fields=played.fields)
    groups = await sample_groups(
        sampler, tasks, played, group_size=num_samples, sampling=sampling, seed=seed
    )
    return summarise(groups, pass_at=pass_at, passing=passing)


def evaluator(
    tasks: Sequence[Task],
    *,
    reward: Reward | GroupReward | None = None,
    environment: Environment | GroupEnvironment | None = None,
    sampling: SamplingParams | None = None,
    seed: int = 0,
) -> Evaluate:
    """What loops take as `evaluate`: the metrics of one greedy reply to each task.

    `evaluator(held_out, reward=exact, sampling=SamplingParams(max_tokens=12))`; raises what
    `evaluate` raises, when it is called.
    """
    greedy = (sampling or SamplingParams()).model_copy(update={"temperature": 0.0})

    async def evaluated(sampler: AsyncSamplingClient) -> Mapping[str, float]:
        found = await evaluate(
            sampler, tasks, reward=reward, environment=environment, sampling=greedy, seed=seed
        )
        return found.metrics

    return evaluated


def summarise(
    groups: Sequence[Group], *, pass_at: Sequence[int] = (), passing: float = 1.0
) -> Evaluation:
    """The numbers of groups that were played already; one group for each task.

    A task counts for pass@k if k of its rollouts did not fail.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [np.array(group.rewards) for group in groups if group.rewards]
    truncated = [rollout.trajectory.stop_reason == "length" for rollout in rollouts]
    estimates = {}
    for k in pass_at:
        chances = [
            pass_at_k(len(rewards), int((rewards >= passing).sum()), k=k)
            for rewards in scored
            if len(rewards) >= k
        ]
        if chances:
            estimates[k] = wilson(float(np.mean(chances)), len(chances))
    return Evaluation(
        mean=mean_estimate(scored),
        pass_at=estimates,
        failed=sum(rollout.failure is not None for rollout in rollouts),
        truncated_fraction=float(np.mean(truncated)) if truncated else 0.0,
        groups=tuple(groups),
    )


def pass_at_k(n: int, c: int, *, k: int) -> float:
    """The unbiased chance that one of k samples passes, where c of n did: 1 − C(n−c, k) / C(n, k).

    Chen et al., arXiv:2107.03374, eq. 1; exact integers, no rounding by products.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_estimate(rewards: Sequence[Floats]) -> Estimate | None:
    """The mean over tasks of each one's mean reward; None for no tasks.

    Rewards of 0 and 1 alone: Wilson's interval, which holds at 0 and 1 too. Others: normal, from
    the spread between tasks; it is too narrow below some 30 tasks, and nothing for one.
    """
    if not rewards:
        return None
    means = np.array([one.mean() for one in rewards])
    if all(np.isin(one, (0.0, 1.0)).all() for one in rewards):
        return wilson(float(means.mean()), len(means))
    return normal(means)


def wilson(share: float, tasks: int) -> Estimate:
    """Wilson's score interval (JASA 22, 1927) of a share of `tasks`.

    Of shares averaged within tasks it is too wide, never too narrow: the variance of a number in
    [0, 1] is at most that of a coin of the same mean.
    """
    spread = Z * math.sqrt(share * (1 - share) / tasks + Z**2 / (4 * tasks**2))
    scale, centre = 1 + Z**2 / tasks, share + Z**2 / (2 * tasks)
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Estimate(share, low, high, "wilson", tasks)


def normal(means: Floats) -> Estimate:
    """mean ± Z · s / √n, s the sample standard deviation (n − 1); one value has no spread."""
    mean = float(means.mean())
    half = Z * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Estimate(mean, mean - half, mean + half, "normal", len(means))
