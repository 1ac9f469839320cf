"""The losses. A loss is a class: its inputs, its options with their bounds, its formula.

Clients and the service check data against the class (`weaver.checks`) before anything is queued;
the engine makes one with its options and calls `per_token`, then weighs, sums and reports. Nothing
else knows a loss by name: `CONTRIBUTING.md` says how to add one.

No torch is imported: a formula uses the methods of the arrays that it is given, which are torch's.
In formulas `lp` is the log-probability of the target under the policy now, `q` that under which it
was sampled (both in nats), `A` the advantage, r = exp(lp - q). Values are losses: lower is better.
Every array is [T]: the tokens of some datums, end to end; where positions have K targets each, T
counts every one of them. Of a scalar head T counts the datums: `lp` is the score of each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, dataclass_transform

from weaver.errors import InvalidLossConfigError
from weaver.types import Head

Array = Any
"""A torch tensor [T]."""
REDUCTIONS = ("mean", "sum")


class Option(NamedTuple):
    """A number that a loss may be given."""

    default: float | None
    """None: off until it is given."""
    at_least: float | None
    above: float | None

    def wrong(self, value: float) -> str | None:
        """What the value must be, where it is not."""
        if self.at_least is not None and value < self.at_least:
            return f"at least {self.at_least:g}"
        if self.above is not None and value <= self.above:
            return f"above {self.above:g}"
        return None


def option(
    default: float | None, *, at_least: float | None = None, above: float | None = None
) -> Any:
    """The field of a loss that is an option of it."""
    return field(default=default, metadata={"option": Option(default, at_least, above)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a formula sees of the tokens of some datums."""

    lp: Array
    """float64, differentiable"""
    inputs: Mapping[str, Array]
    """float64, by name; neutral where a token is not counted: `logprobs` is lp, others are 0."""
    counted: Array
    """bool: of a weight other than 0. What a formula says of the others is left out."""
    datum: Array
    """int64: the datum that each token is of, counted from 0."""
    entropy: Array = None
    """float64: of the policy at that position, in nats; None where no loss reads it."""

    @property
    def q(self) -> Array:
        return self.inputs["logprobs"]

    @property
    def A(self) -> Array:
        return self.inputs["advantages"]

    def mean_of_datum(self, values: Array) -> Array:
        """At each token the mean of its datum's counted tokens."""
        zeros = values.new_zeros(int(self.datum[-1]) + 1)
        sums = zeros.index_add(0, self.datum, values.where(self.counted, 0.0))
        counts = zeros.index_add(0, self.datum, self.counted.to(values.dtype)).clamp(min=1)
        return (sums / counts)[self.datum]


class TokenLoss(NamedTuple):
    """Ratio losses give all three; only `value` has a gradient, which a clipped token lost."""

    value: Array
    ratio: Array = None
    clipped: Array = None


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """Made with its options, which are its fields; those here are every loss's.

    A class that inherits is a frozen dataclass, too, without saying so.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()
    """What every datum must have beside `target_tokens`, float32 [T]; of a scalar head [1]."""
    optional: ClassVar[tuple[str, ...]] = ()
    """What a datum may have, 0 where it has not."""
    heads: ClassVar[tuple[Head | None, ...]] = (None,)
    """Those that it is of; None is the head for tokens."""
    paired: ClassVar[bool] = False
    """Whether datums 2i and 2i + 1 are one pair: what is said of it stands with the first."""
    weights: ClassVar[tuple[str, ...]] = ("weights", "loss_mask")
    """Names of the input, float32 [T], by which tokens are weighed: 1 where a datum has none."""
    several: ClassVar[bool] = False
    """Whether `target_tokens`, and all inputs with them, may be [T, K]: K at each position."""
    averaged: ClassVar[bool] = True
    """Whether the sum is divided by that of the weights, where no option says otherwise."""
    reads_entropy: ClassVar[bool] = False
    corrects: ClassVar[bool] = False
    """Whether a ratio in it makes up for samples of older weights."""

    reduction: str = "mean"
    temperature: float = option(1.0, above=0.0)
    denominator: float | None = option(None, above=0.0)

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """By name, its own behind those of every loss."""
        return {f.name: f.metadata["option"] for f in fields(cls) if f.metadata}

    @property
    def trains_entropy(self) -> bool:
        """Whether its value depends on the entropy; only then that is differentiated."""
        return False

    @abstractmethod
    def per_token(self, tokens: Tokens) -> TokenLoss:
        """Neither weighed nor summed; differentiable in `tokens.lp`."""


class CrossEntropy(Loss):
    """-lp, the negative log-likelihood.

    With K targets at each position, weighed by a teacher's probabilities of them, it distils the
    teacher into the policy (Hinton et al., arXiv:1503.02531), at the temperature that is given.
    """

    name = "cross_entropy"
    several = True

    def per_token(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(-tokens.lp)


class Surrogate(Loss):
    """c·lp, c being its weight: the linear form whose gradient is c, for losses of the client's.

    Of a scalar head it is c·s, s being the score.
    """

    name = "surrogate"
    inputs = ("surrogate_weights",)
    weights = ("surrogate_weights",)
    heads = (None, "scalar")
    several = True
    averaged = False

    def per_token(self, tokens: Tokens) -> TokenLoss:
        return TokenLoss(tokens.lp)


class RatioLoss(Loss):
    """A loss of what was sampled from q; metrics say how far the policy has left it."""

    inputs = ("logprobs", "advantages")
    reads_entropy = True
    corrects = True


class Truncated(RatioLoss):
    """Truncates r, rewards entropy and holds the policy near q, where it is asked to."""

    ratio_cap: float | None = option(None, above=0.0)
    entropy_coef: float = option(0.0)
    kl_coef: float = option(0.0)

    @property
    def trains_entropy(self) -> bool:
        return self.entropy_coef != 0

    def ratio(self, tokens: Tokens) -> tuple[Array, Array]:
        """min(r, cap) whose gradient is min(r, cap)·∇lp, and where it was capped."""
        lp, cap = tokens.lp, math.inf if self.ratio_cap is None else self.ratio_cap
        weight = (lp - tokens.q).exp().detach()
        return weight.clamp(max=cap) * (lp - lp.detach()).exp(), weight > cap

    def regularised(self, value: Array, tokens: Tokens) -> Array:
        """`value` + `kl_coef`·k3 - `entropy_coef`·H."""
        if self.kl_coef:
            value = value + self.kl_coef * kl_estimates(tokens.lp, tokens.q)[2]
        return value - self.entropy_coef * tokens.entropy if self.entropy_coef else value


class Clipped(RatioLoss):
    """Bounds are absolute ratios."""

    clip_low_threshold: float
    clip_high_threshold: float

    def __post_init__(self) -> None:
        if self.clip_low_threshold > self.clip_high_threshold:
            raise InvalidLossConfigError(
                "clip_low_threshold is above clip_high_threshold.",
                field="loss_fn_config",
                hint="Both are absolute ratios, such as 0.8 and 1.2.",
            )

    def clip(self, ratio: Array) -> Array:
        return ratio.clamp(self.clip_low_threshold, self.clip_high_threshold)

    def lesser(self, ratio: Array, A: Array) -> tuple[Array, Array]:
        """min(ratio·A, clip(ratio)·A), and where the clipped side is the smaller."""
        plain, bounded = ratio * A, self.clip(ratio) * A
        return plain.minimum(bounded), bounded < plain


class ImportanceSampling(Truncated):
    """-r·A: the off-policy policy gradient, E_q[r·A·∇lp].

    With `ratio_cap` c it is truncated importance sampling (Ionides 2008; for language models Yao et
    al. 2025): r is replaced by min(r, c), and a truncated token keeps the gradient c·A·∇lp.
    """

    name = "importance_sampling"

    def per_token(self, tokens: Tokens) -> TokenLoss:
        ratio, capped = self.ratio(tokens)
        value = self.regularised(-ratio * tokens.A, tokens)
        return TokenLoss(value, ratio.detach(), capped)


class Ppo(Clipped, Truncated):
    """-min(r·A, clip(r, low, high)·A): PPO (arXiv:1707.06347, eq. 7).

    `dual_clip` c bounds the loss by -c·A where A < 0 (arXiv:1912.09729, eq. 5). `ratio_cap`
    truncates r first, as in `importance_sampling`. Left out: the value term.
    """

    name = "ppo"
    clip_low_threshold: float = option(0.8, at_least=0.0)
    clip_high_threshold: float = option(1.2, at_least=0.0)
    dual_clip: float | None = option(None, above=1.0)

    def per_token(self, tokens: Tokens) -> TokenLoss:
        ratio, capped = self.ratio(tokens)
        value, clipped = self.lesser(ratio, tokens.A)
        if self.dual_clip is not None:
            floor = self.dual_clip * tokens.A
            bounded = (tokens.A < 0) & (value < floor)
            value, clipped = floor.where(bounded, value), clipped | bounded
        return TokenLoss(self.regularised(-value, tokens), ratio.detach(), clipped | capped)


class Cispo(Clipped):
    """-stop(clip(r, low, high))·lp·A: CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4).

    The weight is clipped, never the gradient: every token keeps ∇lp. The method clips above only: a
    low threshold above 0 goes on pushing, at that weight, what the policy has left.
    """

    name = "cispo"
    clip_low_threshold: float = option(0.0, at_least=0.0)
    clip_high_threshold: float = option(4.0, at_least=0.0)

    def per_token(self, tokens: Tokens) -> TokenLoss:
        ratio = (tokens.lp - tokens.q).exp().detach()
        weight = self.clip(ratio)
        return TokenLoss(-weight * tokens.lp * tokens.A, ratio, weight != ratio)


class Gspo(Clipped):
    """-min(s·A, clip(s)·A), s = exp(mean(lp - q)) over a datum: GSPO (arXiv:2507.18071, eq. 5).

    The mean is over the counted tokens. In the token variant (eq. 13, 14): a token has its own A
    and moves by its own ∇lp, s·A·∇lp, which is GSPO's where A and weight are a datum's.
    """

    name = "gspo"
    clip_low_threshold: float = option(1 - 3e-4, at_least=0.0)
    clip_high_threshold: float = option(1 + 4e-4, at_least=0.0)

    def per_token(self, tokens: Tokens) -> TokenLoss:
        lp = tokens.lp.detach()
        ratio = tokens.mean_of_datum(lp - tokens.q).exp()
        value, clipped = self.lesser(ratio * (tokens.lp - lp).exp(), tokens.A)
        return TokenLoss(-value, ratio, clipped)


class Dro(RatioLoss):
    """-(lp·A - β/2·(lp - q)²): direct reward optimisation (arXiv:2405.19107), per token.

    Left out: the learned value baseline; advantages take its place.
    """

    name = "dro"
    corrects = False
    beta: float = option(0.05, at_least=0.0)

    def per_token(self, tokens: Tokens) -> TokenLoss:
        log_ratio = tokens.lp - tokens.q
        value = tokens.lp * tokens.A - 0.5 * self.beta * log_ratio**2
        ratio = log_ratio.exp().detach()
        return TokenLoss(-value, ratio, ratio.new_zeros(ratio.shape).bool())


class BradleyTerry(Loss):
    """-log σ(s⁺ - s⁻ - m) + c·(s⁺ + s⁻)², s⁺ and s⁻ the scores of a pair, the preferred first.

    Bradley and Terry 1952; as the loss of a reward model Ouyang et al. (arXiv:2203.02155, eq. 1).
    The margin m is an input of the preferred side (Touvron et al., arXiv:2307.09288, eq. 2). With
    `centre` c scores stay near 0 (Eisenstein et al., arXiv:2312.09244).
    """

    name = "bradley_terry"
    optional = ("margin",)
    weights = ("weights",)
    heads = ("scalar",)
    paired = True
    centre: float = option(0.0, at_least=0.0)

    def per_token(self, tokens: Tokens) -> TokenLoss:
        chosen, rejected = tokens.lp.view(-1, 2).unbind(1)
        apart = chosen - rejected - tokens.inputs["margin"][::2]
        value = apart.new_zeros(()).logaddexp(-apart) + self.centre * (chosen + rejected) ** 2
        return TokenLoss(value.repeat_interleave(2))


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        *(CrossEntropy, ImportanceSampling, Ppo, Cispo, Gspo, Dro, Surrogate),
        BradleyTerry,
    )
}


def kl_estimates(lp: Array, q: Array) -> tuple[Array, Array, Array]:
    """k1, k2, k3 of KL(q ‖ policy) from samples of q (Schulman 2020, joschu.net/blog/kl-approx).

    With r = exp(lp - q): k1 = -log r, k2 = (log r)²/2, k3 = r - 1 - log r.
    """
    log_ratio = lp - q
    return -log_ratio, 0.5 * log_ratio**2, log_ratio.expm1() - log_ratio
