"""Whether an attention is right on a device: compared with plain attention of random tensors.

`model_check.py` asks before a model computes with it. A fault is a text, empty where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from weaver.engine.torch.attention import Heads, PackedAttention, attend, packed_attention
from weaver.engine.torch.catalog import ModelFacts, refusing
from weaver.engine.torch.kv_cache import CacheShape
from weaver.engine.torch.pages import PageCache, PagedAttention
from weaver.errors import UnsupportedError

LENGTHS = (150, 1, 40, 40, 300)
"""Of the sequences of a pass: more than a kernel's block of rows, and less."""
KEPT, READ, DRAWN = (300, 2, 257, 40), (100, 1, 1, 30), (1, 1, 1, 1)
"""Of sequences in pages, and how many of their last tokens are then read, or drawn."""
WINDOW = 20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}
"""Relative to the norm. Half precision has 3 digits, and a wrong mask moves it by 0.1 at least."""
Differences = Iterable[tuple[str, torch.Tensor, torch.Tensor]]
"""What, as it is computed, and as it is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A `Layout`."""

    lengths: tuple[int, ...]
    made: dict[object, Any] = field(default_factory=dict)


def fault_of(
    attention: PackedAttention, facts: ModelFacts, *, place: torch.device, dtype: torch.dtype
) -> str:
    """Of passes without a cache: values and gradients."""
    return _fault(_packed(attention, facts, place, dtype), TOLERANCE[dtype])


def paging_fault_of(
    attention: PagedAttention, facts: ModelFacts, *, place: torch.device, dtype: torch.dtype
) -> str:
    """Of passes that read from pages and write to them."""
    return _fault(_paged(attention, facts, place, dtype), TOLERANCE[dtype])


def _fault(differences: Differences, tolerance: float) -> str:
    try:
        with refusing("it fails", hint=""), torch.enable_grad():
            for what, ours, right in differences:
                error = float((ours.float() - right).norm() / right.norm())
                if not error <= tolerance:
                    return f"{what} differs by {error:.1g}"
    except UnsupportedError as error:
        return error.message
    return ""


def _packed(
    attention: PackedAttention, facts: ModelFacts, place: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    random = _random(place, dtype)
    total, size = sum(LENGTHS), facts.head_dim
    keys = (1, facts.num_kv_heads, total, size)
    inputs = [random(1, facts.num_heads, total, size), random(*keys), random(*keys)]
    inputs += [random(facts.num_heads)] if facts.sinks else []
    weights = random(1, total, facts.num_heads, size)
    for window in (None, WINDOW):
        results = []
        for packed, precision in ((attention, dtype), (packed_attention, torch.float32)):
            leaves = [x.to(precision).requires_grad_() for x in inputs]
            q, k, v, *sinks = leaves
            heads = Heads(q, k, v, size**-0.5, window, facts.softcap, *sinks)
            output = packed(heads, Sequences(lengths=LENGTHS))
            gradients = torch.autograd.grad(output, leaves, weights.to(precision))
            results.append([output.detach(), *gradients])
        names = ("its output", "its gradient of q", "of k", "of v", "of the sinks")
        yield from zip(names, *results, strict=False)  # few models have sinks


def _paged(
    attention: PagedAttention, facts: ModelFacts, place: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    random, size = _random(place, dtype), facts.head_dim
    shape = replace(CacheShape.of(facts, dtype=dtype, device=place), num_layers=1)
    sinks = random(facts.num_heads) if facts.sinks else None
    for window, last in product((None, WINDOW), (READ, DRAWN)):
        cache = PageCache(shape, attention)
        prompts = [cache.prompt(length) for length in KEPT]
        kv = [random(2, 1, facts.num_kv_heads, length, size) for length in KEPT]
        first = tuple(length - n for length, n in zip(KEPT, last, strict=True))
        for counts in (first, last):
            spans = [(p.length, p.length + n) for p, n in zip(prompts, counts, strict=True)]
            new = [x[:, :, :, begin:end] for x, (begin, end) in zip(kv, spans, strict=True)]
            q, (k, v) = random(1, facts.num_heads, sum(counts), size), torch.cat(new, dim=3)
            heads = Heads(q, k, v, size**-0.5, window, facts.softcap, sinks)
            reading = cache.read(list(zip(prompts, counts, strict=True)))
            ours = reading.attend(0, heads)
            reading.finish()
            right = [
                attend(heads._replace(q=rows, k=x[0, :, :, :end], v=x[1, :, :, :end]))
                for rows, x, (_, end) in zip(
                    q.float().split(counts, dim=2), (x.float() for x in kv), spans, strict=True
                )
            ]
            yield "its output", ours, torch.cat(right, dim=2).transpose(1, 2)


def _random(place: torch.device, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(place, dtype)
