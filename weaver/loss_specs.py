"""What every loss needs and which options it has: the table behind client and service validation.

`weaver.engine.torch.losses` holds a function for each name. All inputs have shape [T].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from weaver.errors import (
    ContextLengthError,
    InvalidDatumError,
    InvalidLossConfigError,
    TokenOutOfRangeError,
    UnknownLossError,
    nearest,
)
from weaver.types import Datum, ModelInfo

LossConfig = Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class Option:
    """A number with its bounds; `minimum` is exclusive where `open_minimum`."""

    default: float | None
    minimum: float | None = None
    open_minimum: bool = False


POSITIVE = Option(None, 0.0, open_minimum=True)
COMMON = {"temperature": Option(1.0, 0.0, open_minimum=True), "denominator": POSITIVE}
TRUNCATION = {"ratio_cap": POSITIVE, "entropy_coef": Option(0.0), "kl_coef": Option(0.0)}
RATIO_INPUTS = ("target_tokens", "logprobs", "advantages")
REDUCTIONS = ("mean", "sum")
WEIGHT_NAMES = ("weights", "loss_mask")


def _clip(low: float, high: float) -> dict[str, Option]:
    return {"clip_low_threshold": Option(low, 0.0), "clip_high_threshold": Option(high, 0.0)}


@dataclass(frozen=True, slots=True)
class LossSpec:
    required: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    weighted: bool = True
    """Takes `weights` (or `loss_mask`); 1 where absent."""


LOSS_SPECS: Mapping[str, LossSpec] = {
    "cross_entropy": LossSpec(("target_tokens",)),
    "importance_sampling": LossSpec(RATIO_INPUTS, TRUNCATION),
    "ppo": LossSpec(
        RATIO_INPUTS, {**_clip(0.8, 1.2), **TRUNCATION, "dual_clip": Option(None, 1.0, True)}
    ),
    "cispo": LossSpec(RATIO_INPUTS, _clip(0.0, 4.0)),
    "gspo": LossSpec(RATIO_INPUTS, _clip(1 - 3e-4, 1 + 4e-4)),
    "dro": LossSpec(RATIO_INPUTS, {"beta": Option(0.05, 0.0)}),
    "surrogate": LossSpec(("target_tokens", "surrogate_weights"), weighted=False),
}


def check_loss(loss_fn: str, config: LossConfig | None) -> dict[str, float | str]:
    """The options of a loss with their defaults filled in; an option that is off is left out.

    Raises:
        UnknownLossError: no loss has that name.
        InvalidLossConfigError: an unknown option, or a value out of its bounds.
    """
    if not isinstance(loss_fn, str) or loss_fn not in LOSS_SPECS:
        raise UnknownLossError(
            f"no loss is called {loss_fn!r}.",
            field="loss_fn",
            hint=nearest(str(loss_fn), LOSS_SPECS),
        )
    if config is not None and not isinstance(config, Mapping):
        raise InvalidLossConfigError(
            f"is {config!r}.", field="loss_fn_config", hint='Pass a mapping, {"temperature": 1.0}.'
        )
    options = {**COMMON, **LOSS_SPECS[loss_fn].options}
    given = {name: value for name, value in (config or {}).items() if value is not None}
    reduction = given.pop("reduction", None)
    if reduction not in (None, *REDUCTIONS):
        raise InvalidLossConfigError(
            f"is {reduction!r}.", field="loss_fn_config.reduction", hint=f"Use {REDUCTIONS}."
        )
    if unknown := [name for name in given if name not in options]:
        raise InvalidLossConfigError(
            f"{loss_fn} has no option {unknown[0]!r}.",
            field="loss_fn_config",
            hint=nearest(str(unknown[0]), [*options, "reduction"]),
        )
    filled: dict[str, float | str] = {"reduction": reduction or "mean"}
    filled |= {name: o.default for name, o in options.items() if o.default is not None}
    filled |= {name: _number(name, value, options[name]) for name, value in given.items()}
    if float(filled.get("clip_low_threshold", 0)) > float(filled.get("clip_high_threshold", 0)):
        raise InvalidLossConfigError(
            "clip_low_threshold is above clip_high_threshold.",
            field="loss_fn_config",
            hint="Both are absolute ratios, such as 0.8 and 1.2.",
        )
    if "denominator" in filled and reduction is not None:
        raise InvalidLossConfigError(
            "reduction and denominator exclude each other.",
            field="loss_fn_config",
            hint="Give the denominator alone.",
        )
    return filled


def check_datums(
    datums: Sequence[Datum],
    loss_fn: str,
    *,
    config: LossConfig | None = None,
    model: ModelInfo | None = None,
) -> dict[str, float | str]:
    """Checks a batch before it is queued; answers the filled-in loss options.

    Raises:
        InvalidDatumError: empty data, a missing or unknown input, lengths that differ, NaN.
        TokenOutOfRangeError, ContextLengthError: against the model's numbers, where given.
        UnknownLossError, InvalidLossConfigError: see `check_loss`.
    """
    filled = check_loss(loss_fn, config)
    if isinstance(datums, Datum) or not isinstance(datums, Sequence):
        raise InvalidDatumError(
            f"is a {type(datums).__name__}.", field="datums", hint="Pass a list of Datum."
        )
    if not datums:
        raise InvalidDatumError("is empty.", field="datums", hint="Pass at least one Datum.")
    spec = LOSS_SPECS[loss_fn]
    for i, datum in enumerate(datums):
        if not isinstance(datum, Datum):
            raise InvalidDatumError(
                f"is a {type(datum).__name__}.", field=f"datums[{i}]", hint="Pass types.Datum."
            )
        _check_datum(datum, f"datums[{i}]", loss_fn, spec)
        check_tokens(datum.model_input.to_ints(), model, field=f"datums[{i}].model_input")
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        check_tokens(targets, model, field=f"datums[{i}].loss_fn_inputs['target_tokens']")
    if spec.weighted and filled["reduction"] == "mean" and "denominator" not in filled:
        total = sum(float(weights_of(datum).sum()) for datum in datums)
        if total < 0:
            raise InvalidDatumError(
                f"the weights sum to {total:g}, so their mean has no meaning.",
                field="loss_fn_inputs['weights']",
                hint='Use loss_fn_config={"reduction": "sum"}.',
            )
    return filled


def weights_of(datum: Datum) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The weights of a datum, float32 [T]; 1 where it has none."""
    for name in WEIGHT_NAMES:
        if name in datum.loss_fn_inputs:
            return datum.loss_fn_inputs[name].to_numpy()
    return np.ones(datum.model_input.length, dtype=np.float32)


def check_tokens(
    tokens: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]],
    model: ModelInfo | None,
    *,
    field: str,
    max_new_tokens: int = 0,
) -> None:
    """Raises if a token is not in the model's vocabulary or there are more than fit its context."""
    if len(tokens) == 0:
        raise InvalidDatumError("is empty.", field=field, hint="Pass at least one token.")
    low, high = int(min(tokens)), int(max(tokens))
    if low < 0 or (model is not None and high >= model.vocab_size):
        bad = low if low < 0 else high
        raise TokenOutOfRangeError(
            f"has the token {bad}.",
            field=field,
            hint=f"Tokens of this model are 0 to {model.vocab_size - 1}."
            if model
            else "Token ids start at 0.",
        )
    if model is not None:
        check_length(len(tokens), model.context_length, field=field, max_new_tokens=max_new_tokens)


def check_length(length: int, context: int, *, field: str, max_new_tokens: int = 0) -> None:
    """Raises if there are more tokens than fit a model's context."""
    if length + max_new_tokens > context:
        plus = f" plus max_tokens {max_new_tokens}" if max_new_tokens else ""
        raise ContextLengthError(
            f"has {length} tokens{plus}, the model's context is {context}.",
            field=field,
            hint="Shorten it.",
        )


def _check_datum(datum: Datum, where: str, loss_fn: str, spec: LossSpec) -> None:
    inputs = datum.loss_fn_inputs
    missing = [name for name in spec.required if name not in inputs]
    if missing:
        raise InvalidDatumError(
            f"{loss_fn} needs {missing[0]!r}.",
            field=f"{where}.loss_fn_inputs",
            hint=f"It takes {', '.join(spec.required)}.",
        )
    known = (*spec.required, *(WEIGHT_NAMES if spec.weighted else ()))
    for name, data in inputs.items():
        if name not in known:
            raise InvalidDatumError(
                f"{loss_fn} takes no input {name!r}.",
                field=f"{where}.loss_fn_inputs",
                hint=nearest(name, known),
            )
        if data.shape != (datum.model_input.length,):
            raise InvalidDatumError(
                f"has shape {list(data.shape)}, model_input has {datum.model_input.length} tokens.",
                field=f"{where}.loss_fn_inputs[{name!r}]",
                hint="Give one value per token of model_input.",
            )
        array = data.to_numpy()
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = int(np.flatnonzero(~np.isfinite(array))[0])
            raise InvalidDatumError(
                f"is {array[at]} at position {at}.",
                field=f"{where}.loss_fn_inputs[{name!r}]",
                hint="Values must be finite.",
            )
    if all(name in inputs for name in WEIGHT_NAMES):
        raise InvalidDatumError(
            "weights and loss_mask are two names of one input.",
            field=f"{where}.loss_fn_inputs",
            hint="Give one of them.",
        )


def _number(name: str, value: object, option: Option) -> float:
    low = option.minimum
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise InvalidLossConfigError(
            f"is {value!r}.", field=f"loss_fn_config.{name}", hint="Pass a finite number."
        )
    if low is not None and (value < low or (option.open_minimum and value == low)):
        raise InvalidLossConfigError(
            f"is {value!r}.",
            field=f"loss_fn_config.{name}",
            hint=f"Must be {'above' if option.open_minimum else 'at least'} {low:g}.",
        )
    return float(value)
