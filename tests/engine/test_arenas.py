"""The CPU's cache against plain attention over whole sequences, and their bookkeeping."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from weaver.engine.torch.arenas import ArenaCache, ArenaRow
from weaver.engine.torch.attention import Heads
from weaver.engine.torch.kv_cache import CacheShape

LAYERS, HQ, HKV, D = 2, 4, 2, 8
SHAPE = CacheShape(
    num_layers=LAYERS,
    num_kv_heads=HKV,
    head_dim=D,
    dtype=torch.float32,
    device=torch.device("cpu"),
)
SCALING = 0.3
WINDOWS = (None, 5)
"""Of the two layers."""


class Sequence:
    """Random projections of one sequence, and attention over all of it at once."""

    def __init__(self, seed: int, length: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q = torch.randn(LAYERS, HQ, length, D, generator=g)
        self.kv = torch.randn(2, LAYERS, HKV, length, D, generator=g)

    def expected(self, layer: int, begin: int, end: int) -> torch.Tensor:
        """[tokens, Hq, D]"""
        i, j = torch.arange(end)[:, None], torch.arange(end)
        window = WINDOWS[layer]
        mask = (j <= i) & (True if window is None else j > i - window)
        keys, values = (x.repeat_interleave(HQ // HKV, 0) for x in self.kv[:, layer, :, :end])
        o = scaled_dot_product_attention(
            self.q[layer, :, :end], keys, values, attn_mask=mask, scale=SCALING
        )
        return o[:, begin:end].transpose(0, 1)


def feed(cache: object, spans: list[tuple[Sequence, int, int]]) -> None:
    """Runs both layers over tokens [begin, end) of each sequence and compares."""
    for layer in range(LAYERS):
        q = torch.cat([s.q[layer, :, b:e] for s, b, e in spans], dim=1)[None]
        k, v = torch.cat([s.kv[:, layer, :, b:e] for s, b, e in spans], dim=2)[:, None]
        heads = Heads(q, k, v, SCALING, WINDOWS[layer])
        output = cache.attend(layer, heads)  # type: ignore[attr-defined]
        expected = torch.cat([s.expected(layer, b, e) for s, b, e in spans])[None]
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)
    cache.finish()  # type: ignore[attr-defined]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_prompts_are_read_together_and_in_pieces(chunk: int) -> None:
    sequences = [Sequence(i, length) for i, length in enumerate((17, 4, 9))]
    cache = ArenaCache(SHAPE)
    prompts = [cache.prompt(s.kv.shape[3]) for s in sequences]
    while any(p.length < p.kv.shape[3] for p in prompts):
        left = [(s, p) for s, p in zip(sequences, prompts, strict=True) if p.length < p.kv.shape[3]]
        sizes = [min(chunk, p.kv.shape[3] - p.length) for _, p in left]
        spans = [(s, p.length, p.length + n) for (s, p), n in zip(left, sizes, strict=True)]
        feed(cache.read([(p, n) for (_, p), n in zip(left, sizes, strict=True)]), spans)


def test_rows_join_leave_and_grow_through_arenas() -> None:
    """Rows of every length in random order; some prompts are shared, one row is poisoned by NaN."""
    rng = random.Random(0)
    cache = ArenaCache(SHAPE)
    together = cache.rows()
    running: list[tuple[Sequence, ArenaRow]] = []
    for step in range(140):
        if step % 7 == 0 and len(running) < 9:
            length = rng.choice([1, 3, 60, 63, 64, 126])
            sequence = Sequence(step, length + 140)
            prompt = cache.prompt(length)
            feed(cache.read([(prompt, length)]), [(sequence, 0, length)])
            rows = together.add(prompt, rng.choice([1, 3]))
            cache.end(prompt)
            running += [(sequence, row) for row in rows]
        if running and rng.random() < 0.12:
            _, row = running.pop(rng.randrange(len(running)))
            row.arena.kv[:, :, row.slot] = torch.nan
            together.remove(row)
        rng.shuffle(running)
        if running:
            decode = together.decode([row for _, row in running])
            feed(decode, [(s, row.length, row.length + 1) for s, row in running])
        assert sum(len(arena.rows) for arena in together._arenas.values()) == len(running)
    for _, row in running:
        together.remove(row)
    assert not together._arenas


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_fused_attention(dtype: torch.dtype) -> None:
    shape = CacheShape(
        num_layers=1, num_kv_heads=HKV, head_dim=D, dtype=dtype, device=torch.device("cpu")
    )
    sequence = Sequence(1, 9)
    cache = ArenaCache(shape)
    prompt = cache.prompt(8)
    prompt.kv[:, 0] = sequence.kv[:, 0, :, :8].to(dtype)
    prompt.length = 8
    together = cache.rows()
    step = together.decode(together.add(prompt, 1))
    k, v = sequence.kv[:, 0, None, :, 8:].to(dtype)
    q = sequence.q[0, None, :, 8:].to(dtype)
    output = step.attend(0, Heads(q, k, v, SCALING, None))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        output[0].float(), sequence.expected(0, 8, 9), rtol=0, atol=tolerance
    )
