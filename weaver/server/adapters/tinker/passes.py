"""How a training pass of Tinker's protocol is read, and the operation that is made of it.

It is a protobuf message, or JSON from clients before 0.25. A message is counted before it is
parsed, so that none becomes many times its size in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from pydantic import AliasChoices, Field

from weaver import errors, protocol, types
from weaver.server.adapters.tinker import messages
from weaver.server.adapters.tinker.bodies import InTurn, Prompt, no_images
from weaver.server.adapters.tinker.tensors import JsonTensor, Tensors, numbers
from weaver.server.http.body import Body, json_of

if TYPE_CHECKING:
    from fastapi import Request

    from weaver.server.http.gateway import Gateway

MOST_FIELDS = 100_000
"""Messages within a protobuf message; a client sends 1,024 datums of some ten at once."""
OPTIONS = {
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "stable_reinforce": {"ratio_cap": 1.0},
}
"""Where this protocol's defaults are others than ours."""
LOSSES = {"stable_reinforce": "importance_sampling"}
RENAMED = {"kl_coeff": "kl_coef"}
WEIGHTS = {"gspo": {"sequence_ratio_mask": "weights"}}
"""An input that says which tokens count, by the loss."""


class Pass(NamedTuple):
    """A training pass, from either form of its request."""

    model_id: str
    seq_id: int
    loss_fn: str
    """By the name that the client has given."""
    operation: protocol.ForwardBackward


class JsonDatum(Body):
    model_input: Prompt
    loss_fn_inputs: Mapping[str, JsonTensor]


class JsonInput(Body):
    data: tuple[JsonDatum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] | None = None


class PassBody(InTurn):
    given: JsonInput = Field(
        validation_alias=AliasChoices("forward_backward_input", "forward_input")
    )


async def read_pass(request: Request, *, forward_only: bool) -> Pass:
    """Raises InvalidRequestError, UnsupportedError, TooLargeError: with the field at fault."""
    gateway: Gateway = request.state.gateway
    data = await request.body()
    media_type = request.headers.get("Content-Type", "")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise errors.UnsupportedError(
            "is compressed.", field="Content-Encoding", hint="Leave proto_compress_fwdbwd off."
        )
    work: Any = partial(_json_pass, data, forward_only)
    if media_type.startswith(messages.MEDIA_TYPE):
        work = partial(_proto_pass, data)
    async with gateway.read(4 * len(data), work) as given:
        assert isinstance(given, Pass)
        return given


def _json_pass(data: bytes, forward_only: bool) -> Pass:
    body, tensors = PassBody.of(json_of(data)), Tensors()
    datums = [
        (
            datum.model_input.to_ints(),
            {
                name: tensors.of_json(
                    tensor,
                    dtype="int64" if name == "target_tokens" else "float32",
                    field=_field(name),
                )
                for name, tensor in datum.loss_fn_inputs.items()
            },
        )
        for datum in body.given.data
    ]
    return _pass(
        body.model_id,
        body.seq_id,
        body.given.loss_fn,
        body.given.loss_fn_config or {},
        datums,
        forward_only=forward_only,
    )


def _proto_pass(data: bytes) -> Pass:
    _check_count(data)
    try:
        given = messages.ForwardBackwardRequest.FromString(data)
    except DecodeError as error:
        raise errors.InvalidRequestError(
            f"is no ForwardBackwardRequest: {str(error)[:200]}.", field="body"
        ) from None
    options: dict[str, float | str] = dict(given.loss_fn_config)
    for name, value in given.loss_fn_config_v2.items():
        options[name] = value.text if value.WhichOneof("value") == "text" else value.number
    tensors = Tensors()
    datums = [
        (
            np.concatenate([_tokens(chunk) for chunk in datum.model_input] or [np.zeros(0, "<i4")]),
            {
                name: tensors.of_message(tensor, field=_field(name))
                for name, tensor in datum.loss_fn_inputs.items()
            },
        )
        for datum in given.data
    ]
    return _pass(
        given.model_id,
        given.seq_id,
        given.loss_fn,
        options,
        datums,
        forward_only=given.forward_only,
    )


def _check_count(data: bytes) -> None:
    """Looks at the datums and their parts, before the library makes objects of them.

    Raises:
        TooLargeError, InvalidRequestError
    """
    count, spans = 0, [(0, len(data), True)]
    while spans:
        at, end, outermost = spans.pop()
        while at < end:
            tag, at = _varint(data, at, end)
            count += 1
            if count > MOST_FIELDS:
                raise errors.TooLargeError(
                    f"has more than {MOST_FIELDS} fields.", field="body", hint="Send fewer datums."
                )
            kind = tag & 7
            if kind == 0:
                _, at = _varint(data, at, end)
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            elif kind == 2:
                size, at = _varint(data, at, end)
                if outermost and tag >> 3 == 3:
                    spans.append((at, min(at + size, end), False))
                at += size
            else:
                raise errors.InvalidRequestError("is no protobuf message.", field="body")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise errors.InvalidRequestError("is no protobuf message.", field="body")


def _tokens(chunk: Any) -> Any:
    if chunk.WhichOneof("chunk") != "text":
        raise no_images()
    return numbers(chunk.text.tokens, "<i4", field="model_input")


def _field(name: str) -> str:
    return f"loss_fn_inputs[{name[:80]!r}]"


def _pass(
    model_id: str,
    seq_id: int,
    loss_fn: str,
    options: Mapping[str, float | str],
    datums: Sequence[tuple[Any, Mapping[str, Any]]],
    *,
    forward_only: bool,
) -> Pass:
    renamed = WEIGHTS.get(loss_fn, {})
    given = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={renamed.get(name, name): value for name, value in inputs.items()},
        )
        for tokens, inputs in datums
    ]
    config = {
        **OPTIONS.get(loss_fn, {}),
        **{RENAMED.get(name, name): value for name, value in options.items()},
    }
    operation = protocol.ForwardBackward(
        datums=tuple(given),
        loss_fn=LOSSES.get(loss_fn, loss_fn),
        loss_fn_config={**config, "reduction": "sum"},
        backward=not forward_only,
    )
    return Pass(model_id, seq_id, loss_fn, operation)
