"""Learning rates as pure functions of the step, from 0; loops call them before each optimizer step.

Every function takes the step second and answers a rate: `cosine(1e-3, 10, steps=60, warmup=5)`.
"""

from __future__ import annotations

import math


def constant(peak: float, step: int, *, warmup: int = 0) -> float:
    """`peak`, reached linearly over the first `warmup` steps; step 0 has peak / warmup, never 0."""
    return peak * min(1.0, (step + 1) / warmup) if warmup else peak


def linear(peak: float, step: int, *, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Warmup as in `constant`, then a straight line that reaches `floor` at step `steps`."""
    if step < warmup:
        return constant(peak, step, warmup=warmup)
    return floor + (peak - floor) * (1.0 - _progress(step, steps, warmup))


def cosine(peak: float, step: int, *, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Warmup as in `constant`, then half a cosine (arXiv:1608.03983, eq. 5, without restarts)."""
    if step < warmup:
        return constant(peak, step, warmup=warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, steps, warmup)))


def _progress(step: int, steps: int, warmup: int) -> float:
    """The share of the decay that is done: 0 right after warmup, 1 at `steps` and beyond."""
    return min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
