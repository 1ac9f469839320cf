"""What computes the attention of a model, chosen by a rule and fixed when the model is loaded.

Passes without a cache, on CUDA in half precision: `varlen_attn`, or flex attention where that lacks
something; else `packed_attention`. Keys and values of earlier tokens, on CUDA: in pages, by
`varlen_attn` or by copies; else in arenas. **What is taken on CUDA has not yet run on a GPU**: it
is proved first, and left out where it differs from plain attention or fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from weaver.engine.torch.attention import PackedAttention, packed_attention
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.flex import compiled_flex, flex_packed
from weaver.engine.torch.pages import PagedAttention, gathered_attention
from weaver.engine.torch.varlen import (
    PACKED,
    PAGED,
    find_varlen,
    paged_varlen_attention,
    varlen_attention,
)

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
VARLEN_HEADS = range(8, 257, 8)
"""The head sizes that flash attention computes with."""


class Attention(NamedTuple):
    """Of passes without a cache."""

    name: str
    """`blocks`, `varlen` or `flex`, as log and `weaver doctor` say it."""
    packed: PackedAttention


class Paging(NamedTuple):
    """Of passes with one."""

    name: str
    """`arenas`, or what attends to pages: `varlen` or `gather`."""
    attention: PagedAttention | None


BLOCKS = Attention("blocks", packed_attention)
ARENAS = Paging("arenas", None)
C = TypeVar("C", Attention, Paging)


def by_rule(facts: ModelFacts, *, place: torch.device, dtype: torch.dtype) -> list[Attention]:
    """What may be taken, the best first."""
    if place.type != "cuda" or dtype not in HALF:
        return [BLOCKS]
    varlen = _varlen(facts, dtype, PACKED)
    found = [Attention("varlen", partial(varlen_attention, varlen_attn=varlen))] if varlen else []
    return [*found, Attention("flex", partial(flex_packed, flex=compiled_flex)), BLOCKS]


def paging_by_rule(facts: ModelFacts, *, place: torch.device, dtype: torch.dtype) -> list[Paging]:
    """The same, of keys and values of earlier tokens."""
    if place.type != "cuda":
        return [ARENAS]
    varlen = _varlen(facts, dtype, PAGED)
    found = (
        [Paging("varlen", partial(paged_varlen_attention, varlen_attn=varlen))] if varlen else []
    )
    return [*found, Paging("gather", gathered_attention), ARENAS]


def _varlen(
    facts: ModelFacts, dtype: torch.dtype, needed: set[str]
) -> Callable[..., torch.Tensor] | None:
    able = dtype in HALF and facts.softcap is None and not facts.sinks
    return find_varlen(needed) if able and facts.head_dim in VARLEN_HEADS else None


def choose(name: str, found: Sequence[C], fault: Callable[[C], str]) -> C:
    """The first that has no fault, see `attention_proof.py`; the last without being asked."""
    for each in found[:-1]:
        said = fault(each)
        if not said:
            return each
        logger.warning("%s: attention by %s is left out: %s", name, each.name, said)
    return found[-1]
