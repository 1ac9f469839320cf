"""Advantages: golden numbers, and what holds for every batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weaver.errors import ConfigError
from weaver_rl.advantages import ADVANTAGES, advantage_fn

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 4.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
VALID = np.array([[True] * 4, [True, True, True, False], [True, False, False, False]])
GOLDEN = {
    "group_centred": [[0.5, -0.5, -0.5, 0.5], [-2, 2, 0, 0], [0] * 4],
    "dr_grpo": [[0.5, -0.5, -0.5, 0.5], [-2, 2, 0, 0], [0] * 4],
    "standardised": [[1, -1, -1, 1], [-(1.5**0.5), 1.5**0.5, 0, 0], [0] * 4],
    "leave_one_out": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-3, 3, 0, 0], [0] * 4],
    "raw": [[1, 0, 0, 1], [0, 4, 2, 0], [3, 0, 0, 0]],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name: str) -> None:
    got = ADVANTAGES[name](REWARDS, VALID)
    np.testing.assert_allclose(got, GOLDEN[name], atol=5e-6)


def test_reinforce_pp_standardises_the_batch() -> None:
    values = REWARDS[VALID]
    want = (values - values.mean()) / values.std()
    got = ADVANTAGES["reinforce_pp"](REWARDS, VALID)
    np.testing.assert_allclose(got[VALID], want, atol=1e-5)
    assert (got[~VALID] == 0).all()


def test_reinforce_pp_baseline_centres_groups_first() -> None:
    centred = np.array([0.5, -0.5, -0.5, 0.5, -2, 2, 0, 0])
    got = ADVANTAGES["reinforce_pp_baseline"](REWARDS, VALID)
    np.testing.assert_allclose(got[VALID], centred / centred.std(), atol=1e-5)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(0, 4), st.integers(0, 5)))
    rewards = draw(hnp.arrays(np.float64, shape, elements=st.floats(-100, 100, width=16)))
    return rewards, draw(hnp.arrays(np.bool_, shape))


@given(batches(), st.sampled_from(sorted(ADVANTAGES)))
def test_finite_and_zero_where_invalid(batch: tuple[np.ndarray, np.ndarray], name: str) -> None:
    rewards, valid = batch
    got = ADVANTAGES[name](rewards, valid)
    assert got.shape == rewards.shape
    assert np.isfinite(got).all()
    assert (got[~valid] == 0).all()


@given(batches(), st.sampled_from(["group_centred", "standardised", "leave_one_out"]))
def test_groups_sum_to_zero_whatever_is_added(
    batch: tuple[np.ndarray, np.ndarray], name: str
) -> None:
    rewards, valid = batch
    got = ADVANTAGES[name](rewards, valid)
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(ADVANTAGES[name](rewards + 7.0, valid), got, atol=1e-4)


@given(batches(), st.sampled_from(sorted(ADVANTAGES)))
def test_better_samples_never_get_less(batch: tuple[np.ndarray, np.ndarray], name: str) -> None:
    rewards, valid = batch
    got = ADVANTAGES[name](rewards, valid)
    for r, a, v in zip(rewards, got, valid, strict=True):
        if name == "reinforce_pp" or v.sum() > 1:
            order = np.argsort(r[v], kind="stable")
            assert (np.diff(a[v][order]) >= -1e-9).all()


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"raw", "reinforce_pp"}))
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(name: str, reward: float) -> None:
    got = ADVANTAGES[name](np.full((2, 7), reward), np.ones((2, 7), dtype=bool))
    assert (got == 0).all()


@pytest.mark.parametrize("name", ["standardised", "reinforce_pp", "reinforce_pp_baseline"])
def test_the_deviation_divides_by_n_or_one_less(name: str) -> None:
    rewards = REWARDS[:1] if name == "standardised" else REWARDS
    centred = rewards - rewards.mean(axis=None if name == "reinforce_pp" else 1, keepdims=True)
    for ddof in (0, 1):
        got = advantage_fn(name, ddof=ddof)(rewards, np.ones(rewards.shape, dtype=bool))
        np.testing.assert_allclose(got, centred / centred.std(ddof=ddof), atol=1e-5)
    for wrong, ddof in (("raw", 1), (name, 2)):
        with pytest.raises(ConfigError, match="ddof"):
            advantage_fn(wrong, ddof=ddof)


def test_names() -> None:
    assert advantage_fn("raw") is ADVANTAGES["raw"]
    assert advantage_fn(ADVANTAGES["raw"]) is ADVANTAGES["raw"]
    with pytest.raises(ConfigError, match="Did you mean 'leave_one_out'"):
        advantage_fn("leave_out_one")
