"""What a policy step minimises: a named loss of the engine with its options, as one value.

The RL loops take an `Objective`, or the name of a loss. `lp` is the log-probability of a sampled
token under the policy now, `q` under the weights that sampled it, r = exp(lp − q), A its advantage.

| loss_fn               | per token                       | paper                               |
|-----------------------|---------------------------------|-------------------------------------|
| `importance_sampling` | −r·A                            | off-policy REINFORCE                |
| `ppo`                 | −min(r·A, clip(r)·A)            | arXiv:1707.06347; dual clip 1912.09729 |
| `cispo`               | −stop(clip(r))·lp·A             | MiniMax-M1, arXiv:2506.13585        |
| `gspo`                | −min(s·A, clip(s)·A), s = (Πr)^(1/T) | arXiv:2507.18071               |
| `dro`                 | −(lp·A − ½β(lp−q)²)             | arXiv:2405.19107                    |
| `cross_entropy`       | −lp·A, no ratio                 | REINFORCE                           |

`kl_loss` pulls the policy towards a reference model (`reference=` of the loop): it adds
β·½(lp − lp_ref)² to the loss, which is, on the policy's own samples, the gradient of each token's
own KL, what comes behind it left out. The KL in the reward is `weaver_rl.credit.kl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Literal

from weaver import losses
from weaver.checks import check_loss
from weaver.errors import ConfigError, nearest
from weaver.types import SamplingParams

__all__ = ["Objective"]

LOSSES = tuple(
    name
    for name, loss in losses.LOSSES.items()
    if name == "cross_entropy" or issubclass(loss, losses.RatioLoss)
)
"""Those that rollouts have the inputs of."""
RATIO_LOSSES = frozenset(name for name in LOSSES if losses.LOSSES[name].corrects)

Aggregate = Literal["token", "sequence", "constant"]
Correction = Literal["ratio", "token", "sequence", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """`Objective(loss_fn="ppo", config={"clip_high_threshold": 1.28}, correction="ratio")`

    Raises:
        ConfigError, InvalidLossConfigError, UnknownLossError: at construction.
    """

    loss_fn: str = "importance_sampling"
    config: Mapping[str, float] = field(default_factory=dict)
    """Options of the loss: clip thresholds, `dual_clip`, `ratio_cap`, `entropy_coef`, `beta`."""
    aggregate: Aggregate | None = None
    """How a batch becomes one number. token: mean over sampled tokens (DAPO). sequence: mean over
    rollouts of each one's mean (GRPO, GSPO). constant: sum / (rollouts · max_tokens) (Dr. GRPO).
    None becomes "sequence" for `gspo`, as in its paper, "token" for the others."""
    correction: Correction | None = None
    """What makes up for samples of older weights; asynchronous loops want it named.

    ratio: the loss' own r. token, sequence: the policy of the step's beginning takes the place of q
    and each token is weighted by min(π_then/q, `correction_cap`), of the token or of the whole
    rollout (truncated importance sampling; decoupled PPO, arXiv:2110.00641). none: nothing, on
    purpose. None: not said; the loss' own r."""
    correction_cap: float = 2.0
    kl_loss: float = 0.0
    """β of the KL penalty in the loss, per nat."""
    kl_reward: InitVar[float | None] = None
    """Refused, with the name that it has now."""

    def __post_init__(self, kl_reward: float | None) -> None:
        if kl_reward is not None:
            raise ConfigError(
                "is a credit now.",
                field="objective.kl_reward",
                hint="Use Plan(credit=rl.credit.total(rl.credit.outcome(...), "
                f"rl.credit.kl(reference, beta={kl_reward!r}))).",
            )
        if self.aggregate is None:
            usual: Aggregate = "sequence" if self.loss_fn == "gspo" else "token"
            object.__setattr__(self, "aggregate", usual)
        if self.loss_fn not in LOSSES:
            raise ConfigError(
                f"no policy loss is called {self.loss_fn!r}.",
                field="objective",
                hint=nearest(str(self.loss_fn), LOSSES),
            )
        owned = {"temperature", "denominator", "reduction"} & set(self.config)
        if owned:
            raise ConfigError(
                f"{min(owned)} is set by the loop.",
                field="objective.config",
                hint="Use sampling=SamplingParams(temperature=...) and aggregate=.",
            )
        check_loss(self.loss_fn, self.config)
        for name in ("kl_loss", "correction_cap"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"is {value!r}.", field=f"objective.{name}", hint="At least 0.")
        if self.correction == "ratio" and self.loss_fn not in RATIO_LOSSES:
            raise ConfigError(
                f"{self.loss_fn} has no ratio that could correct for older weights.",
                field="objective.correction",
                hint=f"Use 'token' or 'sequence', or one of {', '.join(sorted(RATIO_LOSSES))}.",
            )

    @property
    def needs_reference(self) -> bool:
        return self.kl_loss > 0

    @property
    def recomputes(self) -> bool:
        """Whether a step begins with a forward pass that takes the place of q."""
        return self.correction in ("token", "sequence", "none")


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Which log-probabilities of a sample are q, and the temperature of `lp` that matches them."""

    tempered: bool
    """q is `sampling_logprobs`; else `logprobs`, which are untempered."""
    temperature: float
    """That of the policy that is trained."""

    @property
    def known(self) -> bool:
        """Whether the sampler tells the q that belongs to `temperature`."""
        return self.tempered or self.temperature == 1

    @property
    def told(self) -> float:
        """The temperature of the log-probabilities that the sampler tells."""
        return self.temperature if self.tempered else 1.0


def behaviour(params: SamplingParams) -> Behaviour:
    """The q for which r = 1 exactly on the policy's own samples.

    The policy at the temperature of sampling is what is trained (at 1 where that is 0). Temperature
    alone: q is the distribution drawn from. With top-k, top-p, min-p, a penalty, a bias or a
    grammar that is not one that a loss can compute: q is then the policy at that temperature,
    unfiltered, so r = 1 holds; what the filter did to the distribution is ignored. The sampler
    tells that q at temperature 1 only; at another, `policy_step` asks the trainer for it.
    """
    filtered = (
        params.temperature == 0
        or params.top_p < 1
        or params.top_k > 0
        or params.min_p > 0
        or params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or params.structured
    )
    return Behaviour(not filtered, params.temperature or 1.0)
