"""The losses: pure functions of per-token arrays; `objective.py` weighs, sums and reports them.

Shapes: every array is [T], the tokens of one call end to end, in any floating dtype. Symbols: `lp`
log-probability of the target under the policy now, `q` that under which it was sampled (both nats),
`A` advantage, r = exp(lp - q). Values are losses: lower is better. Names and options are those of
`weaver.loss_specs.LOSS_SPECS`. No function weighs or sums; a token to be ignored must have q = lp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLoss(NamedTuple):
    """All [T]. `ratio` and `clipped` carry no gradient; `clipped` tokens lost all or part of it."""

    value: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def cross_entropy(lp: torch.Tensor) -> torch.Tensor:
    """-lp, the negative log-likelihood."""
    return -lp


def surrogate(lp: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c·lp: the linear form whose gradient is c, for losses computed by the client."""
    return c * lp


def importance_sampling(
    lp: torch.Tensor, q: torch.Tensor, A: torch.Tensor, *, ratio_cap: float | None = None
) -> TokenLoss:
    """-r·A: the off-policy policy gradient, E_q[r·A·∇lp].

    With `ratio_cap` c it is truncated importance sampling (Ionides 2008; for language models Yao et
    al. 2025): r is replaced by min(r, c), and a truncated token keeps the gradient c·A·∇lp.
    """
    ratio, capped = truncated_ratio(lp, q, cap=ratio_cap)
    return TokenLoss(-ratio * A, ratio.detach(), capped)


def ppo(
    lp: torch.Tensor,
    q: torch.Tensor,
    A: torch.Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
) -> TokenLoss:
    """-min(r·A, clip(r, low, high)·A): PPO (arXiv:1707.06347, eq. 7), bounds as absolute ratios.

    `dual_clip` c bounds the loss by -c·A where A < 0 (arXiv:1912.09729, eq. 5). `ratio_cap`
    truncates r first, as in `importance_sampling`. Left out: value and entropy terms.
    """
    ratio, capped = truncated_ratio(lp, q, cap=ratio_cap)
    value, clipped = clipped_objective(ratio, A, low=clip_low_threshold, high=clip_high_threshold)
    if dual_clip is not None:
        floor = dual_clip * A
        bounded = (A < 0) & (value < floor)
        value, clipped = torch.where(bounded, floor, value), clipped | bounded
    return TokenLoss(-value, ratio.detach(), clipped | capped)


def cispo(
    lp: torch.Tensor,
    q: torch.Tensor,
    A: torch.Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
) -> TokenLoss:
    """-stop(clip(r, low, high))·lp·A: CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4).

    The weight is clipped, never the gradient: every token keeps ∇lp. The method clips above only: a
    low threshold above 0 goes on pushing, at that weight, what the policy has left.
    """
    ratio = torch.exp(lp - q).detach()
    weight = ratio.clamp(clip_low_threshold, clip_high_threshold)
    return TokenLoss(-weight * lp * A, ratio, weight != ratio)


def gspo(
    lp: torch.Tensor,
    q: torch.Tensor,
    A: torch.Tensor,
    *,
    counted: torch.Tensor,
    lengths: torch.Tensor,
    clip_low_threshold: float,
    clip_high_threshold: float,
) -> TokenLoss:
    """-min(s·A, clip(s)·A), s = exp(mean(lp - q)) over a sequence: GSPO (arXiv:2507.18071, eq. 5).

    `lengths` [D] splits the tokens into sequences; the mean is over the `counted` (bool [T]) ones.
    Left out: the GSPO-token variant.
    """
    sequence = torch.arange(len(lengths), device=lp.device).repeat_interleave(lengths)
    zeros = lp.new_zeros(len(lengths))
    sums = zeros.index_add(0, sequence, torch.where(counted, lp - q, 0.0))
    counts = zeros.index_add(0, sequence, counted.to(lp.dtype)).clamp(min=1)
    ratio = torch.exp(sums / counts)[sequence]
    value, clipped = clipped_objective(ratio, A, low=clip_low_threshold, high=clip_high_threshold)
    return TokenLoss(-value, ratio.detach(), clipped)


def dro(lp: torch.Tensor, q: torch.Tensor, A: torch.Tensor, *, beta: float) -> TokenLoss:
    """-(lp·A - β/2·(lp - q)²): direct reward optimisation (arXiv:2405.19107), per token.

    Left out: the learned value baseline; advantages take its place.
    """
    log_ratio = lp - q
    ratio = torch.exp(log_ratio).detach()
    value = lp * A - 0.5 * beta * log_ratio**2
    return TokenLoss(-value, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def truncated_ratio(
    lp: torch.Tensor, q: torch.Tensor, *, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r, cap) whose gradient is min(r, cap)·∇lp, and where it was capped."""
    ratio = torch.exp(lp - q)
    if cap is None:
        return ratio, torch.zeros_like(ratio, dtype=torch.bool)
    weight = ratio.detach()
    return weight.clamp(max=cap) * torch.exp(lp - lp.detach()), weight > cap


def clipped_objective(
    ratio: torch.Tensor, A: torch.Tensor, *, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(ratio·A, clip(ratio)·A), and where the clipped side is the smaller."""
    plain, bounded = ratio * A, ratio.clamp(low, high) * A
    return torch.minimum(plain, bounded), bounded < plain


def kl_estimates(lp: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """k1, k2, k3 of KL(q ‖ policy) from samples of q (Schulman 2020, joschu.net/blog/kl-approx).

    With r = exp(lp - q): k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r.
    """
    log_ratio = lp - q
    return -log_ratio, 0.5 * log_ratio**2, torch.expm1(log_ratio) - log_ratio
