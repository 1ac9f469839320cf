"""How the memory beside a model's weights is divided between trainer and sampler.

Nothing here asks the device: what was free when the engine began is given, so that a process plans
the same from its first pass to its last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weaver.engine.torch.device import USABLE, needs_of

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts


class Shares(NamedTuple):
    """In bytes."""

    passes: int
    """For the activations and buffers of one training pass."""
    cache: int
    """For keys and values of all rows that are sampled."""


def shares(facts: ModelFacts, *, free: int, dtype: str) -> Shares:
    """Halves of what is left of `free` beside the base weights and one adapter in training.

    Both are at least 0, and as if the model were alone on the device.
    """
    needs = needs_of(facts, dtype=dtype)
    rest = max(0, int(USABLE * free) - needs.weights - needs.adapter)
    return Shares(passes=rest // 2, cache=rest // 2)
