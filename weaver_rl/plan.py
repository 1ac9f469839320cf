"""`Plan`: everything that decides what a policy-gradient run does. Both RL loops take one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from weaver.errors import ConfigError
from weaver.types import AdamParams, SamplingParams
from weaver_rl.advantages import AdvantageFn, advantage_fn
from weaver_rl.objectives import Objective, as_objective, named_correction
from weaver_rl.rewards import name_of

if TYPE_CHECKING:
    from weaver_rl.filters import ZeroVariance

Schedule = Callable[[int], float]
"""Step, from 0, to learning rate: `lambda step: schedules.cosine(1e-3, step, steps=60)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`Plan(steps=60, learning_rate=1e-3, objective="ppo", passes=2)`

    Raises:
        ConfigError, InvalidLossConfigError: at construction; names the field.
    """

    steps: int
    groups_per_step: int = 32
    """P, tasks of a step."""
    group_size: int = 8
    """G, rollouts of each."""
    learning_rate: float | Schedule = 1e-3
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Its seed is not used: every sample's comes from `seed`."""
    objective: str | Objective = "importance_sampling"
    advantage: str | AdvantageFn = "group_centred"
    zero_variance: ZeroVariance = "keep"
    passes: int = 1
    """How often each step's rollouts are trained on."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    max_staleness: int = 0
    """Steps by which rollouts may be older than the weights that train on them; `off_policy` only.
    Above 0 the objective must name its correction."""
    adam: AdamParams = field(default_factory=AdamParams)
    """Its learning rate is replaced by `learning_rate`."""
    max_failure_rate: float = 0.1
    max_logprob_gap: float | None = 1e-4
    """Nats by which trainer and sampler may differ on a token of the same weights; None: any."""
    evaluate_every: int = 0
    """Steps between evaluations, where the loop is given one; 0: only at the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "groups_per_step", "group_size", "passes", "minibatches"):
            value = getattr(self, name)
            if value < 1 and not (name == "steps" and value == 0):
                raise ConfigError(f"is {value!r}.", field=name, hint="At least 1.")
        for name in ("max_staleness", "evaluate_every", "seed", "max_failure_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"is {getattr(self, name)!r}.", field=name, hint="At least 0.")
        if not callable(self.learning_rate):
            AdamParams(learning_rate=self.learning_rate)
        if self.zero_variance not in ("keep", "drop", "resample"):
            raise ConfigError(
                f"is {self.zero_variance!r}.", field="zero_variance", hint="keep, drop or resample."
            )
        advantage_fn(self.advantage)
        named_correction(self.loss, max_staleness=self.max_staleness)

    @property
    def loss(self) -> Objective:
        return as_objective(self.objective)

    def adam_params(self, step: int) -> AdamParams:
        """Those of a step, from 0."""
        rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        return self.adam.model_copy(update={"learning_rate": float(rate)})

    def as_config(self) -> dict[str, Any]:
        """For `config.json`: a function by its name, a schedule by its first two rates as well."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["objective"] = {f.name: getattr(self.loss, f.name) for f in fields(Objective)}
        if callable(self.learning_rate):
            values["learning_rate"] = config_of_schedule(self.learning_rate)
        if callable(self.advantage):
            values["advantage"] = name_of(self.advantage)
        return values


def config_of_schedule(schedule: Schedule) -> list[str | float]:
    """`["cosine", 0.001, 0.0009]`: its name, which may be that of another lambda, and two rates."""
    return [name_of(schedule), schedule(0), schedule(1)]
