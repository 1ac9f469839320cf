"""Attention of a whole pass in one call of torch's `varlen_attn`, which runs flash attention.

**Not yet run on a GPU.** `attention_choice.py` takes it where a model and this torch have what it
needs, after comparing it with plain attention on the device. T rows of a pass, S sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from weaver.engine.torch.attention import Heads, Layout
    from weaver.engine.torch.pages import Tables

PACKED = {"scale", "window_size", "enable_gqa"}
"""The keywords with which it is called; torch got them one after the other."""
PAGED = PACKED | {"seqused_k", "block_table"}
"""With which it is called for keys and values in pages."""


def find_varlen(needed: set[str]) -> Callable[..., torch.Tensor] | None:
    """This torch's `varlen_attn`, if it has these keywords."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has = inspect.signature(varlen_attn).parameters.keys()
    found: Callable[..., Any] = varlen_attn
    return found if needed <= has else None


def varlen_attention(
    heads: Heads, layout: Layout, *, varlen_attn: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """-> [1, T, Hq, D], with gradients; neither caps nor sinks."""
    q, k, v = (x[0].transpose(0, 1) for x in heads[:3])
    if "varlen" not in layout.made:
        starts = list(accumulate(layout.lengths, initial=0))
        layout.made["varlen"] = torch.tensor(starts, dtype=torch.int32, device=q.device)
    starts, longest = layout.made["varlen"], max(layout.lengths)
    output = varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=heads.scaling,
        window_size=window_size(heads.window),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None]


def paged_varlen_attention(
    heads: Heads, kv: torch.Tensor, tables: Tables, *, varlen_attn: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """See `PagedAttention`; neither caps nor sinks."""
    q, (keys, values) = heads.q[0].transpose(0, 1), kv
    output = varlen_attn(
        q,
        keys,
        values,
        tables.starts,
        None,
        tables.longest,
        tables.pages.shape[1] * keys.shape[1],
        scale=heads.scaling,
        window_size=window_size(heads.window),
        enable_gqa=q.shape[1] != keys.shape[2],
        seqused_k=tables.used,
        block_table=tables.pages,
    )
    return output[None]


def window_size(window: int | None) -> tuple[int, int]:
    """How many keys before and behind its own a row sees, -1 for all: causal, (i - window, i]."""
    return (-1 if window is None else window - 1, 0)
