"""Schedules: their ends, their middle, and that they never leave their bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver_rl.schedules import constant, cosine, linear


def test_golden_numbers() -> None:
    assert [constant(1.0, step, warmup=4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert constant(0.3, 0) == 0.3
    assert linear(1.0, 10, steps=20) == 0.5
    assert linear(1.0, 20, steps=20, floor=0.1) == pytest.approx(0.1)
    assert cosine(1.0, 12, steps=20, warmup=4) == pytest.approx(0.5)
    assert cosine(2.0, 4, steps=20, warmup=4) == 2.0
    assert cosine(2.0, 99, steps=20, floor=0.5) == pytest.approx(0.5)


@given(st.integers(0, 200), st.integers(0, 50), st.integers(0, 100))
def test_bounds(step: int, warmup: int, steps: int) -> None:
    for schedule in (linear, cosine):
        rate = schedule(1.0, step, steps=steps, warmup=warmup)
        assert 0.0 <= rate <= 1.0
        assert schedule(1.0, step + 1, steps=steps, warmup=warmup) <= rate or step < warmup
