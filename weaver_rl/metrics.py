"""What is measured in a step, under which name, and plain words for numbers that look wrong.

Pure functions: from groups and the engine's metrics to numbers, which loops log; from the numbers
of the steps so far to hints, which the display and the report show. What cannot be computed (the
mean reward when every rollout failed) is left out, so that no metric is ever NaN. The names and
their meanings are listed in docs/logging.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, variance
from typing import Any

import numpy as np
import numpy.typing as npt

from weaver_rl.credit.marks import Marks
from weaver_rl.plan import ROUNDING
from weaver_rl.types import Group, Rollout

PASSING = 1.0
"""The reward from which a rollout counts as solved."""
QUANTILES = (50, 90, 99)
TOTALS = ("loss_sum", "weight_sum", "num_tokens")


def rollout_metrics(
    groups: Sequence[Group],
    *,
    weights_version: int,
    seconds: float | None = None,
) -> dict[str, float]:
    """The metrics of what was sampled: `reward`, `score`, `rollout`, `group`, `tokens`, ...

    Args:
        weights_version: the optimizer step of the weights about to be trained.
        seconds: how long the step took, for `tokens/per_second`.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [rollout for rollout in rollouts if rollout.failure is None]
    failed = len(rollouts) - len(scored)
    equal = sum(group.zero_variance for group in groups)
    metrics = {
        "rollout/count": float(len(rollouts)),
        "rollout/failed": float(failed),
        "groups/count": float(len(groups)),
        "groups/zero_variance": float(equal),
    }
    if rollouts:
        metrics["rollout/failed_fraction"] = failed / len(rollouts)
        metrics.update(_shape_metrics(rollouts, seconds))
        metrics.update(_token_metrics(rollouts, weights_version))
    metrics |= _seconds(groups) | _by_dataset(groups)
    if groups:
        metrics["groups/zero_variance_fraction"] = equal / len(groups)
        solved = [max(group.rewards, default=-np.inf) >= PASSING for group in groups]
        metrics["reward/pass_any"] = float(np.mean(solved))
        metrics |= _noise(groups)
        spreads = [np.std(group.rewards) for group in groups if len(group.rewards) > 1]
        if spreads:
            metrics["groups/reward_std"] = float(np.mean(spreads))
    if scored:
        rewards = np.array([rollout.reward for rollout in scored])
        metrics |= _summary("reward", rewards, "mean", "std", "min", "max")
        metrics["reward/pass_rate"] = float((rewards >= PASSING).mean())
    for name in sorted({name for rollout in scored for name in rollout.metrics}):
        values = [r.metrics[name] for r in scored if name in r.metrics]
        metrics[f"score/{name}"] = float(np.mean(values))
    return metrics


def credit_metrics(groups: Sequence[Group], marks: Sequence[Sequence[Marks]]) -> dict[str, float]:
    """The marks of a step: `credit/abs_max`, the parts of a sum, and what was measured for them.

    Over the tokens that count, of the rollouts that did not fail.
    """
    of = [
        one
        for group, row in zip(groups, marks, strict=True)
        for rollout, one in zip(group.rollouts, row, strict=True)
        if rollout.failure is None and one.weights.any()
    ]
    sampled = sum(r.trajectory.num_sampled for g in groups for r in g.rollouts if not r.failure)
    counted = sum(int((one.weights > 0).sum()) for one in of)
    if not sampled or not of:
        return {}

    def gathered(kind: str, name: str) -> npt.NDArray[np.float64]:
        return np.concatenate([getattr(one, kind)[name][one.weights > 0] for one in of])

    A = np.concatenate([one.advantages[one.weights > 0] for one in of])
    metrics = {
        "credit/abs_max": float(np.abs(A).max()),
        "credit/mean_abs": float(np.abs(A).mean()),
        "credit/counted_fraction": counted / sampled,
    }
    for name in set(of[0].parts).intersection(*(one.parts for one in of[1:])):
        values = gathered("parts", name)
        metrics[f"credit/{name}/mean"] = float(values.mean())
        metrics[f"credit/{name}/mean_abs"] = float(np.abs(values).mean())
    for name in set(of[0].measured).intersection(*(one.measured for one in of[1:])):
        metrics[name] = float(gathered("measured", name).mean())
    return dict(sorted(metrics.items()))


def train_metrics(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The engine's metrics of one step's `forward_backward` and `optim_step` calls, as one.

    `loss_sum`, `weight_sum` and `num_tokens` are added; `*_min` and `*_max` are extremes; `loss` is
    the mean of what each call minimised; the others are means weighted by `weight_sum` where a call
    has it, unless weights of both signs give that no meaning.
    """
    names = {name for one in passes for name in one}
    merged: dict[str, float] = {}
    for name in sorted(names):
        having = [one for one in passes if name in one]
        values = np.array([one[name] for one in having])
        weights = np.array([one.get("weight_sum", 1.0) for one in having])
        if name in TOTALS:
            merged[f"train/{name}"] = float(values.sum())
        elif name.endswith(("_min", "_max")):
            merged[f"train/{name}"] = float(values.min() if name.endswith("min") else values.max())
        else:
            plain = name == "loss" or weights.min() < 0 or not weights.any()
            merged[f"train/{name}"] = float(np.average(values, weights=None if plain else weights))
    return merged


def _summary(group: str, values: npt.NDArray[Any], *statistics: str) -> dict[str, float]:
    """`{"reward/mean": 0.5, "reward/std": 0.1}`: methods of the array, each under its name."""
    return {f"{group}/{name}": float(getattr(values, name)()) for name in statistics}


def _noise(groups: Sequence[Group]) -> dict[str, float]:
    """`reward/noise`: standard deviation of the rewards among equal rollouts of one task."""
    squares = count = 0.0
    for group in groups:
        equal: dict[object, list[float]] = {}
        for one in group.rollouts:
            if one.failure is None:
                said = tuple(segment.tokens for segment in one.trajectory.segments)
                equal.setdefault(said, []).append(one.reward)
        for rewards in equal.values():
            if len(rewards) > 1:
                squares += float(np.var(rewards, ddof=1)) * (len(rewards) - 1)
                count += len(rewards) - 1
    return {"reward/noise": (squares / count) ** 0.5} if count else {}


def _shape_metrics(rollouts: Sequence[Rollout], seconds: float | None) -> dict[str, float]:
    lengths = np.array([rollout.trajectory.num_sampled for rollout in rollouts])
    truncated = [rollout.trajectory.stop_reason == "length" for rollout in rollouts]
    metrics = {
        "rollout/truncated_fraction": float(np.mean(truncated)),
        "rollout/turns_mean": float(np.mean([r.trajectory.turns for r in rollouts])),
        "tokens/sampled": float(lengths.sum()),
        **_summary("tokens", lengths, "mean", "min", "max"),
        **_tails("tokens/{}", lengths),
    }
    for name, right in (("right", True), ("wrong", False)):
        of = [r for r in rollouts if r.failure is None and (r.reward >= PASSING) == right]
        metrics |= _tails(f"tokens/{name}_{{}}", [r.trajectory.num_sampled for r in of])
    if seconds:
        metrics["tokens/per_second"] = float(lengths.sum() / seconds)
    return metrics


def _tails(name: str, values: Sequence[float] | npt.NDArray[Any]) -> dict[str, float]:
    """`{"tokens/p50": 12.0, ...}` for "tokens/{}"; nothing of nothing."""
    if not len(values):
        return {}
    found = np.percentile(values, QUANTILES)
    return {name.format(f"p{q}"): float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _seconds(groups: Sequence[Group]) -> dict[str, float]:
    """`time/reward_p50_s` and so on, of each kind that was spent; and how many tools failed."""
    spent: dict[str, list[float]] = {}
    for group in groups:
        for kind, seconds in group.spent.items():
            spent.setdefault(kind, []).extend(seconds)
    failed, called = len(spent.pop("tool_failed", ())), len(spent.get("tool", ()))
    metrics: dict[str, float] = {}
    for kind, every in sorted(spent.items()):
        metrics |= _tails(f"time/{kind}_{{}}_s", every) | {f"time/{kind}_max_s": max(every)}
    if called:
        metrics |= {"tools/calls": float(called), "tools/failed": float(failed)}
        metrics["tools/failed_fraction"] = failed / called
    return metrics


def _by_dataset(groups: Sequence[Group]) -> dict[str, float]:
    """`dataset/<name>/reward_mean` and so on, where tasks have a text as their `dataset`."""
    rewards: dict[str, list[float]] = {}
    for group in groups:
        name = group.task.get("dataset") if hasattr(group.task, "get") else None
        if isinstance(name, str):
            rewards.setdefault(name, []).extend(group.rewards)
    metrics: dict[str, float] = {}
    for name, every in sorted(rewards.items()):
        metrics[f"dataset/{name}/rollouts"] = float(len(every))
        if every:
            metrics[f"dataset/{name}/reward_mean"] = float(np.mean(every))
            metrics[f"dataset/{name}/pass_rate"] = float(np.mean(np.array(every) >= PASSING))
    return metrics


def _token_metrics(rollouts: Sequence[Rollout], weights_version: int) -> dict[str, float]:
    sampled = np.array(
        [
            (version, logprob)
            for rollout in rollouts
            for segment in rollout.trajectory.segments
            for version, logprob, mask in zip(
                segment.versions, segment.logprobs, segment.mask, strict=True
            )
            if mask
        ]
    ).reshape(-1, 2)
    if not len(sampled):
        return {}
    ages = weights_version - sampled[:, 0]
    surprise = {"policy/surprise": float(-sampled[:, 1].mean())}
    return surprise | _summary("staleness", ages, "mean", "max") | _shares(rollouts, ages)


def _shares(rollouts: Sequence[Rollout], ages: npt.NDArray[np.float64]) -> dict[str, float]:
    """`staleness/share_2`: of tokens that are two steps old; and of rollouts of several weights."""
    drawn_by = [
        {v for segment in rollout.trajectory.segments for v in segment.versions if v >= 0}
        for rollout in rollouts
    ]
    found, counts = np.unique(ages.astype(int), return_counts=True)
    return {
        **{f"staleness/share_{a}": n / len(ages) for a, n in zip(found, counts, strict=True)},
        "staleness/mixed_fraction": sum(len(one) > 1 for one in drawn_by) / len(rollouts),
    }


KL_LIMIT = 0.5
"""Nats per token between the policy and the one that sampled: far outside any trust region."""
RATIO_LIMIT = 1e3
GRADIENT_LIMIT = 100.0
"""Norm before clipping; and twenty times the run's median."""
STILL = 60
"""Steps without a movement of the reward after which a run is said not to learn."""
COLLAPSE = 0.02
"""The share of its first entropy below which a policy has stopped exploring."""
ABOVE = (
    (
        "rollout/failed_fraction",
        0.0,
        "failures",
        "{:.0%} of the rollouts failed and are left out of training. The first traceback is in the "
        "log; try the reward with weaver_rl.check(reward, tasks).",
    ),
    (
        "train/kl_k3",
        KL_LIMIT,
        "kl",
        "The policy moved {:.2g} nats per token away from the one that sampled. "
        "Lower the learning rate, take fewer passes, or use a clipped loss (ppo).",
    ),
    (
        "rollout/truncated_fraction",
        0.9,
        "truncated",
        "{:.0%} of the replies were cut off by max_tokens. "
        "Raise it, or give a stop string, such as a newline.",
    ),
)
"""Metric, the most that is normal, the hint's name and text."""


def find_hints(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What looks wrong at the last step of `history`, oldest step first. {} is good news.

    By stable names: `{"gap": "Trainer and sampler disagree by up to 0.02 nats ..."}`.
    """
    if not history:
        return {}
    last = history[-1]
    first = next((row for row in history if "policy/surprise" in row), last)
    found = {
        name: text.format(last[metric])
        for metric, limit, name, text in ABOVE
        if last.get(metric, 0.0) > limit
    }
    gap, rounding = last.get("gap/max", 0.0), last.get("gap/rounding", ROUNDING["float32"])
    if gap > rounding:
        found["gap"] = (
            f"Trainer and sampler disagree by up to {gap:.3g} nats on a token; rounding costs at "
            f"most {rounding:.3g}. Check that both use the same weights and temperature."
        )
    # Centred advantages make the loss of a first on-policy pass 0 while its gradient is not.
    if last.get("train/loss") == 0.0 == last.get("train/grad_norm", 0.0):
        found["loss_zero"] = (
            "The loss and its gradient are exactly 0: nothing is learned. "
            "Look at the advantages (all rewards equal?) and at the weights (all masked?)."
        )
    mean = last.get("reward/mean", float("nan"))
    equal = last.get("groups/zero_variance_fraction", 0.0) >= 1 <= last.get("groups/count", 0.0)
    given = _by_design(history)
    fallen = _fallen(history)
    if fallen:
        found["fallen"] = fallen
    if exploding := _exploding(history):
        found["exploding"] = exploding
    if last.get("reward/noise", 0.0) > 0.25 * last.get("reward/std", 0.0):
        found["noisy"] = (
            f"Equal replies to one task are scored differently, by {last['reward/noise']:.2g} on "
            "average: the reward is noisy. Average several judgements, or make it deterministic."
        )
    if not (fallen or equal or given) and _still(history):
        found["still"] = (
            f"The mean reward has not moved for {STILL} steps. Look at the best and worst replies; "
            "try a larger learning rate, more samples a task or partial credit."
        )
    if equal and mean >= 1 and mean >= last.get("reward/max", mean):
        found["solved"] = "Every reply has the full reward: the tasks are solved. Stop here."
    elif equal and not fallen and not given:
        found["rewards_equal"] = (
            "In every group all rewards are equal, so there is nothing to compare. "
            "Use more samples a task, easier tasks, a higher temperature or partial credit."
        )
    before, now = first.get("policy/surprise", 0.0), last.get("policy/surprise", 0.0)
    if 0 <= now < COLLAPSE * before and last.get("reward/mean", 1.0) < 0.9:
        found["collapse"] = (
            f"The entropy fell from {before:.2g} to {now:.2g} nats before the tasks were solved: "
            "the policy no longer explores. Lower the learning rate or add entropy_coef."
        )
    return found


def _by_design(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether kept samples teach, a teacher does, or the KL to a reference beside a reward of 0."""
    last = history[-1]
    ends = ("reward/mean", "reward/min", "reward/max")
    rewards = [row.get(end, 0.0) for row in history for end in ends]
    if "rejection/kept" in last or "kl/teacher" in last:
        return True
    return "kl/reference" in last and not any(rewards)


def _fallen(history: Sequence[Mapping[str, float]]) -> str | None:
    """Below the best mean of five steps by half a standard deviation, and four standard errors."""
    rows = [row for row in history if "reward/mean" in row and "reward/std" in row]
    if len(rows) < 6:
        return None
    means = [row["reward/mean"] for row in rows]
    best = max(fmean(means[i : i + 5]) for i in range(len(means) - 5))
    spread = max(row["reward/std"] for row in rows)
    error = spread / max(rows[-1].get("rollout/count", 1.0), 1.0) ** 0.5
    if best - means[-1] <= max(0.5 * spread, 4 * error):
        return None
    return (
        f"The mean reward fell from its best, {best:.2g}, to {means[-1]:.2g}. Lower the learning "
        "rate, take fewer passes, and go on from a checkpoint before the fall."
    )


def _exploding(history: Sequence[Mapping[str, float]]) -> str | None:
    last = history[-1]
    norms = [row["train/grad_norm"] for row in history[:-1] if "train/grad_norm" in row]
    usual = median(norms) if norms else 0.0
    ratio = max(last.get("train/ratio_max", 0.0), last.get("off_policy/ratio_max", 0.0))
    norm = last.get("train/grad_norm", 0.0)
    if ratio <= RATIO_LIMIT and norm <= max(GRADIENT_LIMIT, 20 * usual):
        return None
    return (
        f"The numbers explode: the largest ratio is {ratio:.2g}, the gradient's norm {norm:.2g} "
        f"(usually {usual:.2g}). Lower the learning rate, take fewer passes, use fresher samples."
    )


def _still(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the halves of the last steps differ by less than two standard errors."""
    rows = [row for row in history if "reward/mean" in row][-STILL:]
    means = [row["reward/mean"] for row in rows]
    best = max((row.get("reward/max", 0.0) for row in rows), default=0.0)
    low = min((row.get("reward/min", 0.0) for row in rows), default=0.0)
    # Near the best, there is no room; a mean of exactly 0 is that of replies scored by each other.
    if len(rows) < STILL or best - fmean(means) <= 0.1 * (best - low) or not any(means):
        return False
    halves = means[: STILL // 2], means[STILL // 2 :]
    error: float = sum(variance(half) / len(half) for half in halves) ** 0.5
    return abs(fmean(halves[1]) - fmean(halves[0])) <= 2 * error
