"""Hints: each fires on its own numbers and not on healthy ones."""

from __future__ import annotations

import pytest

from weaver_rl.hints import find_hints

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


def test_only_the_last_step_counts() -> None:
    assert find_hints([{**HEALTHY, "gap/max": 1.0}, HEALTHY]) == {}
