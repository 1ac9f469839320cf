"""What torch documents of `torch.nn.attention.varlen.varlen_attn`, which itself needs a GPU."""

from __future__ import annotations

import torch


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """[T, Hq, D]; the last rows of a sequence are aligned with its last keys, as flash attention
    does."""
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert cu_seq_q.dtype == torch.int32
    assert return_aux is None
    heads, key_heads = query.shape[1], key.shape[-2]
    assert heads == key_heads or (enable_gqa and heads % key_heads == 0)
    left, right = window_size
    outputs = []
    for i, (begin, end) in enumerate(zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False)):
        assert end - begin <= max_q
        if block_table is not None:
            assert block_table.dtype == torch.int32 and seqused_k is not None and cu_seq_k is None
            k, v = (x[block_table[i].long()].flatten(0, 1) for x in (key, value))
        else:
            assert cu_seq_k is not None
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32
            k, v = k[: seqused_k[i]], v[: seqused_k[i]]
        assert len(k) <= max_k
        k, v = (x.repeat_interleave(heads // key_heads, 1).transpose(0, 1) for x in (k, v))
        scores = query[begin:end].transpose(0, 1) @ k.transpose(1, 2)
        scores = scores.float() * (query.shape[2] ** -0.5 if scale is None else scale)
        at = torch.arange(k.shape[1], device=k.device)
        row = at[len(at) - (end - begin) :, None]
        hidden = (at < row - left) if left >= 0 else torch.zeros_like(row == at)
        if right >= 0:
            hidden = hidden | (at > row + right)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)
