"""Datums stand exactly where their tokens do, and corrections are the formulas of their docs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rl.helpers import group, rollout, segment
from weaver.checks import check_datums
from weaver.losses import Gspo, Tokens
from weaver_rl import datums
from weaver_rl.credit.marks import Marks, spread
from weaver_rl.objectives import LOSSES, Aggregate, Behaviour, Objective
from weaver_rl.types import Group, Segment

ON_POLICY = Behaviour(True, 1.0)


def made(*rollouts: object, aggregate: Aggregate = "token") -> list[datums.Example]:
    whole = Group(task={}, rollouts=rollouts)  # type: ignore[arg-type]
    marks = spread([whole], np.arange(1.0, len(rollouts) + 1)[None])
    return datums.examples([whole], marks, behaviour=ON_POLICY, aggregate=aggregate)


def test_a_segment_by_hand() -> None:
    two_turns = Segment(
        tokens=(4, 5, 7, 2, 9, 3),
        mask=(0, 0, 1, 1, 0, 1),
        logprobs=(0, 0, -0.1, -0.2, 0, -0.5),
        sampling_logprobs=(0, 0, -0.3, -0.4, 0, -0.6),
        versions=(-1, -1, 0, 0, -1, 1),
    )
    (example,) = made(rollout(1.0, two_turns))
    datum = datums.to_datum(example, "importance_sampling")
    assert datum.model_input.to_ints() == [4, 5, 7, 2, 9]
    inputs = datum.loss_fn_inputs
    assert inputs["target_tokens"].tolist() == [5, 7, 2, 9, 3]
    assert inputs["weights"].tolist() == [0, 1, 1, 0, 1]
    assert inputs["advantages"].tolist() == [0, 1, 1, 0, 1]
    np.testing.assert_allclose(inputs["logprobs"], [0, -0.3, -0.4, 0, -0.6], atol=1e-7)
    whole = [Group(task={}, rollouts=(rollout(1.0, two_turns),))]
    (untempered,) = datums.examples(
        whole,
        spread(whole, np.ones((1, 1))),
        behaviour=Behaviour(False, 1.0),
        aggregate="token",
    )
    np.testing.assert_allclose(untempered.q, [0, -0.1, -0.2, 0, -0.5])


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), min_size=1, max_size=5),
            st.lists(st.integers(0, 99), max_size=5),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(LOSSES),
)
def test_what_was_sampled_is_what_is_trained(
    pieces: list[tuple[list[int], list[int]]], loss_fn: str
) -> None:
    segments = [segment(prompt, sampled) for prompt, sampled in pieces]
    batch = made(*(rollout(1.0, s) for s in segments))
    wanted = [s for s in segments if any(s.mask)]
    assert len(batch) == len(wanted)
    if not batch:
        return
    data = [datums.to_datum(e, loss_fn) for e in batch]
    check_datums(data, loss_fn, config={"denominator": 1.0})
    for datum, example, s in zip(data, batch, wanted, strict=True):
        targets = np.array(datum.loss_fn_inputs["target_tokens"])
        sampled = [t for t, m in zip(s.tokens, s.mask, strict=True) if m]
        assert targets[example.mask > 0].tolist() == sampled
        assert (*datum.model_input.to_ints(), s.tokens[-1]) == s.tokens


def test_failed_and_silent_rollouts_are_left_out() -> None:
    batch = made(rollout(None), rollout(1.0, segment([1], [])), rollout(1.0))
    assert [e.advantages.max() for e in batch] == [3.0]


@pytest.mark.parametrize(
    ("aggregate", "want"),
    [("token", [5.0, 0.2]), ("sequence", [2.0, 0.25]), ("constant", [20.0, 0.05])],
)
def test_denominators_and_shares(aggregate: Aggregate, want: list[float]) -> None:
    """Rollout 0 has 2 tokens, rollout 1 has 1 + 2 in two segments."""
    batch = made(
        rollout(1.0),
        rollout(1.0, segment([1], [2]), segment([1], [2, 3])),
        aggregate=aggregate,
    )
    total = datums.denominator(batch, aggregate, max_tokens=10)
    assert total == want[0]
    assert batch[0].weights.max() / total == pytest.approx(want[1])
    if aggregate == "sequence":
        assert sum(e.weights.sum() for e in batch) == pytest.approx(total)


def test_an_empty_batch_divides_by_one() -> None:
    assert datums.denominator([], "token", max_tokens=4) == 1.0


def test_corrections_by_hand() -> None:
    batch = made(rollout(1.0, segment([1], [2, 3]), segment([1], [4])))
    now = [e.q + e.mask * d for e, d in zip(batch, (0.1, 0.4), strict=True)]
    by_token = datums.corrected(batch, now, objective=Objective(correction="token"))
    np.testing.assert_allclose(by_token[0].weights, np.exp([0.1, 0.1]))
    np.testing.assert_allclose(by_token[1].weights, [np.exp(0.4)])
    capped = Objective(correction="sequence", correction_cap=1.5)
    by_sequence = datums.corrected(batch, now, objective=capped)
    np.testing.assert_allclose(by_sequence[0].weights, [1.5, 1.5])
    loose = Objective(correction="sequence", correction_cap=9.0)
    np.testing.assert_allclose(
        datums.corrected(batch, now, objective=loose)[1].weights, [np.exp(0.6)]
    )
    plain = datums.corrected(batch, now, objective=Objective(correction="none"))
    for before, after, lp in zip(batch, plain, now, strict=True):
        np.testing.assert_array_equal(after.weights, before.weights)
        np.testing.assert_array_equal(after.q, lp)


@pytest.mark.parametrize("name", ["token", "sequence", "none"])
def test_corrections_change_nothing_on_policy(name: str) -> None:
    batch = made(rollout(1.0), rollout(0.0))
    for before, after in zip(
        batch,
        datums.corrected(
            batch,
            [e.q for e in batch],
            objective=Objective(correction=name),  # type: ignore[arg-type]
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(after.weights, before.weights)
        np.testing.assert_array_equal(after.q, before.q)


def test_kl_in_the_loss() -> None:
    (example,) = made(rollout(1.0, segment([1, 2], [3, 4], logprob=-0.5)))
    example = replace(example, reference=np.array([-9.0, -1.5, -0.51]))
    inputs = datums.kl_datum(example).loss_fn_inputs
    np.testing.assert_allclose(inputs["logprobs"], [0, -1.5, -0.51])
    assert not np.any(inputs["advantages"])


@pytest.mark.parametrize(
    ("aggregate", "want"), [("token", 1.5), ("sequence", 1.0), ("constant", 10.0)]
)
def test_tokens_count_by_their_marks(aggregate: Aggregate, want: float) -> None:
    """One of three rollouts, and one of two segments, teaches nothing and is not computed."""
    one = rollout(1.0, segment([1], [2, 3]), segment([1], [4]))
    whole = [Group(task={}, rollouts=(one, rollout(1.0), rollout(None)))]
    marks = [
        [
            Marks(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.5, 0.0])),
            Marks(np.ones(2), np.zeros(2)),
            Marks(np.ones(2), np.ones(2)),
        ]
    ]
    (example,) = datums.examples(whole, marks, behaviour=ON_POLICY, aggregate=aggregate)
    assert example.place == (0, 0, 0)
    total = datums.denominator([example], aggregate, max_tokens=10)
    assert total == want
    np.testing.assert_allclose(example.advantages, [1.0, 2.0])
    shares = np.array([1.0, 0.5]) / (1.5 if aggregate == "sequence" else 1.0)
    np.testing.assert_allclose(example.weights, shares)


@pytest.mark.parametrize("name", [None, "ratio", "token", "sequence", "none"])
def test_how_far_the_sampler_is_shows_whatever_is_corrected(name: str | None) -> None:
    batch = made(rollout(1.0, segment([1], [2, 3]), segment([1], [4])), rollout(0.0))
    moved = [np.array([1.0, -0.5]), np.array([-0.6]), np.array([0.0, 0.0, 0.2])]
    now = [e.q + d * e.mask for e, d in zip(batch, moved, strict=True)]
    objective = Objective(correction=name)  # type: ignore[arg-type]
    r = np.exp([1.0, -0.5, -0.6, 0.0, 0.2])
    got = datums.off_policy_metrics(batch, now, objective=objective)
    assert got == pytest.approx(
        {
            "off_policy/kl": (r - 1 - np.log(r)).mean(),
            "off_policy/ess": r.sum() ** 2 / (r**2).sum() / 5,
            "off_policy/ratio_max": np.e,
            "off_policy/truncated_fraction": 0.0 if name == "sequence" else 0.2,
        }
    )
    capped = Objective(config={"ratio_cap": 1.1}, correction=name)  # type: ignore[arg-type]
    share = datums.off_policy_metrics(batch, now, objective=capped)["off_policy/truncated_fraction"]
    assert share == pytest.approx(0.4)


def test_what_has_moved_without_bound_is_still_a_number() -> None:
    batch = made(rollout(1.0))
    for moved in (2000.0, -2000.0):
        now = [e.q + moved * e.mask for e in batch]
        got = datums.off_policy_metrics(batch, now, objective=Objective())
        assert np.isfinite(list(got.values())).all()


def test_the_ratio_of_gspo_covers_a_rollout() -> None:
    batch = made(rollout(1.0, segment([1], [2, 3]), segment([1], [4])), rollout(0.0))
    moved = (np.array([0.1, 0.3]), np.array([-0.7]), np.array([0.0, 0.2, 0.4]))
    now = [e.q + d for e, d in zip(batch, moved, strict=True)]
    shifted = datums.one_ratio(batch, now)
    means = [((lp - e.q) * e.mask).sum() / e.mask.sum() for e, lp in zip(shifted, now, strict=True)]
    np.testing.assert_allclose(means, [-0.1, -0.1, 0.3])
    assert all(not e.q[e.mask == 0].any() for e in shifted)
    (_, one), (_, two) = (
        gspo([e], [lp]) for e, lp in zip(shifted[:2], now[:2], strict=True)
    )  # the engine sees each segment alone
    value, whole = gspo(batch[:2], now[:2])
    np.testing.assert_allclose([*one, *two], whole, rtol=1e-12)
    assert value == pytest.approx(-3 * np.exp(-0.1))


def gspo(batch: list[datums.Example], now: list[np.ndarray]) -> tuple[float, list[float]]:
    """Loss of these examples as one sequence, with its gradient, as the engine has it."""
    lp = torch.tensor(np.concatenate(now), requires_grad=True)
    q, A, w, mask = (
        torch.tensor(np.concatenate([getattr(e, name) for e in batch]))
        for name in ("q", "advantages", "weights", "mask")
    )
    tokens = Tokens(
        lp=lp,
        inputs={"logprobs": q, "advantages": A},
        counted=mask > 0,
        datum=torch.zeros(len(lp), dtype=torch.int64),
    )
    token = Gspo(clip_low_threshold=0.5, clip_high_threshold=2.0).per_token(tokens)
    loss = (w * token.value).sum()
    (gradient,) = torch.autograd.grad(loss, lp)
    return loss.item(), gradient.tolist()


def test_the_gap_counts_only_tokens_of_these_weights() -> None:
    batch = made(
        rollout(1.0, segment([1], [2, 3], version=3)), rollout(1.0, segment([1], [2], version=2))
    )
    now = [batch[0].q + np.array([0.0, 1e-5]), batch[1].q + 0.5]
    assert datums.logprob_gap(batch, now, version=3) == pytest.approx(1e-5)
    assert datums.logprob_gap(batch, now, version=2) == pytest.approx(0.5)
    assert datums.logprob_gap(batch, now, version=1) is None


def test_shorter_groups_of_a_batch() -> None:
    groups = [group(1.0, 0.0), group(1.0)]
    got = datums.examples(
        groups,
        spread(groups, np.array([[1.0, -1.0], [2.0, 0.0]])),
        behaviour=ON_POLICY,
        aggregate="token",
    )
    assert [e.advantages.sum() for e in got] == [2.0, -2.0, 4.0]
    assert [e.rollout for e in got] == [0, 1, 2]
