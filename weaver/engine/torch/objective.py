"""`Objective`: one job's loss over several passes, weighed, summed, and reported as metrics.

The trainer makes one for each `GradientJob` and feeds it the datums of every pass. T tokens of the
datums given, D of them. Loss arithmetic is float64: it costs nothing beside the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weaver.engine.torch import losses
from weaver.loss_specs import weights_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weaver.engine.base import GradientJob
    from weaver.engine.torch.logprobs import Scores

RATIO_LOSSES: Mapping[str, Callable[..., losses.TokenLoss]] = {
    "importance_sampling": losses.importance_sampling,
    "ppo": losses.ppo,
    "cispo": losses.cispo,
    "gspo": losses.gspo,
    "dro": losses.dro,
}
"""They take the options of the loss' spec, except those that are the same for all."""
COMMON = ("temperature", "denominator", "entropy_coef", "kl_coef")
MEANS = ("ratio_mean", "clip_fraction", "kl_k1", "kl_k2", "kl_k3", "entropy")


class Objective:
    def __init__(self, job: GradientJob) -> None:
        self.job = job
        self._options = {
            name: float(value) for name, value in job.loss_fn_config.items() if name != "reduction"
        }
        self.temperature = self._options["temperature"]
        self.needs_entropy = job.loss_fn in RATIO_LOSSES
        self.entropy_coef = self._options.get("entropy_coef", 0.0)
        self._weights = [
            datum.loss_fn_inputs["surrogate_weights"].to_numpy()
            if job.loss_fn == "surrogate"
            else weights_of(datum)
            for datum in job.datums
        ]
        self.weight_sum = float(sum(float(w.sum(dtype=np.float64)) for w in self._weights))
        self._factor = self._reduction()
        self._loss_sum = 0.0
        self._counted = 0
        self._sums = dict.fromkeys(MEANS, 0.0)
        self._ratio_bounds = (math.inf, -math.inf)

    def active(self, indices: Sequence[int]) -> torch.Tensor:
        """bool [T]: tokens of these datums that the loss depends on."""
        return torch.from_numpy(self._concatenated(indices) != 0)

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """int64 [T]"""
        return self._input("target_tokens", indices)

    def add(self, indices: Sequence[int], scores: Scores) -> torch.Tensor:
        """The share of these datums in the loss: float64 [D], reduced, differentiable."""
        device = scores.logprobs.device
        lengths = torch.tensor([self.job.datums[i].model_input.length for i in indices])
        w = torch.from_numpy(self._concatenated(indices)).to(device, torch.float64)
        lp = scores.logprobs.double()
        values = self._values(indices, lp, scores, w=w, lengths=lengths.to(device))
        datum = torch.arange(len(indices), device=device).repeat_interleave(lengths.to(device))
        sums = values.new_zeros(len(indices)).index_add(0, datum, values)
        self._loss_sum += float(sums.detach().sum())
        return sums * self._factor

    def metrics(self) -> dict[str, float]:
        """After all datums were added. Ratio metrics are over tokens of weight other than 0."""
        common = {
            "loss": self._loss_sum * self._factor,
            "loss_sum": self._loss_sum,
            "weight_sum": self.weight_sum,
            "num_tokens": float(sum(d.model_input.length for d in self.job.datums)),
        }
        if self.job.loss_fn not in RATIO_LOSSES:
            return common
        if not self._counted:
            ones = dict.fromkeys(("ratio_mean", "ratio_min", "ratio_max"), 1.0)
            return common | self._sums | ones
        low, high = self._ratio_bounds
        means = {name: total / self._counted for name, total in self._sums.items()}
        return common | means | {"ratio_min": low, "ratio_max": high}

    def _values(
        self,
        indices: Sequence[int],
        lp: torch.Tensor,
        scores: Scores,
        *,
        w: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted per-token losses, float64 [T]."""
        if self.job.loss_fn == "cross_entropy":
            return w * losses.cross_entropy(lp)
        if self.job.loss_fn == "surrogate":
            return losses.surrogate(lp, w)
        counted = w != 0
        given = self._input("logprobs", indices).to(lp)
        q = torch.where(counted, given, lp.detach())
        A = self._input("advantages", indices).to(lp)
        options: dict[str, Any] = {k: v for k, v in self._options.items() if k not in COMMON}
        if self.job.loss_fn == "gspo":
            options |= {"counted": counted, "lengths": lengths}
        token = RATIO_LOSSES[self.job.loss_fn](lp, q, A, **options)
        estimates = losses.kl_estimates(lp, q)
        value = token.value + self._options.get("kl_coef", 0.0) * estimates[2]
        assert scores.entropy is not None
        if self.entropy_coef:
            value = value - self.entropy_coef * scores.entropy.double()
        self._observe(token, estimates, scores.entropy, counted=counted)
        value = torch.where(token.ratio.isfinite(), value, torch.nan)  # clipped, yet broken data
        return torch.where(counted, w * value, 0.0)

    @torch.no_grad()
    def _observe(
        self,
        token: losses.TokenLoss,
        estimates: tuple[torch.Tensor, ...],
        entropy: torch.Tensor,
        *,
        counted: torch.Tensor,
    ) -> None:
        if not bool(counted.any()):
            return
        columns = (token.ratio, token.clipped, *estimates, entropy)
        for name, column in zip(self._sums, columns, strict=True):
            self._sums[name] += float(column[counted].double().sum())
        ratio = token.ratio[counted]
        low, high = self._ratio_bounds
        self._ratio_bounds = min(low, float(ratio.min())), max(high, float(ratio.max()))
        self._counted += int(counted.sum())

    def _reduction(self) -> float:
        """What the sum is multiplied by: 1/Σw, 1, or 1/denominator; 0 where Σw is 0."""
        if "denominator" in self._options:
            return 1 / self._options["denominator"]
        if self.job.loss_fn_config.get("reduction") == "sum" or self.job.loss_fn == "surrogate":
            return 1.0
        return 1 / self.weight_sum if self.weight_sum else 0.0

    def _concatenated(self, indices: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.concatenate([self._weights[i] for i in indices])

    def _input(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        arrays = [self.job.datums[i].loss_fn_inputs[name].to_numpy() for i in indices]
        return torch.from_numpy(np.concatenate(arrays))
