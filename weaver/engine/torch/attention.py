"""Softmax attention of a layer: `packed_attention` of whole sequences, `attend` of their last rows.

Models call the first, unless they were loaded with another, see `attention_choice.py`; KV caches
the second. Torch's fused attention computes it where it can; `plain_attention` does where a model
caps its scores (Gemma 2) or has sinks (gpt-oss).

Axes: N sequences of one length, Hq query heads, Hkv key heads, n query rows, m keys, D head size,
T rows of a pass.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 512
"""Query rows that see their keys through one mask, so that no mask is as large as n x n."""
BLOCK_SCORES = 2**24
"""Scores that `plain_attention` has in memory at once, 64 MB of them."""


class Heads(NamedTuple):
    """What a layer attends with, after rotary embedding."""

    q: torch.Tensor
    """[1, Hq, T, D]"""
    k: torch.Tensor
    """[1, Hkv, T, D]"""
    v: torch.Tensor
    scaling: float
    window: int | None
    """w lets position i see (i - w, i]; None sees [0, i]."""
    softcap: float | None = None
    """c makes c·tanh(s / c) of each score s (Gemma 2, arXiv:2408.00118, section 2)."""
    sinks: torch.Tensor | None = None
    """[Hq]: the score of one more key of each head, whose value is zero (gpt-oss; arXiv:2309.17453,
    section 3.1)."""

    @property
    def plain(self) -> bool:
        """Whether torch's fused attention cannot compute it."""
        return self.softcap is not None or self.sinks is not None


class Layout(Protocol):
    """How sequences lie end to end in a pass; `PackedBatch` is one."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence."""

    @property
    def made(self) -> dict[object, Any]:
        """What a layer made of the lengths for those behind it."""


class PackedAttention(Protocol):
    """What computes the attention of passes without a cache."""

    def __call__(self, heads: Heads, layout: Layout, /) -> torch.Tensor:
        """-> [1, T, Hq, D]"""


def packed_attention(heads: Heads, layout: Layout) -> torch.Tensor:
    """Causal attention within each sequence: -> [1, T, Hq, D]. No row sees another's.

    Neighbouring sequences of one length are one batched call.
    """
    groups = [(length, len(list(same))) for length, same in groupby(layout.lengths)]
    rows = [length * n for length, n in groups]
    outputs: list[torch.Tensor] = []
    pieces = zip(*(torch.split(x[0], rows, dim=1) for x in heads[:3]), strict=True)
    for (length, n), piece in zip(groups, pieces, strict=True):
        q, k, v = (x.reshape(x.shape[0], n, length, -1).transpose(0, 1) for x in piece)
        o = attend(heads._replace(q=q, k=k, v=v))
        outputs.append(o.transpose(1, 2).reshape(1, n * length, o.shape[1], o.shape[3]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def attend(heads: Heads) -> torch.Tensor:
    """Causal attention of the last n of m positions: q [N, Hq, n, D], k and v [N, Hkv, m, D] ->
    [N, Hq, n, D].

    In blocks of rows that see no more keys than they must; memory is linear in m, and in n x m
    where a gradient goes through the fused attention of several blocks.
    """
    n, m, window = heads.q.shape[2], heads.k.shape[2], heads.window
    if not heads.plain and n == m and (window is None or window >= m):
        return fused_attention(heads, None)
    rows = min(n, BLOCK_ROWS)
    if heads.plain:
        rows = max(1, min(rows, BLOCK_SCORES // (heads.q.shape[0] * heads.q.shape[1] * m)))
    outputs: list[torch.Tensor] = []
    for first in range(0, n, rows):
        stop = min(first + rows, n)
        start, end = m - n + first, m - n + stop
        begin = 0 if window is None else max(0, start - window + 1)
        at = torch.arange(begin, end, device=heads.q.device)
        mask = visible(at, at[start - begin :, None], window)
        k, v = heads.k[:, :, begin:end], heads.v[:, :, begin:end]
        part = heads._replace(q=heads.q[:, :, first:stop], k=k, v=v)
        attention = plain_attention if heads.plain else fused_attention
        if heads.plain and rows < n and torch.is_grad_enabled():
            output = checkpoint(
                attention, part, mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            output = attention(part, mask)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def fused_attention(heads: Heads, mask: torch.Tensor | None) -> torch.Tensor:
    """Torch's: shapes as `plain_attention`; causal where there is no mask, for n = m."""
    q, k, v, scaling, *_ = heads
    return scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def plain_attention(heads: Heads, mask: torch.Tensor) -> torch.Tensor:
    """q [N, Hq, n, D], k and v [N, Hkv, m, D] -> [N, Hq, n, D], with caps and sinks.

    `mask`: bool, broadcast to [N, Hq, n, m], true where a row sees a key. The softmax is in float32
    at least.
    """
    q, k, v, scaling, _, softcap, sinks = heads
    count, num_heads, n, _ = q.shape
    shape = (count, k.shape[1], -1, k.shape[2])
    # The query heads of one key head are the rows of one product.
    products = q.reshape(count, k.shape[1], -1, q.shape[3]) @ k.transpose(2, 3)
    scores = products.view(count, num_heads, n, -1)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.to(scores.dtype).view(-1, 1, 1).expand(count, -1, n, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights.to(v.dtype).reshape(shape) @ v).view(count, num_heads, n, -1)


def visible(seen: torch.Tensor, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether position `at` sees position `seen`: (at - window, at], or all up to `at`."""
    before = seen <= at
    return before if window is None else before & (seen > at - window)
