"""The kinds of fields that values have: bounded texts, lists of numbers, free-form data.

`weaver.types` and `weaver.protocol` are made of them. Whatever comes from outside has a bound here,
and is refused by the name of the field at fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationError
from pydantic_core import from_json

from weaver.errors import InvalidParamsError, InvalidRequestError
from weaver.tensors import Numbers, TensorData

T = TypeVar("T")

CALLS_SIZE = 2**20
"""Characters that the calls of a message may have, as JSON."""
MAX_BIASES = 1024
"""Tokens whose logits a request may shift."""
MAX_NAMES = 64
"""At most so many fields or options of one value; none has as many."""
MOST_ALTERNATIVES = 256
"""Tokens of which one place has log-probabilities, or which are its targets: what is computed,
kept and sent grows with them."""
ShortText = Annotated[str, Field(strict=True, max_length=256)]
"""Names and roles. `strict` is without bytes, which pydantic would read as text."""
StopText = Annotated[str, Field(strict=True, max_length=1024)]
StopTexts = Annotated[tuple[StopText, ...], Field(fail_fast=True)]
PathText = Annotated[str, Field(strict=True, max_length=4096)]
"""Paths of any kind, and what may be one: a base model, a sampler's id."""
LongText = Annotated[str, Field(strict=True, max_length=2**24)]
"""What a model reads; its context is a bound of its own."""


def _plain(value: object) -> object:
    """Free-form data as a message has it, with plain lists."""
    try:
        return _unpacked(value)
    except RecursionError:
        raise InvalidParamsError(
            "has no end.", field="user_metadata", hint="Use plain JSON values in metadata."
        ) from None


def _unpacked(value: object) -> object:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    return [_unpacked(item) for item in value] if isinstance(value, list) else listed(value)


def few(value: object) -> object:
    if isinstance(value, Mapping) and len(value) > MAX_NAMES:
        raise ValueError(f"{len(value)} names, the limit is {MAX_NAMES}")
    return value


def listed(value: object) -> object:
    return value.tolist() if isinstance(value, Numbers) else value


def _integer_array(value: object) -> TensorData:
    return TensorData(value, dtype="int64", field="tokens")


def _float_array(value: object) -> TensorData:
    return TensorData(value, dtype="float32", field="logprobs")


def _bounded(calls: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    try:
        size = len(json.dumps(calls)) if calls else 0
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"is no JSON: {error}.", field="tool_calls") from None
    if size > CALLS_SIZE:
        raise InvalidRequestError(
            f"has {size} characters as JSON, the limit is {CALLS_SIZE}.",
            field="tool_calls",
            hint="Leave older messages out.",
        )
    return calls


def _pairs(value: object) -> object:
    return tuple(value.items()) if isinstance(value, Mapping) else value


def _once(pairs: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a token has two")
    return pairs


Bias = tuple[
    Annotated[int, Field(ge=0, lt=2**31)],
    Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
]
Biases = Annotated[
    tuple[Bias, ...],
    Field(max_length=MAX_BIASES, fail_fast=True),
    BeforeValidator(_pairs),
    AfterValidator(_once),
]
"""Tokens and what is added to their logits; a mapping is taken, too."""
MAX_STRUCTURE = 2**16
"""Characters of a schema or a grammar."""


def _schema(value: object) -> object:
    """The JSON of a schema."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        fits = len(text) > MAX_STRUCTURE or isinstance(from_json(text, allow_inf_nan=False), dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {str(error)[:200]}") from None
    if not fits:
        raise ValueError("is no object")
    return text


def _encodable(text: str) -> str:
    text.encode()
    return text


SchemaText = Annotated[str, Field(max_length=MAX_STRUCTURE), BeforeValidator(_schema)]
GrammarText = Annotated[
    str, Field(strict=True, min_length=1, max_length=MAX_STRUCTURE), AfterValidator(_encodable)
]
Options = Annotated[Mapping[ShortText, float | ShortText], BeforeValidator(few)]
JsonDict = Annotated[dict[str, Any], BeforeValidator(_plain)]
Calls = Annotated[tuple[JsonDict, ...], Field(max_length=128), AfterValidator(_bounded)]
Integers = Annotated[tuple[int, ...], BeforeValidator(listed)]
Floats = Annotated[tuple[float, ...], BeforeValidator(listed)]
SomeFloats = Annotated[tuple[float | None, ...], BeforeValidator(listed)]
_listed = PlainSerializer(TensorData.tolist, when_used="json")
IntegerArray = Annotated[TensorData, BeforeValidator(_integer_array), _listed]
FloatArray = Annotated[TensorData, BeforeValidator(_float_array), _listed]
Alternatives = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES, strict=True)]
"""How many of the likeliest tokens are asked for; 0: none."""


def validate(message: object, read: Callable[[object], T], *, name: str = "message") -> T:
    """What pydantic's `read` makes of it; the first problem is raised as an `InvalidRequestError`.

    `name` is what the error calls the message as a whole.
    """
    try:
        return read(message)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)[0], name=name) from None


def refusal(problem: Mapping[str, Any], *, name: str = "message") -> InvalidRequestError:
    """One of the problems that pydantic found; it may have been an error of ours at first."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        return cause
    field = ".".join(str(part)[:80] for part in problem["loc"]) or name
    return InvalidRequestError(f"{problem['msg'][:500]}.", field=field)
