"""Step metrics: golden numbers by hand, and no NaN whatever is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.rl.helpers import group, rollout, segment
from weaver_rl.credit.marks import Marks
from weaver_rl.metrics import credit_metrics, rollout_metrics, train_metrics
from weaver_rl.types import Group


def test_numbers_by_hand() -> None:
    metrics = rollout_metrics(
        [group(1.0, 0.0, None), group(0.5, 0.5)], weights_version=3, seconds=2.0
    )
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.125))
    assert (metrics["reward/min"], metrics["reward/max"]) == (0.0, 1.0)
    assert (metrics["reward/pass_rate"], metrics["reward/pass_any"]) == (0.25, 0.5)
    assert (metrics["rollout/count"], metrics["rollout/failed"]) == (5, 1)
    assert metrics["rollout/failed_fraction"] == 0.2
    assert metrics["groups/zero_variance_fraction"] == 0.5
    assert (metrics["tokens/sampled"], metrics["tokens/per_second"]) == (10, 5)
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (3, 3)
    assert metrics["policy/surprise"] == pytest.approx(0.505)


def test_staleness_is_per_token() -> None:
    old, new = segment([1], [2, 3, 4], version=1), segment([1], [2], version=4)
    metrics = rollout_metrics(
        [Group(task={}, rollouts=(rollout(1.0, old, new),))], weights_version=5
    )
    assert metrics["staleness/mean"] == pytest.approx((3 * 4 + 1) / 4)
    assert metrics["staleness/max"] == 4


def test_truncation_and_scores() -> None:
    first, second = rollout(1.0), rollout(0.0)
    cut = replace(
        first,
        trajectory=replace(first.trajectory, stop_reason="length"),
        metrics={"format": 1.0, "rare": 3.0},
    )
    groups = [Group(task={}, rollouts=(cut, replace(second, metrics={"format": 0.0})))]
    metrics = rollout_metrics(groups, weights_version=0)
    assert metrics["rollout/truncated_fraction"] == 0.5
    assert (metrics["score/format"], metrics["score/rare"]) == (0.5, 3.0)


@pytest.mark.parametrize("groups", [[], [group(None)], [Group(task={}, rollouts=())]])
def test_what_cannot_be_computed_is_left_out(groups: list[Group]) -> None:
    metrics = rollout_metrics(groups, weights_version=0, seconds=0.0)
    assert "reward/mean" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_passes_are_merged_by_weight() -> None:
    passes = [
        {"loss": 1.0, "loss_sum": 3.0, "weight_sum": 3.0, "ratio_max": 1.1, "ratio_min": 0.9},
        {"loss": 2.0, "loss_sum": 2.0, "weight_sum": 1.0, "ratio_max": 1.5, "ratio_min": 0.95},
        {"grad_norm": 0.7},
    ]
    metrics = train_metrics(passes)
    assert metrics["train/loss"] == 1.5  # two steps, which minimised 1 and 2
    assert metrics["train/weight_sum"] == 4.0
    assert (metrics["train/ratio_min"], metrics["train/ratio_max"]) == (0.9, 1.5)
    assert metrics["train/grad_norm"] == 0.7
    assert train_metrics([]) == {}


@pytest.mark.parametrize("weight_sums", [(0.1, -3.0), (-2.0, -2.0), (0.0, 0.0), (5.0, 1.0)])
def test_the_loss_is_what_was_minimised_whatever_the_signs(weight_sums: tuple[float, ...]) -> None:
    """Weights of `cross_entropy` are advantages, whose sum is about 0 and of any sign."""
    metrics = train_metrics(
        [
            {"loss": loss, "loss_sum": loss * 40, "weight_sum": total, "num_tokens": 60.0, "x": 2.0}
            for loss, total in zip((0.5, 0.3), weight_sums, strict=True)
        ]
    )
    assert metrics["train/loss"] == pytest.approx(0.4)
    assert metrics["train/x"] == pytest.approx(2.0)


def test_equal_replies_that_are_scored_differently_are_noise() -> None:
    noisy = rollout_metrics([group(1.0, 0.0, None), group(0.5, 0.5)], weights_version=0)
    assert noisy["reward/noise"] == pytest.approx(0.5)
    different = Group(
        task={}, rollouts=(rollout(1.0, segment([1], [2])), rollout(0.0, segment([1], [3])))
    )
    assert "reward/noise" not in rollout_metrics([different], weights_version=0)


def test_a_fully_masked_step_has_no_nan() -> None:
    metrics = train_metrics([{"loss": 0.0, "loss_sum": 0.0, "weight_sum": 0.0, "kl_k3": 0.0}])
    assert metrics["train/loss"] == 0.0


def test_lengths_of_right_and_wrong_replies() -> None:
    lengths = [(1.0, 2), (1.0, 4), (0.0, 9), (None, 50)]
    rollouts = tuple(rollout(reward, segment([1], [2] * n)) for reward, n in lengths)
    metrics = rollout_metrics([Group(task={}, rollouts=rollouts)], weights_version=0)
    for name, of in (("", [2, 4, 9, 50]), ("right_", [2, 4]), ("wrong_", [9])):
        for q in (50, 90, 99):
            assert metrics[f"tokens/{name}p{q}"] == pytest.approx(np.percentile(of, q))


def test_the_deviation_within_groups_is_not_that_between_them() -> None:
    metrics = rollout_metrics([group(1.0, 1.0), group(0.0, 0.0, None)], weights_version=0)
    assert (metrics["groups/reward_std"], metrics["reward/std"]) == (0.0, 0.5)
    mixed = rollout_metrics([group(1.0, 0.0), group(0.5)], weights_version=0)
    assert mixed["groups/reward_std"] == 0.5


def test_rewards_by_data_set() -> None:
    sets = [("easy", (1.0, 0.5)), ("hard", (0.0, None)), ("hard", (1.0,)), (None, (9.0,))]
    groups = [replace(group(*rewards), task={"dataset": name}) for name, rewards in sets]
    metrics = rollout_metrics(groups, weights_version=0)
    assert {k: v for k, v in metrics.items() if k.startswith("dataset/")} == {
        "dataset/easy/rollouts": 2, "dataset/easy/reward_mean": 0.75, "dataset/easy/pass_rate": 0.5,
        "dataset/hard/rollouts": 2, "dataset/hard/reward_mean": 0.5, "dataset/hard/pass_rate": 0.5,
    }  # fmt: skip


def test_seconds_and_their_tails() -> None:
    spent = {"tool": (0.1, 0.2, 4.0), "tool_failed": (4.0,), "reward": (0.5,)}
    metrics = rollout_metrics([replace(group(1.0), spent=spent), group(0.0)], weights_version=0)
    assert (metrics["tools/calls"], metrics["tools/failed"]) == (3, 1)
    assert metrics["tools/failed_fraction"] == pytest.approx(1 / 3)
    assert (metrics["time/tool_p50_s"], metrics["time/tool_max_s"]) == (0.2, 4.0)
    assert metrics["time/reward_p99_s"] == 0.5
    assert "tools/calls" not in rollout_metrics([group(1.0)], weights_version=0)


def test_marks_in_numbers() -> None:
    parts = {"outcome": np.array([1.0, -3.0]), "kl": np.array([0.0, -1.0])}
    counted = Marks(np.array([1.0, -4.0]), np.ones(2), parts, {"kl/reference": np.array([0.0, 2])})
    masked = Marks(np.array([99.0, 0.5]), np.array([0.0, 1.0]), parts, counted.measured)
    groups = [group(1.0, 0.0, None)]
    metrics = credit_metrics(groups, [[counted, masked, Marks(np.full(2, 7.0), np.ones(2))]])
    assert metrics == pytest.approx({
        "credit/abs_max": 4.0, "credit/mean_abs": 5.5 / 3, "credit/counted_fraction": 0.75,
        "credit/outcome/mean": -5 / 3, "credit/outcome/mean_abs": 7 / 3,
        "credit/kl/mean": -2 / 3, "credit/kl/mean_abs": 2 / 3, "kl/reference": 4 / 3,
    })  # fmt: skip
    assert credit_metrics([group(None)], [[Marks(np.zeros(2), np.zeros(2))]]) == {}
