"""The clients' checks of arguments, before anything is queued; each raises by field name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from weaver.checks import check_tokens
from weaver.errors import InvalidDatumError, InvalidNameError, InvalidParamsError
from weaver.types import CheckpointInfo, Message, ModelInput, Value, check_text

if TYPE_CHECKING:
    from weaver.types import ModelInfo

V = TypeVar("V", bound=Value)

Prompt = ModelInput | str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]
"""Tokens, text, or a chat such as `[{"role": "user", "content": "Hello"}]`."""
Prompts = list[ModelInput] | list[str] | list[list[int]] | list[list[Message]]
CheckpointPath = str | os.PathLike[str] | CheckpointInfo
"""A weaver:// path, a folder, or what `save_state` returned."""
PromptValue = ModelInput | str | tuple[Message, ...]


def as_value(cls: type[V], given: V | Mapping[str, object], *, field: str) -> V:
    """A parameter object from itself or from a mapping of its fields.

    Raises:
        InvalidParamsError: of another type, an unknown field (with the nearest), a bad value.
    """
    if isinstance(given, cls):
        return given
    if isinstance(given, Value) or not isinstance(given, Mapping):
        raise InvalidParamsError(
            f"is a {type(given).__name__}.",
            field=field,
            hint=f"Pass types.{cls.__name__}(...) or a dict of its fields.",
        )
    return cls(**{str(name): value for name, value in given.items()})


def check_whole(value: object, *, field: str, most: int, hint: str) -> None:
    """Raises InvalidParamsError unless it is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidParamsError(f"is {value!r}.", field=field, hint=hint)


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None:
        hint = "Give whole seconds, 1 to 2**31, or None to keep it."
        check_whole(ttl_seconds, field="ttl_seconds", most=2**31, hint=hint)


def check_num_samples(count: int) -> None:
    check_whole(count, field="num_samples", most=4096, hint="Give 1 to 4096.")


def as_path(given: object, *, field: str = "path") -> str:
    """The path of a checkpoint: a string, a pathlib path or a `CheckpointInfo`."""
    if isinstance(given, CheckpointInfo):
        return given.path
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str) or not path.strip():
        raise InvalidNameError(
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
) -> PromptValue:
    """One prompt in the protocol's form; tokens are checked against the model.

    Raises:
        InvalidDatumError: empty, or not a prompt.
        InvalidRequestError: not text that can be encoded.
        TokenOutOfRangeError, ContextLengthError: tokens that the model cannot take.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidDatumError("is empty.", field=field, hint="Pass some text.")
        check_text(prompt, field=field)
        return prompt
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], (Mapping, Message)):
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
        raise InvalidDatumError(
            f"is a {type(prompt).__name__}.",
            field=field,
            hint="Pass a ModelInput, text, token ids or a list of chat messages.",
        )
    check_tokens(tokens.to_ints(), model, field=field, max_new_tokens=max_tokens)
    return tokens
