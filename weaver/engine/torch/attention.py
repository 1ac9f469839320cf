"""Attention over packed sequences, registered with transformers as "weaver_packed".

Every model is loaded with it. A `PackedBatch` reaches it as the keyword `packed_batch` of the model
call. transformers builds no mask for an implementation that registers none, so none is registered.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from weaver.engine.torch.packing import Heads
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from weaver.engine.torch.packing import PackedBatch

IMPLEMENTATION = "weaver_packed"


def register() -> str:
    """Registers the attention function, once or again; answers its name."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    return IMPLEMENTATION


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_batch: PackedBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D].

    `unused` are keywords that other implementations read, such as `dropout` (0 in eval mode).
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedError(
            f"{type(module).__name__} caps its attention logits or has attention sinks.",
            field="base_model",
            hint="Choose a model with plain softmax attention.",
        )
    if packed_batch is None:
        raise UnsupportedError(
            f"{type(module).__name__} is not handed the keywords of the model call.",
            field="base_model",
            hint="Choose another model.",
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = Heads(query, key, value, scaling, sliding_window)
    if packed_batch.cache is None:
        output = packed_attention(heads, packed_batch)
    else:
        output = packed_batch.cache.attend(int(module.layer_idx), heads)
    return output.contiguous(), None  # models take views of it


def packed_attention(heads: Heads, batch: PackedBatch) -> torch.Tensor:
    """Causal attention within each sequence: -> [1, T, Hq, D]. No row sees another's.

    Neighbouring sequences of one length are one batched call.
    """
    q, k, v, scaling, window = heads
    groups = [(length, len(list(same))) for length, same in groupby(batch.lengths)]
    rows = [length * n for length, n in groups]
    outputs: list[torch.Tensor] = []
    pieces = zip(*(torch.split(x[0], rows, dim=1) for x in (q, k, v)), strict=True)
    for (length, n), piece in zip(groups, pieces, strict=True):
        mask = None
        if window is not None and window < length:
            mask = _window_mask(batch, length, window=window, like=q)
        q_n, k_n, v_n = (x.reshape(x.shape[0], n, length, -1).transpose(0, 1) for x in piece)
        o = scaled_dot_product_attention(
            q_n,
            k_n,
            v_n,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(o.transpose(1, 2).reshape(1, n * length, o.shape[1], o.shape[3]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _window_mask(
    batch: PackedBatch, length: int, *, window: int, like: torch.Tensor
) -> torch.Tensor:
    """bool [length, length]: position i sees (i - window, i]."""
    if (length, window) not in batch.masks:
        ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
        batch.masks[length, window] = ones.tril().triu(1 - window)
    return batch.masks[length, window]
