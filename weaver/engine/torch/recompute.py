"""Activation checkpointing: decoder layers that keep their input alone, and compute again.

`LoadedModel` prepares the layers once and says in each call which of them do so. The gradients are
those of a call in which none does, bit for bit, for the same operations run on the same values.
Sublinear memory: https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager


class Layer(torch.nn.Module):
    """Stands before the class of a decoder layer."""

    set_up: Callable[[], AbstractContextManager[None]] | None = None
    """Makes again what was set up for the call; None where activations are kept."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        set_up = self.set_up
        if set_up is None:
            return super().forward(*args, **kwargs)
        return checkpoint(
            super().forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn in eval mode
            context_fn=lambda: (nullcontext(), set_up()),
            **kwargs,
        )


def decoder_layers(decoder: torch.nn.Module, count: int) -> list[Any]:
    """The first list of so many modules; a decoder that has no such list has no layers."""
    lists = (m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    return list(next((m for m in lists if len(m) == count), ()))


def prepare_layers(decoder: torch.nn.Module, count: int) -> list[Layer]:
    """Lets the layers of a decoder be computed again."""
    layers = decoder_layers(decoder, count)
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _with_choice(kind)
    return [layer for layer in layers if isinstance(layer, Layer)]


@cache
def _with_choice(kind: Any) -> Any:
    return type(kind.__name__, (Layer, kind), {})


@contextmanager
def recomputed(
    layers: Sequence[Layer], set_up: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Lets these layers be computed again in the backward pass of what is called inside."""
    for layer in layers:
        layer.set_up = set_up
    try:
        yield
    finally:
        for layer in layers:
            layer.set_up = None
