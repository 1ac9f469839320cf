"""Schedules: their ends, their middle, and that they never leave their bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver.errors import ConfigError
from weaver_rl.schedules import constant, cosine, for_model, linear


def test_golden_numbers() -> None:
    assert [constant(1.0, step, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert constant(0.3, 0) == 0.3
    assert linear(1.0, 10, steps=20) == 0.5
    assert linear(1.0, 20, steps=20, floor=0.1) == pytest.approx(0.1)
    assert cosine(1.0, 12, steps=20, warmup=4) == pytest.approx(0.5)
    assert cosine(2.0, 4, steps=20, warmup=4) == 2.0
    assert cosine(2.0, 99, steps=20, floor=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(270_000, 1e-3), (1, 1e-3), (10**9, 4e-5), (32 * 10**9, 1e-5), (4 * 10**11, 1e-5)],
)
def test_the_rate_follows_the_size_of_the_model(parameters: int, rate: float) -> None:
    assert for_model(parameters) == pytest.approx(rate)


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_no_larger_model_learns_faster(one: int, other: int) -> None:
    assert for_model(min(one, other)) >= for_model(max(one, other))
    assert 1e-5 <= for_model(one) <= (4.01e-5 if one >= 10**9 else 1e-3)


@pytest.mark.parametrize("unknown", [0, -1])
def test_a_model_of_unknown_size_wants_a_rate_by_name(unknown: int) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        for_model(unknown)


@given(st.integers(0, 200), st.integers(0, 50), st.integers(0, 100))
def test_bounds(step: int, warmup: int, steps: int) -> None:
    for schedule in (linear, cosine):
        rate = schedule(1.0, step, steps=steps, warmup=warmup)
        assert 0.0 <= rate <= 1.0
        assert schedule(1.0, step + 1, steps=steps, warmup=warmup) <= rate or step < warmup
