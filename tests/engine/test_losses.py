"""Every loss, value and gradient, against a float64 numpy form written apart from the engine's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.engine.conftest import datum, job
from tests.optional import given, st
from weaver.checks import check_loss, make_loss
from weaver.engine.torch.logprobs import Scores
from weaver.engine.torch.objective import Objective
from weaver.losses import LOSSES, Loss, RatioLoss, TokenLoss, Tokens, kl_estimates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver.types import Datum

Array = np.ndarray[Any, np.dtype[np.float64]]
LENGTHS = (1, 7, 4, 12)
OF_TOKENS = {name for name, loss in LOSSES.items() if None in loss.heads}
"""Others are in test_scalar.py."""
RATIO_LOSSES = {name for name, loss in LOSSES.items() if issubclass(loss, RatioLoss)}


@dataclass
class Case:
    """Random tokens of four datums; float64 arrays [T] hold exactly what the datums hold."""

    lp: Array
    q: Array
    A: Array
    w: Array
    entropy: Array
    datums: list[Datum]


def make_case(loss_fn: str, *, seed: int = 0, gap: float = 0.4) -> Case:
    rng = np.random.default_rng(seed)
    total = sum(LENGTHS)
    lp = rng.uniform(-3, -0.01, total)
    q = (lp + rng.normal(0, gap, total)).astype(np.float32)
    A = rng.normal(0, 1, total).astype(np.float32)
    w = rng.choice(np.array([0, 0.5, 1, 2], np.float32), total)
    datums = []
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        inputs: dict[str, object] = {"weights": w[rows]}
        if loss_fn in RATIO_LOSSES:
            inputs |= {"logprobs": q[rows], "advantages": A[rows]}
        if loss_fn == "surrogate":
            inputs = {"surrogate_weights": w[rows]}
        datums.append(datum([3] * (length + 1), **inputs))
        start += length
    q64, A64, w64 = (x.astype(np.float64) for x in (q, A, w))
    return Case(lp, q64, A64, w64, rng.uniform(0.1, 4, total), datums)


def engine_form(
    case: Case, loss_fn: str, config: Mapping[str, Any]
) -> tuple[float, Array, dict[str, float]]:
    """Loss, gradient and metrics as the engine computes them, in two micro-batches."""
    objective = Objective(job("run", case.datums, loss_fn, config=config))
    lp = torch.tensor(case.lp, requires_grad=True)
    scores = Scores(lp, torch.tensor(case.entropy))
    cut = sum(LENGTHS[:2])
    first = objective.add([0, 1], scores.rows(0, cut))
    second = objective.add([2, 3], scores.rows(cut, len(case.lp)))
    total = torch.cat([first, second]).sum()
    (gradient,) = torch.autograd.grad(total, lp)
    return total.item(), gradient.numpy(), objective.metrics()


def formula(
    loss_fn: str, lp: torch.Tensor, q: torch.Tensor, A: torch.Tensor, **options: float
) -> TokenLoss:
    """The loss of the tokens of one datum, all of which are counted."""
    tokens = Tokens(
        lp=lp,
        inputs={"logprobs": q, "advantages": A},
        counted=torch.ones(len(lp), dtype=torch.bool),
        datum=torch.zeros(len(lp), dtype=torch.int64),
    )
    return make_loss(loss_fn, check_loss(loss_fn, options)).per_token(tokens)


# --- the numpy forms: value and derivative by lp of each token, before weights ------------------


def np_cross_entropy(c: Case) -> tuple[Array, Array]:
    return -c.lp, -np.ones_like(c.lp)


def np_importance_sampling(c: Case, ratio_cap: float = math.inf) -> tuple[Array, Array]:
    weighted = np.minimum(np.exp(c.lp - c.q), ratio_cap) * c.A
    return -weighted, -weighted


def np_ppo(
    c: Case,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
    dual_clip: float = math.inf,
    ratio_cap: float = math.inf,
) -> tuple[Array, Array]:
    value, slope = np.empty_like(c.lp), np.empty_like(c.lp)
    for t in range(len(c.lp)):
        r, a = min(math.exp(c.lp[t] - c.q[t]), ratio_cap), c.A[t]
        bounded = min(max(r, clip_low_threshold), clip_high_threshold)
        if a >= 0:
            value[t], free = -min(r, bounded) * a, r <= bounded
        else:
            value[t], free = -max(r, bounded) * a, r >= bounded
            if value[t] > -dual_clip * a:
                value[t], free = -dual_clip * a, False
        slope[t] = -r * a if free else 0.0
    return value, slope


def np_cispo(
    c: Case, clip_low_threshold: float = 0.0, clip_high_threshold: float = 4.0
) -> tuple[Array, Array]:
    weight = np.clip(np.exp(c.lp - c.q), clip_low_threshold, clip_high_threshold) * c.A
    return -weight * c.lp, -weight


def np_dro(c: Case, beta: float = 0.05) -> tuple[Array, Array]:
    gap = c.lp - c.q
    return -c.lp * c.A + beta / 2 * gap * gap, -c.A + beta * gap


def np_weighted(c: Case, loss_fn: str, config: Mapping[str, Any]) -> tuple[float, Array]:
    """Σ w·value and its gradient; GSPO, whose ratio is a sequence's, is written out here."""
    options = {k: v for k, v in config.items() if k in LOSSES[loss_fn].options()}
    entropy_coef, kl_coef = options.pop("entropy_coef", 0.0), options.pop("kl_coef", 0.0)
    if loss_fn == "gspo":
        return np_gspo(c, **options)
    if loss_fn == "surrogate":
        return float(c.w @ c.lp), c.w
    form = {
        "cross_entropy": np_cross_entropy,
        "importance_sampling": np_importance_sampling,
        "ppo": np_ppo,
        "cispo": np_cispo,
        "dro": np_dro,
    }[loss_fn]
    value, slope = form(c, **options)
    log_ratio = c.lp - c.q
    value = value - entropy_coef * c.entropy + kl_coef * (np.exp(log_ratio) - 1 - log_ratio)
    slope = slope + kl_coef * (np.exp(log_ratio) - 1)
    return float(c.w @ value), c.w * slope


def np_gspo(
    c: Case, clip_low_threshold: float = 1 - 3e-4, clip_high_threshold: float = 1 + 4e-4
) -> tuple[float, Array]:
    loss, gradient = 0.0, np.zeros_like(c.lp)
    start = 0
    for length in LENGTHS:
        rows = np.arange(start, start + length)[c.w[start : start + length] != 0]
        start += length
        if not len(rows):
            continue
        s = math.exp((c.lp[rows] - c.q[rows]).mean())
        bounded = min(max(s, clip_low_threshold), clip_high_threshold)
        for t in rows:
            loss -= c.w[t] * min(s * c.A[t], bounded * c.A[t])
            if s * c.A[t] <= bounded * c.A[t]:
                gradient[t] -= c.w[t] * c.A[t] * s
    return loss, gradient


CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
CONFIGS: Sequence[tuple[str, dict[str, Any]]] = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("importance_sampling", {"ratio_cap": 1.1}),
    ("importance_sampling", {"entropy_coef": 0.3, "kl_coef": 0.7}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05, "dual_clip": 1.3}),
    ("ppo", {"ratio_cap": 1.5, "clip_high_threshold": 3.0, "kl_coef": 0.1}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("cispo", {"clip_high_threshold": 1.5}),
    ("gspo", {}),
    ("gspo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}),
    ("dro", {}),
    ("dro", {"beta": 2.0}),
    ("surrogate", {}),
]


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS)
@pytest.mark.parametrize("reduction", [{}, {"reduction": "sum"}, {"denominator": 13.0}])
def test_value_and_gradient_equal_the_numpy_form(
    loss_fn: str, config: dict[str, Any], reduction: dict[str, Any]
) -> None:
    case = make_case(loss_fn)
    loss, gradient, metrics = engine_form(case, loss_fn, config | reduction)
    total, slope = np_weighted(case, loss_fn, config)
    by = reduction.get("denominator", 1.0)
    if not reduction and loss_fn != "surrogate":
        by = case.w.sum()
    assert loss == pytest.approx(total / by, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient, slope / by, rtol=1e-6, atol=1e-6)
    assert metrics["loss"] == pytest.approx(total / by, rel=1e-9)
    assert metrics["loss_sum"] == pytest.approx(total, rel=1e-9)
    assert metrics["weight_sum"] == case.w.sum()
    assert metrics["num_tokens"] == sum(LENGTHS)


def test_every_specified_loss_is_here_and_no_other() -> None:
    assert RATIO_LOSSES == OF_TOKENS - {"cross_entropy", "surrogate"}
    assert {name for name, _ in CONFIGS} == OF_TOKENS


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_the_page_on_losses_has_its_options_and_defaults(loss_fn: str) -> None:
    lines = (Path(__file__).parents[2] / "docs" / "losses.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{loss_fn}` |"))
    for name, option in LOSSES[loss_fn].options().items():
        if name in Loss.options():
            continue
        if option.default:
            assert f"`{name}` {option.default:g}" in row
        else:
            assert f"`{name}`" in row or "the above" in row


def test_ratio_metrics_equal_the_numpy_form() -> None:
    case = make_case("ppo", gap=0.6)
    _, _, metrics = engine_form(case, "ppo", {})
    kept = case.w != 0
    gap = (case.lp - case.q)[kept]
    ratio = np.exp(gap)
    clipped = np.minimum(ratio * case.A[kept], np.clip(ratio, 0.8, 1.2) * case.A[kept])
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_fraction": (clipped < ratio * case.A[kept] - 1e-12).mean(),
        "clip_low_fraction": ((ratio < 0.8) & (case.A[kept] < 0)).mean(),
        "clip_high_fraction": ((ratio > 1.2) & (case.A[kept] > 0)).mean(),
        "kl_k1": -gap.mean(),
        "kl_k2": (gap**2 / 2).mean(),
        "kl_k3": (ratio - 1 - gap).mean(),
        "entropy": case.entropy[kept].mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["clip_low_fraction"] > 0 < metrics["clip_high_fraction"]


@pytest.mark.parametrize(
    ("lp", "q", "A", "expected"),
    [
        (-1.0, -1.0, 2.0, -2.0),  # on policy
        (-1.0, -2.0, 1.0, -1.2),  # r = e, clipped above
        (-2.0, -1.0, -1.0, 0.8),  # r = 1/e, clipped below
        (-1.0, -2.0, -1.0, math.e),  # not clipped: it hurts
        (-0.5, -2.5, -1.0, 3.0),  # r = e², dual clip
    ],
)
def test_ppo_golden_numbers(lp: float, q: float, A: float, expected: float) -> None:
    lp_T, q_T, A_T = (torch.tensor([value]) for value in (lp, q, A))
    token = formula("ppo", lp_T, q_T, A_T, **CLIP, dual_clip=3.0)
    assert token.value.item() == pytest.approx(expected, rel=1e-6)


def test_golden_numbers_of_the_other_losses() -> None:
    lp, q, A = torch.tensor([-1.0, -0.5]), torch.tensor([-1.5, -0.5]), torch.tensor([2.0, -1.0])
    e = math.exp(0.5)
    gspo = {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}
    found = {
        "cross_entropy": formula("cross_entropy", lp, q, A),
        "importance_sampling": formula("importance_sampling", lp, q, A),
        "truncated": formula("importance_sampling", lp, q, A, ratio_cap=1.25),
        "cispo": formula("cispo", lp, q, A, **CLIP),
        "gspo": formula("gspo", lp, q, A, **gspo),
        "dro": formula("dro", lp, q, A, beta=0.4),
        "surrogate": formula("surrogate", lp, q, A),
    }
    expected = {
        "cross_entropy": [1.0, 0.5],
        "importance_sampling": [-2 * e, 1.0],
        "truncated": [-2.5, 1.0],
        "cispo": [2.4, -0.5],
        "gspo": [-2.2, math.exp(0.25)],
        "dro": [2.0 + 0.05, -0.5],
        "surrogate": [-1.0, -0.5],  # its weight is the coefficient
    }
    for name, values in expected.items():
        assert found[name].value.tolist() == pytest.approx(values, rel=1e-6), name


@pytest.mark.parametrize("ratio", [3.0, 1.0, 0.5, 0.1, 1e-3])
def test_cispo_lets_go_of_what_the_policy_has_left(ratio: float) -> None:
    lp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    token = formula("cispo", lp, torch.zeros(1), -torch.ones(1))
    (slope,) = torch.autograd.grad(token.value.sum(), lp)
    assert slope.item() == pytest.approx(ratio, rel=1e-6)


def test_gspo_clips_where_its_paper_does() -> None:
    q = torch.full((2,), -1.0).double()
    for moved, A, learns in (
        (3e-4, 1.0, True),
        (5e-4, 1.0, False),
        (-2e-4, -1.0, True),
        (-4e-4, -1.0, False),
        (-4e-4, 1.0, True),
    ):
        lp = (q + moved).requires_grad_()
        token = formula("gspo", lp, q, torch.full((2,), A))
        (slope,) = torch.autograd.grad(token.value.sum(), lp)
        assert bool(slope.any()) is learns


def test_gspo_is_that_of_whole_sequences_where_they_have_one_advantage() -> None:
    """The token variant (eq. 13) has the gradient of eq. 5 then."""
    q, A = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.full((3,), 1.5)
    slopes = []
    for whole in (False, True):
        lp = (q + torch.tensor([0.1, -0.3, 0.05])).requires_grad_()
        value = formula("gspo", lp, q, A, clip_low_threshold=0.5, clip_high_threshold=2.0).value
        value = -3 * (lp - q).mean().exp() * 1.5 if whole else value.sum()
        slopes.append((value.item(), torch.autograd.grad(value, lp)[0].tolist()))
    assert slopes[0][0] == pytest.approx(slopes[1][0])
    assert slopes[0][1] == pytest.approx(slopes[1][1])


@pytest.mark.parametrize("loss_fn", sorted(RATIO_LOSSES))
def test_tokens_of_weight_zero_cannot_be_felt(loss_fn: str) -> None:
    case = make_case(loss_fn)
    wild = make_case(loss_fn)
    masked = case.w == 0
    start = 0
    for i, length in enumerate(LENGTHS):
        rows = slice(start, start + length)
        start += length
        wild.datums[i] = datum(
            [3] * (length + 1),
            weights=case.w[rows],
            logprobs=np.where(masked[rows], -1e30, case.q[rows]),
            advantages=np.where(masked[rows], 1e30, case.A[rows]),
        )
    loss, gradient, metrics = engine_form(case, loss_fn, {})
    wild_loss, wild_gradient, wild_metrics = engine_form(wild, loss_fn, {})
    assert (loss, metrics) == (wild_loss, wild_metrics)
    np.testing.assert_array_equal(gradient, wild_gradient)
    assert (gradient[masked] == 0).all()


@pytest.mark.parametrize("loss_fn", sorted(OF_TOKENS - {"surrogate"}))
@pytest.mark.parametrize("reduction", [{}, {"reduction": "sum"}])
def test_no_weight_at_all_is_exactly_zero(loss_fn: str, reduction: dict[str, Any]) -> None:
    case = make_case(loss_fn)
    case.datums = [
        d.model_copy(
            update={"loss_fn_inputs": {**d.loss_fn_inputs, "weights": d_zero(d.model_input.length)}}
        )
        for d in case.datums
    ]
    loss, gradient, metrics = engine_form(case, loss_fn, reduction)
    assert loss == 0
    assert (gradient == 0).all()
    assert all(math.isfinite(value) for value in metrics.values())


def d_zero(length: int) -> Any:
    return datum([3] * (length + 1), weights=np.zeros(length)).loss_fn_inputs["weights"]


@given(
    lp=st.floats(-8, 0),
    A=st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3),
    low=st.floats(0.1, 0.99),
    high=st.floats(1.01, 5),
)
def test_on_policy_all_ratio_losses_share_the_policy_gradient(
    lp: float, A: float, low: float, high: float
) -> None:
    """At r = 1 each has the gradient -A: the sign is right and no clip is felt."""
    q, a = torch.tensor([lp], dtype=torch.float64), torch.tensor([A], dtype=torch.float64)
    x = q.clone().requires_grad_()
    clip = {"clip_low_threshold": low, "clip_high_threshold": high}
    tokens = [
        formula("importance_sampling", x, q, a),
        formula("importance_sampling", x, q, a, ratio_cap=1.0),
        formula("ppo", x, q, a, **clip, dual_clip=2.0),
        formula("cispo", x, q, a, **clip),
        formula("gspo", x, q, a, **clip),
        formula("dro", x, q, a, beta=0.5),
    ]
    for token in tokens:
        (slope,) = torch.autograd.grad(token.value.sum(), x)
        assert slope.item() == pytest.approx(-A, rel=1e-9)
        assert not token.clipped.any()


@given(st.permutations(range(len(LENGTHS))), st.sampled_from(sorted(OF_TOKENS)))
def test_the_order_of_datums_does_not_matter(order: list[int], loss_fn: str) -> None:
    case = make_case(loss_fn)
    starts = np.cumsum((0, *LENGTHS))
    rows = [np.arange(starts[i], starts[i + 1]) for i in range(len(LENGTHS))]
    take = np.concatenate([rows[i] for i in order])
    objective = Objective(job("run", [case.datums[i] for i in order], loss_fn))
    lp = torch.tensor(case.lp[take], requires_grad=True)
    total = objective.add(range(4), Scores(lp, torch.tensor(case.entropy[take]))).sum()
    loss, gradient, _ = engine_form(case, loss_fn, {})
    assert total.item() == pytest.approx(loss, rel=1e-12)
    (slope,) = torch.autograd.grad(total, lp)
    np.testing.assert_allclose(slope.numpy(), gradient[take], rtol=1e-12, atol=1e-15)


@given(st.floats(-5, 5))
def test_kl_estimates_are_zero_on_policy_and_k2_and_k3_never_negative(gap: float) -> None:
    lp, q = torch.tensor([gap], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    k1, k2, k3 = kl_estimates(lp, q)
    assert k1.item() == pytest.approx(-gap)
    assert k2.item() >= 0
    assert k3.item() >= 0
    assert all(k.item() == 0 for k in kl_estimates(q, q))
