"""`Head`: from hidden states to logits, with what some architectures do behind the last projection.

`LoadedModel` owns it; the chunked log-probabilities use its parts. N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from weaver.engine.linear import FrozenLinear


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    linear: FrozenLinear | torch.nn.Linear
    path: str
    """Of the projection in the model: `lm_head`."""
    scale: float
    """Granite divides its logits by `logits_scaling`, Cohere multiplies by `logit_scale`."""
    softcap: float | None
    """c of c·tanh(z / c): Gemma's `final_logit_softcapping`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> float32 [N, V], differentiable, with the adapters of the current routing."""
        return self.finish(self.linear(hidden).float())

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def finish_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns d/d logits into d/d z, in place, where `logits = finish(z)`."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def head_of(linear: FrozenLinear | torch.nn.Linear, *, path: str, config: Any) -> Head:
    """The head of a model with this transformers configuration."""
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0
    return Head(linear, path, factor / divisor, getattr(config, "final_logit_softcapping", None))
