"""What is measured in a step, and under which name; loops call it, loggers and reports read it.

Pure functions of groups and of the engine's metrics. A number that cannot be computed (the mean
reward when every rollout failed) is left out, so that no metric is ever NaN. The names and their
meanings are listed in docs/logging.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from weaver_rl.types import Group, Rollout

PASSING = 1.0
"""The reward from which a rollout counts as solved."""
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
    if groups:
        metrics["groups/zero_variance_fraction"] = equal / len(groups)
        solved = [max(group.rewards, default=-np.inf) >= PASSING for group in groups]
        metrics["reward/pass_any"] = float(np.mean(solved))
        metrics |= _noise(groups)
    if scored:
        rewards = np.array([rollout.reward for rollout in scored])
        metrics |= _summary("reward", rewards, "mean", "std", "min", "max")
        metrics["reward/pass_rate"] = float((rewards >= PASSING).mean())
    for name in sorted({name for rollout in scored for name in rollout.metrics}):
        values = [r.metrics[name] for r in scored if name in r.metrics]
        metrics[f"score/{name}"] = float(np.mean(values))
    return metrics


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
    }
    if seconds:
        metrics["tokens/per_second"] = float(lengths.sum() / seconds)
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
    return surprise | _summary("staleness", ages, "mean", "max")
