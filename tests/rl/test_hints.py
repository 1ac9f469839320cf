"""Hints: each fires on its own numbers and not on healthy ones."""

from __future__ import annotations

import pytest

from weaver_rl.metrics import find_hints

HEALTHY = {
    "train/loss": 0.0,
    "train/grad_norm": 0.4,
    "train/kl_k3": 0.01,
    "gap/max": 2e-6,
    "groups/count": 4.0,
    "groups/zero_variance_fraction": 0.5,
    "rollout/failed_fraction": 0.0,
    "rollout/truncated_fraction": 0.1,
    "policy/surprise": 1.0,
    "reward/mean": 0.5,
    "reward/max": 1.0,
}


def test_healthy_numbers_give_no_hint() -> None:
    assert find_hints([]) == {}
    assert find_hints([HEALTHY]) == {}
    assert find_hints([{}]) == {}
    assert find_hints([{**HEALTHY, "gap/max": 0.1, "gap/rounding": 1.0}]) == {}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"train/grad_norm": 0.0}, "loss_zero"),
        ({"gap/max": 2e-3}, "gap"),
        ({"gap/max": 1.2, "gap/rounding": 1.0}, "gap"),
        ({"train/kl_k3": 3.0}, "kl"),
        ({"groups/zero_variance_fraction": 1.0}, "rewards_equal"),
        ({"rollout/failed_fraction": 0.25}, "failures"),
        ({"rollout/truncated_fraction": 1.0}, "truncated"),
        ({"policy/surprise": 0.001}, "collapse"),
        ({"groups/zero_variance_fraction": 1.0, "reward/mean": 1.0}, "solved"),
    ],
)
def test_each_hint(change: dict[str, float], name: str) -> None:
    assert list(find_hints([HEALTHY, {**HEALTHY, **change}])) == [name]


RUN = {**HEALTHY, "reward/std": 0.5, "reward/min": 0.0, "rollout/count": 128.0}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"reward/mean": 0.0, "groups/zero_variance_fraction": 1.0}, ["fallen"]),
        ({"reward/mean": 0.1}, ["fallen"]),
        ({"reward/mean": 0.45}, []),
        ({"reward/mean": 0.1, "rollout/count": 4.0}, []),
        ({"train/grad_norm": 900.0}, ["exploding"]),
        ({"train/ratio_max": 4e5}, ["exploding"]),
        ({"off_policy/ratio_max": 4e5}, ["exploding"]),
        ({"reward/noise": 0.3}, ["noisy"]),
        ({"reward/noise": 0.0}, []),
    ],
)
def test_a_run_that_gets_worse(change: dict[str, float], names: list[str]) -> None:
    assert list(find_hints([RUN] * 10 + [{**RUN, **change}])) == names


@pytest.mark.parametrize(
    ("slope", "change", "names"),
    [
        (0.0, {}, ["still"]),
        (0.002, {}, []),
        (0.0, {"reward/max": 0.31}, []),  # there is no more to earn
        (0.0, {"reward/mean": 0.0, "reward/min": -1.0}, []),  # replies scored by each other
    ],
)
def test_a_run_that_does_not_move(slope: float, change: dict[str, float], names: list[str]) -> None:
    rows = [{**RUN, "reward/mean": 0.3 + slope * i + 0.01 * (i % 2), **change} for i in range(60)]
    assert list(find_hints(rows)) == names
    assert find_hints(rows[:59]) == {}


def test_silent_where_the_reward_is_zero_by_design() -> None:
    flat = {"reward/mean": 0.0, "reward/max": 0.0, "reward/std": 0.0}
    equal = {**RUN, **flat, "groups/zero_variance_fraction": 1.0}
    assert find_hints([{**equal, "kl/reference": 0.3}] * 70) == {}
    assert find_hints([{**equal, "rejection/kept": 8.0}] * 70) == {}
    assert list(find_hints([equal] * 70)) == ["rewards_equal"]


def test_only_the_last_step_counts() -> None:
    assert find_hints([{**HEALTHY, "gap/max": 1.0}, HEALTHY]) == {}
