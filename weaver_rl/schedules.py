"""Learning rates: one for a model's size, and pure functions of the step, from 0.

Every schedule takes the step second and answers a rate: `cosine(1e-3, 10, steps=60, warmup=5)`.
"""

from __future__ import annotations

import math

from weaver.errors import ConfigError


def for_model(num_parameters: int) -> float:
    """The rate of a LoRA adapter by the size of its model: 4e-5·(1e9 / N)^0.4, in 1e-5 to 1e-3.

    1e-3 for weaver-nano (0.27 M), 7e-5 at 0.27 B, 4e-5 at 1 B, 1.7e-5 at 8 B, 1e-5 from 32 B: a
    rule of thumb between what weaver-nano learns at and what is usual for billions. Loops use it
    where a plan names no rate. Full fine-tuning wants about a tenth.

    Raises:
        ConfigError: the number of parameters is not known.
    """
    if num_parameters < 1:
        raise ConfigError(
            f"cannot be chosen for a model of {num_parameters} parameters.",
            field="learning_rate",
            hint="Name it: 4e-5 is usual for 1 B, 1e-5 for 32 B and more.",
        )
    return float(min(1e-3, max(1e-5, 4e-5 * (1e9 / num_parameters) ** 0.4)))


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
