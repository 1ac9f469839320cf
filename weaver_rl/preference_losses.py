"""Losses of preferences: pure functions of the log-probabilities of whole replies.

`algorithms.preference` calls them; a loss of your own is one more `PreferenceLoss` in `LOSSES`.
`bradley_terry` is the engine's own, of a reward model's scores.
Log-probabilities are natural logarithms, summed over the tokens of a reply and its end; suffix N:
the rows of a batch. A row has both replies or, of a loss that is `unpaired`, one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """One side of a batch, the chosen replies or the rejected: float32 [N] each.

    Of rows that lack this side all is 0, and `given` too.
    """

    logprobs: torch.Tensor
    """The policy's; the only part that has a gradient."""
    reference: torch.Tensor
    """The reference's; 0 where the loss asks none."""
    lengths: torch.Tensor
    """Tokens."""
    given: torch.Tensor
    """1 or 0."""

    @property
    def log_ratios(self) -> torch.Tensor:
        """log π − log π_ref."""
        return self.logprobs - self.reference

    @property
    def means(self) -> torch.Tensor:
        """Of log π a token."""
        return self.logprobs / self.lengths.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a loss is computed from, with the plan's numbers."""

    chosen: Replies
    rejected: Replies
    beta: float
    gamma: float
    """SimPO's margin."""
    label_smoothing: float
    """DPO's chance that a pair is the wrong way round."""
    kl: torch.Tensor
    """KTO's z₀, without a gradient: mean of log π − log π_ref of replies to other prompts."""


Formula = Callable[[Batch], "torch.Tensor"]


def dpo(batch: Batch) -> torch.Tensor:
    """−log σ(β·Δ), Δ the difference of log π − log π_ref (Rafailov et al., arXiv:2305.18290).

    With `label_smoothing` ε: −(1 − ε)·log σ(β·Δ) − ε·log σ(−β·Δ), conservative DPO (Mitchell 2023).
    """
    from torch.nn.functional import logsigmoid

    margins_N = batch.beta * (batch.chosen.log_ratios - batch.rejected.log_ratios)
    wrong = batch.label_smoothing
    return (-(1 - wrong) * logsigmoid(margins_N) - wrong * logsigmoid(-margins_N)).mean()


def ipo(batch: Batch) -> torch.Tensor:
    """(Δ − 1 / (2β))², Δ as in DPO (Azar et al., arXiv:2310.12036, equation 17)."""
    margins_N = batch.chosen.log_ratios - batch.rejected.log_ratios
    return (margins_N - 1 / (2 * batch.beta)).square().mean()


def simpo(batch: Batch) -> torch.Tensor:
    """−log σ(β·(log π_chosen / |chosen| − log π_rejected / |rejected|) − γ), without a reference
    (Meng et al., arXiv:2405.14734, equation 6)."""
    from torch.nn.functional import logsigmoid

    margins_N = batch.beta * (batch.chosen.means - batch.rejected.means) - batch.gamma
    return -logsigmoid(margins_N).mean()


def orpo(batch: Batch) -> torch.Tensor:
    """The chosen's −log π a token, and β times −log σ of the difference of log-odds, which are of
    log π a token; without a reference (Hong et al., arXiv:2403.07691, equations 6 and 7)."""
    from torch.nn.functional import logsigmoid

    odds_N = _log_odds(batch.chosen.means) - _log_odds(batch.rejected.means)
    return (-batch.chosen.means - batch.beta * logsigmoid(odds_N)).mean()


def kto(batch: Batch) -> torch.Tensor:
    """1 − σ(β·(r − z₀)) of chosen replies and 1 − σ(β·(z₀ − r)) of rejected ones, r = log π −
    log π_ref, a mean over the replies, which need no pair (Ethayarajh et al., arXiv:2402.01306,
    equation 8, both weights 1)."""
    zero = batch.kl.clamp(min=0)
    good_N = 1 - (batch.beta * (batch.chosen.log_ratios - zero)).sigmoid()
    bad_N = 1 - (batch.beta * (zero - batch.rejected.log_ratios)).sigmoid()
    count = batch.chosen.given.sum() + batch.rejected.given.sum()
    return ((good_N * batch.chosen.given).sum() + (bad_N * batch.rejected.given).sum()) / count


def _log_odds(means_N: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) of p = exp(mean); of a certain reply that of p = 1 − 1e-7."""
    certain = means_N.clamp(max=-1e-7)
    return certain - (-certain.expm1()).log()


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    formula: Formula | None
    """None: of scores, which the engine computes."""
    beta: float
    """Its paper's."""
    needs_reference: bool = False
    unpaired: bool = False
    """Whether a row may have one reply, and whether `Batch.kl` is wanted."""

    @property
    def scores(self) -> bool:
        """Whether it trains a reward model, by the loss of that name in `weaver.losses`."""
        return self.formula is None

    def rewards(self, replies: Replies, beta: float) -> torch.Tensor:
        """[N], what the loss pushes up for chosen replies: β·(log π − log π_ref), or the mean of
        log π a token."""
        return beta * replies.log_ratios if self.needs_reference else replies.means


LOSSES: Mapping[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(formula=dpo, beta=0.1, needs_reference=True),
    "ipo": PreferenceLoss(formula=ipo, beta=0.1, needs_reference=True),
    "kto": PreferenceLoss(formula=kto, beta=0.1, needs_reference=True, unpaired=True),
    "simpo": PreferenceLoss(formula=simpo, beta=2.0),
    "orpo": PreferenceLoss(formula=orpo, beta=0.1),
    "bradley_terry": PreferenceLoss(formula=None, beta=1.0),
}
