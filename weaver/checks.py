"""What is checked before it is queued: a batch, its loss and options, its tokens, any argument.

Clients and the service check batches with the same arguments and get the same errors. What a loss
takes is said in its class, in `weaver.losses`. The forms in which the clients take a prompt, a path
and a parameter object are brought into the protocol's here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from weaver import errors
from weaver.fields import MOST_ALTERNATIVES
from weaver.heads import check_head, check_pairs
from weaver.losses import LOSSES, REDUCTIONS, Loss, Option
from weaver.tensors import TensorData
from weaver.types import (
    CheckpointInfo,
    Datum,
    Head,
    Message,
    ModelInfo,
    ModelInput,
    Value,
    check_text,
)

V = TypeVar("V", bound=Value)

LossConfig = Mapping[str, float | str]
Prompt = ModelInput | str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]
"""Tokens, text, or a chat such as `[{"role": "user", "content": "Hello"}]`."""
Prompts = list[ModelInput] | list[str] | list[list[int]] | list[list[Message]]
CheckpointPath = str | os.PathLike[str] | CheckpointInfo
"""A weaver:// path, a folder, or what `save_state` returned."""

# --- a batch -----------------------------------------------------------------------------------


def check_loss(loss_fn: str, config: LossConfig | None) -> dict[str, float | str]:
    """The options of a loss with their defaults filled in; an option that is off is left out.

    Raises:
        UnknownLossError: no loss has that name.
        InvalidLossConfigError: an unknown option, or a value out of its bounds.
    """
    if not isinstance(loss_fn, str) or loss_fn not in LOSSES:
        raise errors.UnknownLossError(
            f"no loss is called {loss_fn!r}.",
            field="loss_fn",
            hint=errors.nearest(str(loss_fn), LOSSES),
        )
    if config is not None and not isinstance(config, Mapping):
        raise errors.InvalidLossConfigError(
            f"is {config!r}.", field="loss_fn_config", hint='Pass a mapping, {"temperature": 1.0}.'
        )
    options = LOSSES[loss_fn].options()
    given = {name: value for name, value in (config or {}).items() if value is not None}
    reduction = given.pop("reduction", None)
    if reduction not in (None, *REDUCTIONS):
        raise errors.InvalidLossConfigError(
            f"is {reduction!r}.", field="loss_fn_config.reduction", hint=f"Use {REDUCTIONS}."
        )
    if unknown := [name for name in given if name not in options]:
        raise errors.InvalidLossConfigError(
            f"{loss_fn} has no option {unknown[0]!r}.",
            field="loss_fn_config",
            hint=errors.nearest(str(unknown[0]), [*options, "reduction"]),
        )
    filled: dict[str, float | str] = {"reduction": reduction or "mean"}
    filled |= {name: o.default for name, o in options.items() if o.default is not None}
    filled |= {name: _number(name, value, options[name]) for name, value in given.items()}
    make_loss(loss_fn, filled)
    if "denominator" in filled and reduction is not None:
        raise errors.InvalidLossConfigError(
            "reduction and denominator exclude each other.",
            field="loss_fn_config",
            hint="Give the denominator alone.",
        )
    return filled


def make_loss(loss_fn: str, config: LossConfig) -> Loss:
    """The loss with the options that `check_loss` filled in."""
    return LOSSES[loss_fn](**config)  # type: ignore[arg-type]


def check_datums(
    datums: Sequence[Datum],
    loss_fn: str,
    *,
    config: LossConfig | None = None,
    model: ModelInfo | None = None,
    head: Head | None = None,
) -> dict[str, float | str]:
    """Checks a batch before it is queued; answers the filled-in loss options.

    Raises:
        InvalidDatumError: empty data, a missing or unknown input, lengths that differ, NaN, a pair
            without a side or of equal sides.
        TokenOutOfRangeError, ContextLengthError: against the model's numbers, where given.
        UnknownLossError, InvalidLossConfigError: see `check_loss`.
        UnsupportedError: the loss is not one of this head's.
    """
    filled = check_loss(loss_fn, config)
    check_head(loss_fn, filled, head)
    if isinstance(datums, Datum) or not isinstance(datums, Sequence):
        raise errors.InvalidDatumError(
            f"is a {type(datums).__name__}.", field="datums", hint="Pass a list of Datum."
        )
    if not datums:
        raise errors.InvalidDatumError("is empty.", field="datums", hint="Pass at least one Datum.")
    loss = LOSSES[loss_fn]
    for i, datum in enumerate(datums):
        if not isinstance(datum, Datum):
            raise errors.InvalidDatumError(
                f"is a {type(datum).__name__}.", field=f"datums[{i}]", hint="Pass types.Datum."
            )
        _check_datum(datum, f"datums[{i}].loss_fn_inputs", loss, head)
        check_tokens(datum.model_input.to_ints(), model, field=f"datums[{i}].model_input")
        if head is None:
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
            field = f"datums[{i}].loss_fn_inputs['target_tokens']"
            _check_range(int(targets.min()), int(targets.max()), model, field=field)
    if loss.paired:
        check_pairs(datums)
    if loss.averaged and filled["reduction"] == "mean" and "denominator" not in filled:
        total = sum(float(weights_of(datum, loss).sum()) for datum in datums)
        if total < 0:
            raise errors.InvalidDatumError(
                f"the weights sum to {total:g}, so their mean has no meaning.",
                field="loss_fn_inputs['weights']",
                hint='Use loss_fn_config={"reduction": "sum"}.',
            )
    return filled


def weights_of(datum: Datum, loss: type[Loss] | Loss = Loss) -> npt.NDArray[np.float32]:
    """The weights of a datum, float32, in the shape of its targets; 1 where it has none.

    Without targets, as for a scalar head, [1].
    """
    for name in loss.weights:
        if name in datum.loss_fn_inputs:
            return datum.loss_fn_inputs[name].to_numpy()
    targets = datum.loss_fn_inputs.get("target_tokens")
    return np.ones(1 if targets is None else targets.shape, dtype=np.float32)


def check_tokens(
    tokens: Sequence[int], model: ModelInfo | None, *, field: str, max_new_tokens: int = 0
) -> None:
    """Raises if a token is not in the model's vocabulary or there are more than fit its context."""
    if len(tokens) == 0:
        raise errors.InvalidDatumError("is empty.", field=field, hint="Pass at least one token.")
    _check_range(min(tokens), max(tokens), model, field=field)
    if model is not None:
        check_length(len(tokens), model.context_length, field=field, max_new_tokens=max_new_tokens)


def _check_range(low: int, high: int, model: ModelInfo | None, *, field: str) -> None:
    if low < 0 or (model is not None and high >= model.vocab_size):
        bad = low if low < 0 else high
        raise errors.TokenOutOfRangeError(
            f"has the token {bad}.",
            field=field,
            hint=f"Tokens of this model are 0 to {model.vocab_size - 1}."
            if model
            else "Token ids start at 0.",
        )


def check_length(length: int, context: int, *, field: str, max_new_tokens: int = 0) -> None:
    """Raises if there are more tokens than fit a model's context."""
    if length + max_new_tokens > context:
        plus = f" plus max_tokens {max_new_tokens}" if max_new_tokens else ""
        raise errors.ContextLengthError(
            f"has {length} tokens{plus}, the model's context is {context}.",
            field=field,
            hint="Shorten it.",
        )


def _check_datum(datum: Datum, field: str, loss: type[Loss], head: Head | None) -> None:
    inputs = datum.loss_fn_inputs
    needed = loss.inputs if head else ("target_tokens", *loss.inputs)
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise errors.InvalidDatumError(
            f"{loss.name} needs {missing[0]!r}.", field=field, hint=f"It takes {', '.join(needed)}."
        )
    length = datum.model_input.length
    known = dict.fromkeys((*needed, *loss.optional, *loss.weights))
    allowed: tuple[int, ...] = (1 if head else length,)
    hint = "Give one value per token of model_input"
    if head:
        hint = "Give one value of the whole sequence: [1]"
    elif loss.several:
        shape = inputs["target_tokens"].shape
        if len(shape) == 2 and 1 <= shape[1] <= MOST_ALTERNATIVES and shape[0] == length:
            allowed = shape
        hint += f", or {loss.name} [T, K] with K up to {MOST_ALTERNATIVES} in all inputs"
    for name, data in inputs.items():
        if name not in known:
            raise errors.InvalidDatumError(
                f"{loss.name} takes no input {name!r}.",
                field=field,
                hint=errors.nearest(name, known),
            )
        if data.shape != allowed:
            raise errors.InvalidDatumError(
                f"has shape {list(data.shape)}, model_input has {length} tokens.",
                field=f"{field}[{name!r}]",
                hint=f"{hint}.",
            )
        array = data.to_numpy()
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = int(np.flatnonzero(~np.isfinite(array))[0])
            raise errors.InvalidDatumError(
                f"is {array[at]} at position {at}.",
                field=f"{field}[{name!r}]",
                hint="Values must be finite.",
            )
    if len(given := [name for name in loss.weights if name in inputs]) > 1:
        raise errors.InvalidDatumError(
            f"{' and '.join(given)} are two names of one input.",
            field=field,
            hint="Give one of them.",
        )


def _number(name: str, value: object, option: Option) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise errors.InvalidLossConfigError(
            f"is {value!r}.", field=f"loss_fn_config.{name}", hint="Pass a finite number."
        )
    if wrong := option.wrong(value):
        raise errors.InvalidLossConfigError(
            f"is {value!r}.", field=f"loss_fn_config.{name}", hint=f"Must be {wrong}."
        )
    return float(value)


# --- an argument -------------------------------------------------------------------------------


def as_value(cls: type[V], given: V | Mapping[str, object], *, field: str) -> V:
    """A parameter object from itself or from a mapping of its fields.

    Raises:
        InvalidParamsError: of another type, an unknown field (with the nearest), a bad value.
    """
    if isinstance(given, cls):
        return given
    if isinstance(given, Value) or not isinstance(given, Mapping):
        raise errors.InvalidParamsError(
            f"is a {type(given).__name__}.",
            field=field,
            hint=f"Pass types.{cls.__name__}(...) or a dict of its fields.",
        )
    return cls(**{str(name): value for name, value in given.items()})


def check_whole(value: object, *, field: str, most: int, hint: str) -> None:
    """Raises InvalidParamsError unless it is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise errors.InvalidParamsError(f"is {value!r}.", field=field, hint=hint)


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None:
        hint = "Give whole seconds, 1 to 2**31, or None to keep it."
        check_whole(ttl_seconds, field="ttl_seconds", most=2**31, hint=hint)


def check_num_samples(count: int) -> None:
    check_whole(count, field="num_samples", most=4096, hint="Give 1 to 4096.")


def check_top(count: int, model: ModelInfo, *, field: str) -> None:
    """Raises InvalidParamsError: so many of the likeliest tokens are not told of one place."""
    most = min(MOST_ALTERNATIVES, model.vocab_size)
    if count:
        check_whole(count, field=field, most=most, hint=f"Give 1 to {most}, or 0 for none.")


def check_targets(targets: TensorData, length: int, model: ModelInfo) -> None:
    """Raises InvalidDatumError, TokenOutOfRangeError: they cannot be scored in a prompt so long."""
    shape, field = targets.shape, "targets"
    if (
        shape[:1] != (length,)
        or len(shape) > 2
        or not 1 <= math.prod(shape[1:]) <= MOST_ALTERNATIVES
    ):
        raise errors.InvalidDatumError(
            f"has shape {list(shape)}, the prompt has {length} tokens.",
            field=field,
            hint=f"Give [T] or [T, K], a row for each of its tokens, K up to {MOST_ALTERNATIVES}.",
        )
    array = targets.to_numpy()
    low = int(array.min())
    _check_range(low if low < -1 else 0, int(array.max()), model, field=field)


def as_path(given: object, *, field: str = "path") -> str:
    """The path of a checkpoint: a string, a pathlib path or a `CheckpointInfo`."""
    if isinstance(given, CheckpointInfo):
        return given.path
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str) or not path.strip():
        raise errors.InvalidNameError(
            f"is {given!r}.",
            field=field,
            hint="Pass a weaver:// path, a folder, or what save_state returned.",
        )
    return path


def is_batch(prompt: object) -> bool:
    """Whether a prompt argument is a list of prompts rather than one."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    first = prompt[0]
    return isinstance(first, (str, ModelInput, list, tuple)) or getattr(first, "ndim", 0) == 1


def as_prompt(
    prompt: object, model: ModelInfo, *, max_tokens: int = 0, field: str = "prompt"
) -> ModelInput | str | tuple[Message, ...]:
    """One prompt in the protocol's form; tokens are checked against the model.

    Raises:
        InvalidDatumError: empty, or not a prompt.
        InvalidRequestError: not text that can be encoded.
        TokenOutOfRangeError, ContextLengthError: tokens that the model cannot take.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise errors.InvalidDatumError("is empty.", field=field, hint="Pass some text.")
        check_text(prompt, field=field)
        return prompt
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        for i, message in enumerate(prompt):
            for name, text in message.items() if isinstance(message, Mapping) else ():
                if isinstance(text, str):
                    check_text(text, field=f"{field}[{i}].{name}")
        return tuple(
            as_value(Message, message, field=f"{field}[{i}]") for i, message in enumerate(prompt)
        )
    if isinstance(prompt, ModelInput):
        tokens = prompt
    elif isinstance(prompt, (list, tuple, range)) or hasattr(prompt, "shape"):
        tokens = ModelInput.from_ints(cast("Sequence[int]", prompt))
    else:
        raise errors.InvalidDatumError(
            f"is a {type(prompt).__name__}.",
            field=field,
            hint="Pass a ModelInput, text, token ids or a list of chat messages.",
        )
    check_tokens(tokens.to_ints(), model, field=field, max_new_tokens=max_tokens)
    return tokens


def check_model_name(base_model: object) -> None:
    if not isinstance(base_model, str) or not base_model.strip():
        raise errors.InvalidRequestError(
            f"is {base_model!r}.",
            field="base_model",
            hint='Pass a name such as "weaver-nano", a Hugging Face id or a folder.',
        )
