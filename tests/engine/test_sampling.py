"""Sampling against an independent float64 numpy form, its properties, and its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.conftest import DEVICE
from tests.optional import given, settings, st
from weaver.engine.torch import sampling
from weaver.types import SamplingParams

Array = npt.NDArray[np.float64]


def reference(
    logits: Array,
    params: SamplingParams,
    u: float,
    seen: set[int],
    sampled: Sequence[int] = (),
) -> tuple[int, Array, Array]:
    """Token, policy and drawn-from probabilities, written as the papers have it."""
    policy = np.exp(logits - logits.max())
    policy /= policy.sum()
    z = logits.copy()
    for token, bias in params.logit_bias:
        z[token] += bias
    for token in seen:
        r = params.repetition_penalty
        z[token] = z[token] / r if z[token] > 0 else z[token] * r
    for token in set(sampled):
        z[token] -= params.presence_penalty
    for token in sampled:
        z[token] -= params.frequency_penalty
    if params.temperature == 0:
        q = np.zeros_like(z)
        q[z.argmax()] = 1
        return int(z.argmax()), policy, q
    z = z / params.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        left = p[order].sum()
        mass, kept = 0.0, []
        for i in order:
            kept.append(i)
            mass += p[i] / left
            if mass >= params.top_p:
                break
        order = kept
    order = [i for i in order if p[i] >= params.min_p * p.max()]
    q = np.zeros_like(p)
    q[order] = p[order] / p[order].sum()
    if not 0 < params.top_k < len(p) and params.top_p == 1:  # drawn without sorting
        order = sorted(order)
    token = order[min(int(np.searchsorted(np.cumsum(q[order]), u, side="right")), len(order) - 1)]
    return token, policy, q


def draw(
    logits: torch.Tensor,
    params: list[SamplingParams],
    u: torch.Tensor,
    *,
    seen: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> sampling.Draws:
    rows = sampling.row_params(params, logits.shape[1], device=DEVICE)
    some = None if seen is None else seen.to(DEVICE)[rows.penalised_rows]
    counted = None if counts is None else counts.to(DEVICE)[rows.counted_rows]
    return sampling.sample(
        logits.to(DEVICE), rows, uniforms=u.to(DEVICE), seen=some, counts=counted
    )


EVERY_KIND = [
    SamplingParams(),
    SamplingParams(temperature=0.0, top_p=0.5),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.8, top_k=5),
    SamplingParams(top_p=0.6),
    SamplingParams(temperature=1.3, top_k=300, top_p=0.9),
    SamplingParams(temperature=2.5, top_p=0.999),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.8, min_p=0.1, repetition_penalty=1.4),
    SamplingParams(repetition_penalty=0.6),
    SamplingParams(temperature=0.0, repetition_penalty=5.0),
    SamplingParams(top_k=-1),
    SamplingParams(temperature=1.5, top_k=10_000),
    SamplingParams(presence_penalty=1.5),
    SamplingParams(frequency_penalty=-0.7, temperature=0.6),
    SamplingParams(temperature=0.0, presence_penalty=-2.0, frequency_penalty=2.0),
    SamplingParams(logit_bias={3: 4.5, "0": -2.0}, top_p=0.7),
    SamplingParams(temperature=0.0, logit_bias={5: 100.0}),
    SamplingParams(
        temperature=0.9,
        top_k=4,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=[(1, -1.0), (6, 2.0)],
    ),
]


@pytest.mark.parametrize("vocab_size", [7, 200, 2000])
def test_every_kind_of_row_agrees_with_float64_numpy(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for _ in range(8):
        logits = rng.normal(size=(len(EVERY_KIND), vocab_size)) * 3
        u = rng.random(len(EVERY_KIND))
        seen = rng.random(logits.shape) < 0.3
        counts = rng.poisson(0.4, logits.shape)
        draws = draw(
            torch.tensor(logits, dtype=torch.float32),
            EVERY_KIND,
            torch.tensor(u),
            seen=torch.tensor(seen),
            counts=torch.tensor(counts, dtype=torch.float32),
        )
        for b, params in enumerate(EVERY_KIND):
            ids = set(np.flatnonzero(seen[b]).tolist()) if params.repetition_penalty != 1 else set()
            exact = logits[b].astype(np.float32).astype(np.float64)
            sampled = np.repeat(np.arange(vocab_size), counts[b]).tolist()
            token, policy, q = reference(exact, params, float(u[b]), ids, sampled)
            assert draws.tokens[b] == token, params
            assert draws.logprobs[b].item() == pytest.approx(np.log(policy[token]), abs=1e-5)
            expected = np.log(q[token])
            assert draws.sampling_logprobs[b].item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=12),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.integers(-1, 14),
    top_p=st.sampled_from([0.1, 0.45, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.11, 0.9]),
    u=st.floats(0, 1, exclude_max=True),
)
def test_ties_and_edges_keep_a_smallest_set_of_at_least_one_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, u: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = draw(torch.tensor([logits]), [params], torch.tensor([u], dtype=torch.float64))
    _, _, q = reference(np.array(logits), params, u, set())
    token = int(draws.tokens[0])
    assert q[token] > 0
    assert draws.sampling_logprobs[0].item() == pytest.approx(np.log(q[token]), abs=1e-5)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 4.0])
def test_few_candidates_draw_what_a_full_sort_draws(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no spread every token ties; with little, top-p reaches far beyond the candidates."""
    torch.manual_seed(0)
    logits = torch.randn(6, 900) * spread
    u = torch.rand(6, dtype=torch.float64)
    params = [
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.02),
        SamplingParams(top_k=3),
        SamplingParams(top_k=400),
        SamplingParams(top_k=400, top_p=0.1, min_p=0.5),
        SamplingParams(top_p=0.9999, min_p=0.7),
    ]
    few = draw(logits, params, u)
    monkeypatch.setattr(sampling, "CANDIDATES", 900)
    full = draw(logits, params, u)
    assert few.tokens.tolist() == full.tokens.tolist()
    assert few.sampling_logprobs.tolist() == full.sampling_logprobs.tolist()


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(EVERY_KIND), 500)
    u = torch.rand(len(EVERY_KIND), dtype=torch.float64)
    seen = torch.rand(logits.shape) < 0.2
    counts = torch.poisson(torch.full(logits.shape, 0.3))
    together = draw(logits, EVERY_KIND, u, seen=seen, counts=counts)
    for b, params in enumerate(EVERY_KIND):
        row = slice(b, b + 1)
        alone = draw(logits[row], [params], u[row], seen=seen[row], counts=counts[row])
        assert alone.tokens[0] == together.tokens[b]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[b], rtol=0, atol=1e-6)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(u: float) -> None:
    logits = torch.full((1, 300), -200.0)
    logits[0, 7], logits[0, 11] = 1.0, 0.0
    for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(min_p=0.1)):
        draws = draw(logits, [params], torch.tensor([u], dtype=torch.float64))
        assert int(draws.tokens[0]) in (7, 11)


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = torch.tensor([[0.0, 0.1, -1.0]])
    for temperature in (0.0, 1e-60, 1e-30):
        draws = draw(
            logits, [SamplingParams(temperature=temperature)], torch.tensor([0.9]).double()
        )
        assert draws.tokens.tolist() == [1]
        assert draws.sampling_logprobs.tolist() == [0.0]
        assert draws.logprobs[0].item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=6, top_p=0.9)],
)
def test_many_draws_have_the_right_distribution(params: SamplingParams) -> None:
    """Pearson's statistic of 40,000 draws; at 11 degrees of freedom 40 has probability 4e-5."""
    n = 40_000
    logits = np.linspace(-2, 1, 12)[np.random.default_rng(0).permutation(12)]
    keys = sampling.stream_keys(17, n)
    u = sampling.draw_uniforms(keys, np.zeros(n, dtype=np.uint64))
    draws = draw(torch.tensor(logits, dtype=torch.float32).expand(n, -1), [params] * n, u)
    _, _, q = reference(logits, params, 0.0, set())
    counts = np.bincount(draws.tokens.cpu().numpy(), minlength=12)
    assert counts[q == 0].sum() == 0
    expected = n * q[q > 0]
    assert ((counts[q > 0] - expected) ** 2 / expected).sum() < 40


def test_streams_are_pure_uniform_and_unlike() -> None:
    keys = sampling.stream_keys(3, 50)
    assert (keys == sampling.stream_keys(3, 80)[:50]).all()
    assert len(np.unique(np.concatenate([keys, sampling.stream_keys(4, 50)]))) == 100
    u = np.stack(
        [sampling.draw_uniforms(keys, np.full(50, t, dtype=np.uint64)).numpy() for t in range(400)]
    )
    assert 0 <= u.min() and u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01) and u.var() == pytest.approx(1 / 12, abs=0.003)
    between_samples = np.corrcoef(u.T)[np.triu_indices(50, 1)]
    between_steps = np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]
    assert np.abs(between_samples).max() < 0.25 and abs(between_steps) < 0.03


def test_logits_that_are_not_finite_spoil_their_row_alone() -> None:
    params = [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0.0)] * 2
    logits = torch.randn(6, 300)
    logits[:3] = torch.nan
    draws = draw(logits, params, torch.full((6,), 0.5, dtype=torch.float64))
    assert 0 <= int(draws.tokens.min()) and int(draws.tokens.max()) < 300
    assert draws.logprobs.isnan().tolist() == [True] * 3 + [False] * 3


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: its values in Python, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return func(*args, **(kwargs or {}))


def test_a_draw_waits_for_the_device_at_most_to_see_whether_to_sort_all() -> None:
    rows = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, min_p=0.2),
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(presence_penalty=0.5, logit_bias={1: 1.0, 2: -1.0}),
    ]
    for kinds, waits in ((rows, 0), ([*rows, SamplingParams(top_k=3)], 1)):
        logits = torch.randn(len(kinds), 2 * sampling.CANDIDATES, device=DEVICE) * 9
        params = sampling.row_params(kinds, logits.shape[1], device=DEVICE)
        seen = torch.zeros(1, logits.shape[1], dtype=torch.bool, device=DEVICE)
        uniforms = torch.rand(len(kinds), dtype=torch.float64, device=DEVICE)
        counts = torch.zeros(1, logits.shape[1], device=DEVICE)
        with Waits() as counted:
            sampling.sample(logits, params, uniforms=uniforms, seen=seen, counts=counts)
        assert counted.count == waits
