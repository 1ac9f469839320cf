"""Attention of a whole pass in one call of torch's flex attention, with caps and sinks.

**Not yet run on a GPU.** `choose_attention` takes it on CUDA, where it is compiled, after comparing
it with plain attention on the device. FlexAttention: https://arxiv.org/abs/2412.05496. T rows of a
pass, C blocks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

if TYPE_CHECKING:
    from weaver.engine.torch.attention import Heads, Layout

BLOCK = 128
"""Rows, and keys, whose scores a kernel skips as one; the block size of flex attention itself."""

VARIANTS = 64
"""Compiled forms of flex attention that torch may keep; two models that cap and slide have 20."""


def compiled_flex(*args: Any, **kwargs: Any) -> Any:
    """Torch's `flex_attention` in one kernel, compiled at the first call."""
    return _compiled()(*args, **kwargs)


@cache
def _compiled() -> Callable[..., Any]:
    from torch import _dynamo as dynamo

    # The kinds of layers, with and without gradient, of one block of rows and of several, are
    # variants of one function; beyond the limit torch would compute unfused, in T x T memory.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(flex_attention, dynamic=True)


def flex_packed(heads: Heads, layout: Layout, *, flex: Callable[..., Any]) -> torch.Tensor:
    """-> [1, T, Hq, D], with gradients."""
    q, k, v, scaling, window, softcap, sinks = heads
    if ("flex", window) not in layout.made:
        layout.made["flex", window] = packed_mask(layout.lengths, window, device=q.device)
    output, aux = flex(
        q,
        k,
        v,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=layout.made["flex", window],
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:  # the sink's share of the softmax is what the keys lose
        output = output * (aux.lse - sinks[:, None]).sigmoid()[..., None].to(output.dtype)
    result: torch.Tensor = output.transpose(1, 2)
    return result


def packed_mask(lengths: Sequence[int], window: int | None, *, device: torch.device) -> BlockMask:
    """Causal within each sequence, found block by block: there is never a T x T mask."""
    total = sum(lengths)
    sequence = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )

    def sees(b: Any, h: Any, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        causal = (sequence[row] == sequence[key]) & (key <= row)
        return causal if window is None else causal & (key > row - window)

    first = torch.arange(0, total, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=total - 1)
    rows, keys = first[:, None], first
    touches = (keys <= rows) & (sequence[last] >= sequence[rows])
    whole = (keys < rows) & (sequence[keys] == sequence[last][:, None]) & (rows + BLOCK <= total)
    if window is not None:
        touches &= last > rows - window
        whole &= keys > last[:, None] - window
    lengths_of_all = (total, total)
    return BlockMask.from_kv_blocks(
        *_ordered(touches & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=lengths_of_all,
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bool [C, C]: how many blocks of keys each block of rows sees, and their indices first.

    -> int32 [1, 1, C] and [1, 1, C, C]
    """
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
