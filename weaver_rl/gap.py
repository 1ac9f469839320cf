"""How far trainer and sampler may differ about the same weights; loops check it at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from weaver.errors import ConfigError, WeaverError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weaver.types import ModelInfo

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


def check_max_gap(value: MaxGap) -> None:
    """Raises ConfigError for what is no bound."""
    if value in ("auto", None) or (isinstance(value, int | float) and value >= 0):
        return
    raise ConfigError(
        f"is {value!r}.", field="max_logprob_gap", hint='"auto", nats from 0 up, or None for any.'
    )
