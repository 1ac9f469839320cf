"""`Objective`: one job's loss over several passes, weighed, summed, and reported as metrics.

The trainer makes one for each `GradientJob` and feeds it the datums of every pass; the formulas are
those of `weaver.losses`. D datums given, T rows of theirs and N targets. Rows are tokens, each of
which has a target, but where a datum has K; of a scalar head a datum is one row, and its score the
one target. Loss arithmetic is float64: it costs nothing beside the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weaver.checks import make_loss, weights_of
from weaver.engine.base import GradientJob
from weaver.engine.torch.logprobs import Queries, Scores, target_scores
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.packing import PackedBatch, stacked
from weaver.losses import RatioLoss, TokenLoss, Tokens, kl_estimates
from weaver.types import Head

PAIR_MEANS = ("accuracy", "margin", "chosen_score", "rejected_score")
MEANS = (
    *("ratio_mean", "clip_fraction", "clip_low_fraction", "clip_high_fraction"),
    *("kl_k1", "kl_k2", "kl_k3", "entropy"),
)


@dataclass(slots=True)
class Totals:
    """What an objective has added up so far. Whoever may have to go back keeps a deep copy."""

    loss: float = 0.0
    counted: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    ratio_bounds: tuple[float, float] = (math.inf, -math.inf)


class Objective:
    def __init__(self, job: GradientJob, head: Head | None = None) -> None:
        self.job = job
        self.loss = make_loss(job.loss_fn, job.loss_fn_config)
        self.output = "scores" if head else "logprobs"
        lengths = [datum.model_input.length for datum in job.datums]
        self.num_tokens = sum(lengths)
        self.rows = [1] * len(lengths) if head else lengths
        """Of each datum."""
        self.lengths = lengths
        """Tokens of what is in one pass together: of a datum, or of the datums of a pair."""
        self._targets = [
            np.zeros(1, np.int64) if head else datum.loss_fn_inputs["target_tokens"].to_numpy()
            for datum in job.datums
        ]
        self._weights = [weights_of(datum, self.loss) for datum in job.datums]
        self.totals = Totals()
        if self.loss.paired:
            self.lengths = [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
            self._weights[1::2] = [np.zeros(1, np.float32)] * len(self.lengths)
            self.totals.sums = dict.fromkeys(PAIR_MEANS, 0.0)
        self.weight_sum = float(sum(float(w.sum(dtype=np.float64)) for w in self._weights))
        self._factor = self._reduction()

    def datums(self, together: Sequence[int]) -> list[int]:
        """The datums of what `lengths` counts."""
        if not self.loss.paired:
            return list(together)
        return [datum for pair in together for datum in (2 * pair, 2 * pair + 1)]

    def active(self, indices: Sequence[int]) -> torch.Tensor:
        """bool [T]: rows of these datums that the loss depends on."""
        felt = [self._weights[i].reshape(self.rows[i], -1) != 0 for i in indices]
        return torch.from_numpy(np.concatenate([one.any(1) for one in felt]))

    def targets(self, indices: Sequence[int]) -> list[npt.NDArray[np.int64]]:
        """Of each of these datums, in its own shape: [T] or [T, K]."""
        return [self._targets[i] for i in indices]

    def of_datums(self, indices: Sequence[int], logprobs: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each of these datums out of [T] or [T, W], in the shape of its targets."""
        wide = logprobs[:, None] if logprobs.ndim == 1 else logprobs
        rows = torch.split(wide, [self.rows[i] for i in indices])
        shapes = [self._targets[i].shape for i in indices]
        return [
            row[:, : math.prod(shape[1:])].reshape(shape)
            for row, shape in zip(rows, shapes, strict=True)
        ]

    def add(self, indices: Sequence[int], scores: Scores) -> torch.Tensor:
        """The share of these datums in the loss: float64 [D], reduced, differentiable."""
        device = scores.logprobs.device
        sizes = torch.tensor([self._targets[i].size for i in indices])
        w = self._weight(indices).to(device, torch.float64)
        datum = torch.arange(len(indices)).repeat_interleave(sizes).to(device)
        values = self._values(indices, scores, w=w, datum=datum)
        sums = values.new_zeros(len(indices)).index_add(0, datum, values)
        self.totals.loss += float(sums.detach().sum())
        return sums * self._factor

    def metrics(self) -> dict[str, float]:
        """After all datums were added. Means are over tokens, or pairs, of weight other than 0."""
        common = {
            "loss": self.totals.loss * self._factor,
            "loss_sum": self.totals.loss,
            "weight_sum": self.weight_sum,
            "num_tokens": float(self.num_tokens),
        }
        if self.loss.paired:
            pairs = self.totals.counted or 1
            return common | {name: total / pairs for name, total in self.totals.sums.items()}
        if not isinstance(self.loss, RatioLoss):
            return common
        if not self.totals.counted:
            ones = dict.fromkeys(("ratio_mean", "ratio_min", "ratio_max"), 1.0)
            return common | self.totals.sums | ones
        low, high = self.totals.ratio_bounds
        means = {name: total / self.totals.counted for name, total in self.totals.sums.items()}
        return common | means | {"ratio_min": low, "ratio_max": high}

    def _values(
        self, indices: Sequence[int], scores: Scores, *, w: torch.Tensor, datum: torch.Tensor
    ) -> torch.Tensor:
        """Weighted per-target losses, float64 [N]."""
        lp = scores.logprobs.double()
        if lp.ndim == 2:
            lp = torch.cat([one.flatten() for one in self.of_datums(indices, lp)])
        counted = w != 0
        neutral = {"logprobs": lp.detach()}
        entropy = None if scores.entropy is None else scores.entropy.double()
        inputs = {
            name: torch.where(counted, self._input(name, indices).to(lp), neutral.get(name, 0.0))
            for name in (*self.loss.inputs, *self.loss.optional)
        }
        tokens = Tokens(lp=lp, inputs=inputs, counted=counted, datum=datum, entropy=entropy)
        token = self.loss.per_token(tokens)
        value = token.value
        if self.loss.paired:
            self._observe_pairs(lp.detach(), counted)
        if token.ratio is not None:
            self._observe(token, tokens)
            value = torch.where(token.ratio.isfinite(), value, torch.nan)  # clipped, yet broken
        return torch.where(counted, w * value, 0.0)

    @torch.no_grad()
    def _observe(self, token: TokenLoss, tokens: Tokens) -> None:
        counted = tokens.counted
        if not bool(counted.any()):
            return
        estimates = kl_estimates(tokens.lp, tokens.q)
        low, high = token.clipped & (token.ratio < 1), token.clipped & (token.ratio >= 1)
        columns = (token.ratio, token.clipped, low, high, *estimates, tokens.entropy)
        for name, column in zip(self.totals.sums, columns, strict=True):
            self.totals.sums[name] += float(column[counted].double().sum())
        ratio = token.ratio[counted]
        least, most = self.totals.ratio_bounds
        self.totals.ratio_bounds = min(least, float(ratio.min())), max(most, float(ratio.max()))
        self.totals.counted += int(counted.sum())

    def _observe_pairs(self, scores: torch.Tensor, counted: torch.Tensor) -> None:
        """Of equal scores half is right."""
        chosen, rejected = scores.view(-1, 2)[counted[::2]].unbind(1)
        right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        columns = (right, chosen - rejected, chosen, rejected)
        for name, column in zip(PAIR_MEANS, columns, strict=True):
            self.totals.sums[name] += float(column.sum())
        self.totals.counted += len(chosen)

    def _reduction(self) -> float:
        """What the sum is multiplied by: 1/Σw, 1, or 1/denominator; 0 where Σw is 0."""
        if self.loss.denominator is not None:
            return 1 / self.loss.denominator
        if self.loss.reduction == "sum" or not self.loss.averaged:
            return 1.0
        return 1 / self.weight_sum if self.weight_sum else 0.0

    def _weight(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 [N]"""
        return torch.from_numpy(np.concatenate([self._weights[i].ravel() for i in indices]))

    def _input(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """float32 [N]; 0 where a datum has none."""
        given = [self.job.datums[i].loss_fn_inputs.get(name) for i in indices]
        arrays = [
            np.zeros(self._targets[i].size, np.float32) if one is None else one.to_numpy().ravel()
            for i, one in zip(indices, given, strict=True)
        ]
        return torch.from_numpy(np.concatenate(arrays))


def scores_asked(
    objectives: Sequence[tuple[Objective, Sequence[int]]],
    rows: Sequence[int],
    model: LoadedModel,
    batch: PackedBatch,
    hidden: torch.Tensor,
    *,
    chunk: int,
) -> Scores:
    """Of the targets of datums of some objectives, under `hidden` [T, H] of all; `rows` of each."""
    queries = Queries(
        targets=stacked([one for o, i in objectives for one in o.targets(i)]).to(model.device),
        temperature=torch.tensor([o.loss.temperature for o, _ in objectives], dtype=torch.float32)
        .repeat_interleave(torch.tensor(rows))
        .to(model.device),
        active=torch.cat([o.active(i) for o, i in objectives]).to(model.device),
    )
    return target_scores(
        model,
        hidden,
        batch,
        queries=queries,
        chunk=chunk,
        entropy=any(o.loss.reads_entropy for o, _ in objectives),
        entropy_gradient=any(o.loss.trains_entropy for o, _ in objectives),
    )
