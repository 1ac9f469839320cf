"""`Plan`: everything that decides what a policy-gradient run does; `Steps`, what every plan has.

The RL loops take a `Plan`, `supervised` takes a `SupervisedPlan`, which is defined beside it. How
far trainer and sampler may differ about the same weights is part of a plan; loops check it at each
step by `check_gap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from weaver.errors import ConfigError, WeaverError
from weaver.types import AdamParams, ModelInfo, SamplingParams
from weaver_rl.advantages import AdvantageFn
from weaver_rl.credit.combined import check_credits
from weaver_rl.credit.marks import Credit
from weaver_rl.credit.outcome import outcome
from weaver_rl.curriculum import Curriculum
from weaver_rl.guard import name_of
from weaver_rl.objectives import Objective, behaviour
from weaver_rl.schedules import for_model

__all__ = ["LogprobGapError", "Plan", "check_gap", "rounding_gap"]

MaxGap = float | Literal["auto"] | None
"""Nats on a token; "auto": `rounding_gap`; None: any."""
ROUNDING: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 1.0}
"""Nats on a token, by the dtype that is sampled in. The engine keeps the one of float32. In
bfloat16 logits above 16 are rounded to eighths: 0.03 is a usual root mean square (ServiceNow's
Fast-LLM, #525), 0.17 the largest in 40 steps of weaver-nano, and a mixture may choose another
expert."""


class LogprobGapError(WeaverError):
    """Trainer and sampler disagree about the same weights: gradients would be of another policy."""

    code = "logprob_gap"


def rounding_gap(model: ModelInfo, *, temperature: float = 1.0) -> float:
    """Nats by which rounding makes trainer and sampler differ on a token, at most.

    `model` is `trainer.model_info`. Logits that are divided by a low temperature are divided with
    their rounding.
    """
    return ROUNDING[model.dtype] / min(1.0, temperature)


def check_gap(
    gap: float, model: ModelInfo, *, allowed: MaxGap = "auto", temperature: float = 1.0
) -> None:
    """For loops of your own: `check_gap(np.abs(trained - sampled).max(), trainer.model_info)`.

    Raises:
        LogprobGapError: `gap`, in nats, is more than is allowed, or is no number.
    """
    rounding = rounding_gap(model, temperature=temperature)
    most = rounding if allowed == "auto" else allowed
    if most is None or gap <= most:
        return
    digits = next((n for n in range(2, 17) if f"{gap:.{n}g}" != f"{most:.{n}g}"), 17)
    raise LogprobGapError(
        f"trainer and sampler differ by {gap:.{digits}g} nats on a token of the same weights, "
        f"more than {most:.{digits}g}.",
        field="max_logprob_gap",
        hint=f"Rounding in {model.dtype} costs up to {rounding:.3g}; what is above has another "
        "cause, such as other weights or settings. Raise it for a model of which that is not true; "
        "None allows any.",
    )


ZeroVariance = Literal["keep", "drop", "resample"]
"""What becomes of groups whose samples all earned the same, and so teach nothing. keep: they count
in the denominator; drop: they do not; resample: others take their place. The latter two are the
dynamic sampling of DAPO (Yu et al., arXiv:2503.14476, section 3.2)."""
Move = Literal["never", "turn", "reply"]
"""When a rollout takes newer weights. never: it ends with those of its beginning; turn: with each
of its turns; reply: in the midst of what it says, too."""
Schedule = Callable[[int], float]
"""Step, from 0, to learning rate: `lambda step: schedules.cosine(1e-3, step, steps=60)`."""


def at_least(lowest: int, plan: object, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is below `lowest`."""
    for name in names:
        value = getattr(plan, name)
        if value < lowest:
            raise ConfigError(f"is {value!r}.", field=name, hint=f"At least {lowest}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What the optimizer does at each step of a loop, and what is done between steps."""

    learning_rate: float | Schedule | None = None
    """AdamW's, or a function of the step, from 0; None: by the model's size, that of
    `schedules.for_model`."""
    adam: AdamParams = field(default_factory=lambda: AdamParams(grad_clip_norm=1.0))
    """Its learning rate is replaced by `learning_rate`. Gradients are clipped at a norm of 1."""
    evaluate_every: int = 0
    """Steps between evaluations, the first before step 1; 0: only at the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, "evaluate_every", "seed")
        if self.learning_rate is not None and not callable(self.learning_rate):
            AdamParams(learning_rate=self.learning_rate)

    def adam_params(self, step: int, model: ModelInfo) -> AdamParams:
        """Those of a step, from 0."""
        rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        if rate is None:
            rate = for_model(model.num_parameters)
        return self.adam.model_copy(update={"learning_rate": float(rate)})

    def evaluates(self, step: int, *, steps: int) -> bool:
        """Whether an evaluation is due behind `step` of `steps` steps; 0 is before the first."""
        return step >= steps or (self.evaluate_every > 0 and step % self.evaluate_every == 0)

    def as_config(self) -> dict[str, Any]:
        """For `config.json`: a function by its name, a schedule by its first two rates as well."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["adam"] = self.adam.model_dump(exclude={"learning_rate"})
        if callable(self.learning_rate):  # two lambdas have the same name
            rate = self.learning_rate
            values["learning_rate"] = [name_of(rate), rate(0), rate(1)]
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Steps):
    """`Plan(steps=60, learning_rate=1e-3, objective="ppo", passes=2)`

    Raises:
        ConfigError, InvalidLossConfigError: at construction; names the field.
    """

    steps: int
    groups_per_step: int = 32
    """P, tasks of a step."""
    group_size: int = 8
    """G, rollouts of each."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its seed is not used: every sample's comes from `seed`."""
    objective: str | Objective = "importance_sampling"
    advantage: str | AdvantageFn | None = None
    """Short for `credit=credit.outcome(advantage)`; None where a credit is given, else
    "group_centred"."""
    credit: Credit | None = None
    """The advantage of each sampled token: one of `weaver_rl.credit`, or a function of yours."""
    curriculum: Curriculum | None = None
    """Which tasks come next, of `weaver_rl.curriculum`; None: each once, in a shuffled order."""
    zero_variance: ZeroVariance = "keep"
    resample_rounds: int = 5
    """Rounds of sampling with `zero_variance="resample"`, the first included; after these a step
    makes do with what it has."""
    passes: int = 1
    """How often each step's rollouts are trained on."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    max_staleness: int = 0
    """Steps by which rollouts may be older than the weights that train on them; `off_policy` only.
    Above 0 the objective must name its correction."""
    in_flight: Move | None = None
    """When rollouts that are under way go on with newer weights, where `max_staleness` is above 0;
    None: "turn", or "never" on a deterministic engine, where no number depends on what was faster.
    """
    max_failure_rate: float = 0.1
    max_logprob_gap: MaxGap = "auto"
    """Nats by which trainer and sampler may differ on a token of the same weights; auto: what
    rounding in the model's dtype costs at most (`rounding_gap`); None: any."""

    def __post_init__(self) -> None:
        Steps.__post_init__(self)
        at_least(0, self, "steps", "max_staleness", "max_failure_rate")
        at_least(1, self, "groups_per_step", "group_size", "passes", "minibatches")
        at_least(1, self, "resample_rounds")
        if self.curriculum is not None and not callable(self.curriculum):
            hint = "Use rl.curriculum.by_pass_rate() or its like."
            raise ConfigError(f"is {self.curriculum!r}.", field="curriculum", hint=hint)
        if self.zero_variance not in get_args(ZeroVariance):
            raise ConfigError(
                f"is {self.zero_variance!r}.", field="zero_variance", hint="keep, drop or resample."
            )
        if self.in_flight not in (None, *get_args(Move)):
            hint = "never, turn, reply or None."
            raise ConfigError(f"is {self.in_flight!r}.", field="in_flight", hint=hint)
        if self.credit is not None and self.advantage is not None:
            raise ConfigError(
                "is given beside a credit.",
                field="advantage",
                hint="Use credit=rl.credit.total(rl.credit.outcome(advantage), ...).",
            )
        check_credits(self.credited)
        most = self.max_logprob_gap
        if most not in ("auto", None) and not (isinstance(most, int | float) and most >= 0):
            hint = '"auto", nats from 0 up, or None for any.'
            raise ConfigError(f"is {most!r}.", field="max_logprob_gap", hint=hint)
        loss = self.loss  # refuses what is no objective
        if self.max_staleness > 0 and loss.correction is None:
            raise ConfigError(
                f"max_staleness is {self.max_staleness}, "
                "and no correction for older weights is named.",
                field="objective.correction",
                hint='Use Objective(loss_fn="ppo", correction="ratio"), '
                '"token", "sequence" or "none".',
            )
        corrects = self.max_staleness > 0 and loss.correction != "none"
        if corrects and not behaviour(self.sampling).known:
            raise ConfigError(
                f"a temperature of {self.sampling.temperature:g} with top-k, top-p, min-p or a "
                "repetition penalty: of older samples no log-probability at it is known.",
                field="sampling",
                hint='Use temperature 1, no filter, max_staleness 0 or correction="none".',
            )

    @property
    def loss(self) -> Objective:
        """A name stands for that loss with its default options."""
        given = self.objective
        return given if isinstance(given, Objective) else Objective(loss_fn=given)

    @property
    def credited(self) -> Credit:
        """The credit, or the one that `advantage` is short for."""
        return self.credit or outcome(self.advantage or "group_centred")

    def as_config(self) -> dict[str, Any]:
        values = Steps.as_config(self)
        values["objective"] = {f.name: getattr(self.loss, f.name) for f in fields(Objective)}
        if self.credit is not None:
            values["credit"] = name_of(self.credit)
        else:
            given = self.advantage or "group_centred"
            values["advantage"] = name_of(given) if callable(given) else given
        if self.curriculum is not None:
            values["curriculum"] = name_of(self.curriculum)
        return values
