"""Attention of packed sequences with windows, caps and sinks, in blocks, against its definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from weaver.engine.torch import attention
from weaver.engine.torch.attention import Heads, attend, packed_attention
from weaver.engine.torch.attention_proof import Sequences

LENGTHS = (7, 7, 1, 12, 3)
HQ, HKV, D = 4, 2, 8
KINDS = list(product((None, 1, 5), (None, 2.0), (False, True)))
"""Window, cap, sinks."""


def heads_of(
    window: int | None, softcap: float | None, sinks: bool, *, total: int = sum(LENGTHS)
) -> Heads:
    """Random float64 projections that want gradients."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    q, k, v = random(1, HQ, total, D), random(1, HKV, total, D), random(1, HKV, total, D)
    return Heads(q, k, v, 0.7, window, softcap, random(HQ) if sinks else None)


def by_definition(heads: Heads, lengths: tuple[int, ...]) -> torch.Tensor:
    """[1, T, Hq, D], one row of one head after the other."""
    rows = []
    for head, first, i in (
        (head, sum(lengths[:s]), i)
        for s, length in enumerate(lengths)
        for i in range(length)
        for head in range(HQ)
    ):
        begin = 0 if heads.window is None else max(0, i - heads.window + 1)
        at, seen = first + i, slice(first + begin, first + i + 1)
        scores = heads.k[0, head // (HQ // HKV), seen] @ heads.q[0, head, at] * heads.scaling
        if heads.softcap is not None:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        total = scores.exp().sum()
        if heads.sinks is not None:
            total = total + heads.sinks[head].exp()
        rows.append(scores.exp() / total @ heads.v[0, head // (HQ // HKV), seen])
    return torch.stack(rows).view(1, sum(lengths), HQ, D)


def gradients(output: torch.Tensor, heads: Heads) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = [x for x in (*heads[:3], heads.sinks) if isinstance(x, torch.Tensor)]
    return list(torch.autograd.grad((output * weights).sum(), wanted))


def assert_equal(output: torch.Tensor, heads: Heads, lengths: tuple[int, ...]) -> None:
    right = by_definition(heads, lengths)
    torch.testing.assert_close(output, right, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(output, heads), gradients(right, heads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap", "sinks"), KINDS)
@pytest.mark.parametrize("rows", [3, 512])
def test_packed_attention_is_as_defined_with_its_gradients(
    window: int | None, softcap: Any, sinks: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", rows)
    heads = heads_of(window, softcap, sinks)
    assert_equal(packed_attention(heads, Sequences(lengths=LENGTHS)), heads, LENGTHS)


@pytest.mark.parametrize(("window", "softcap", "sinks"), KINDS)
def test_the_last_rows_attend_as_within_the_whole(
    window: int | None, softcap: Any, sinks: bool
) -> None:
    heads = heads_of(window, softcap, sinks, total=12)
    right = by_definition(heads, (12,))
    for n in (1, 5, 12):
        last = attend(heads._replace(q=heads.q[:, :, -n:])).transpose(1, 2)
        torch.testing.assert_close(last, right[:, -n:], rtol=0, atol=1e-12)


def test_scores_in_memory_are_bounded_however_long_the_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the gradient pass, too: what a block needs is computed again."""
    bound = 4 * HQ * 64
    monkeypatch.setattr(attention, "BLOCK_SCORES", bound)
    heads = heads_of(None, 2.0, True, total=64)
    sizes: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = packed_attention(heads, Sequences(lengths=(64,)))
    assert max(sizes, default=0) <= 64 * HQ * D
    assert_equal(output, heads, (64,))


def test_half_precision_scores_are_normalised_in_float32() -> None:
    heads = heads_of(5, 2.0, True)
    half = heads._replace(
        q=heads.q.bfloat16(), k=heads.k.bfloat16(), v=heads.v.bfloat16(), sinks=heads.sinks
    )
    output = packed_attention(half, Sequences(lengths=LENGTHS))
    assert output.dtype == torch.bfloat16
    right = by_definition(heads, LENGTHS).float()
    torch.testing.assert_close(output.float(), right, rtol=0, atol=0.03)
