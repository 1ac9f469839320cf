"""`choose_attention`: what computes the attention of a model's passes, fixed when it is loaded.

On CUDA in half precision `varlen_attn`, or flex attention where that lacks something; elsewhere
`packed_attention`. **What is taken on CUDA has not yet run on a GPU**: each is first compared with
plain attention on the device, values and gradients, and left out where it differs or fails.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from weaver.engine.torch.attention import Heads, PackedAttention, packed_attention
from weaver.engine.torch.catalog import ModelFacts, refusing
from weaver.engine.torch.flex import compiled_flex, flex_packed
from weaver.engine.torch.varlen import PACKED, find_varlen, varlen_attention
from weaver.errors import UnsupportedError

logger = logging.getLogger(__name__)

LENGTHS = (150, 1, 40, 40, 300)
"""Of the sequences that are compared: more than a kernel's block of rows, and less."""
WINDOW = 70
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.03}
"""Relative to the norm. Half precision has 3 digits, and a wrong mask moves it by 0.1 at least."""
VARLEN_HEADS = range(8, 257, 8)
"""The head sizes that flash attention computes with."""


class Attention(NamedTuple):
    name: str
    """`blocks`, `varlen` or `flex`, as log and `weaver doctor` say it."""
    packed: PackedAttention


BLOCKS = Attention("blocks", packed_attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A `Layout`."""

    lengths: tuple[int, ...]
    made: dict[object, Any] = field(default_factory=dict)


def by_rule(facts: ModelFacts, *, place: torch.device, dtype: torch.dtype) -> list[Attention]:
    """What may be taken, the best first."""
    found: list[Attention] = []
    if place.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        varlen = find_varlen(PACKED)
        plain = facts.softcap is None and not facts.sinks
        if varlen is not None and plain and facts.head_dim in VARLEN_HEADS:
            found.append(Attention("varlen", partial(varlen_attention, varlen_attn=varlen)))
        found.append(Attention("flex", partial(flex_packed, flex=compiled_flex)))
    return [*found, BLOCKS]


def choose_attention(
    facts: ModelFacts, found: Sequence[Attention], *, place: torch.device, dtype: torch.dtype
) -> Attention:
    """The first of them that is right on this device; the last without being asked."""
    for attention in found[:-1]:
        fault = fault_of(attention, facts, place=place, dtype=dtype)
        if not fault:
            return attention
        said = "%s: attention by %s is left out: %s"
        logger.warning(said, facts.info.name, attention.name, fault)
    return found[-1]


def fault_of(
    attention: Attention, facts: ModelFacts, *, place: torch.device, dtype: torch.dtype
) -> str:
    """How values or gradients differ from plain attention in float32, or what fails; or nothing."""
    try:
        with refusing("it fails", hint=""), torch.enable_grad():
            for window in (None, WINDOW):
                for what, error in _errors(attention, facts, window, place=place, dtype=dtype):
                    if not error <= TOLERANCE[dtype]:
                        return f"{what} differs by {error:.1g} in a window of {window}"
    except UnsupportedError as error:
        return error.message
    return ""


def _errors(
    attention: Attention,
    facts: ModelFacts,
    window: int | None,
    *,
    place: torch.device,
    dtype: torch.dtype,
) -> list[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(place, dtype)

    total, keys = sum(LENGTHS), (1, facts.num_kv_heads, sum(LENGTHS), facts.head_dim)
    inputs = [random(1, facts.num_heads, total, facts.head_dim), random(*keys), random(*keys)]
    inputs += [random(facts.num_heads)] if facts.sinks else []
    weights = random(1, total, facts.num_heads, facts.head_dim)

    def computed(packed: PackedAttention, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        q, k, v, *sinks = leaves
        heads = Heads(q, k, v, facts.head_dim**-0.5, window, facts.softcap, *sinks)
        output = packed(heads, Sequences(lengths=LENGTHS))
        return [output.detach(), *torch.autograd.grad(output, leaves, weights.to(dtype))]

    names = ("its output", "the gradient of q", "of k", "of v", "of the sinks")
    ours, right = computed(attention.packed, dtype), computed(packed_attention, torch.float32)
    compared = zip(names, ours, right, strict=False)  # few models have sinks
    return [(name, float((a.float() - b).norm() / b.norm())) for name, a, b in compared]
