"""Training operations of the Weaver REST interface: passes, optimizer steps, saving and loading."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import AliasPath, Field

from weaver.errors import UnsupportedError
from weaver.protocol import ForwardBackward, LoadCheckpoint, OptimStep, SaveCheckpoint
from weaver.server.compat.weaver_rest_answers import Note
from weaver.server.compat.weaver_rest_ids import find_checkpoint
from weaver.server.compat.weaver_rest_operations import Desk, Desked, answered
from weaver.server.compat.weaver_rest_tensors import Body, TtlSeconds
from weaver.types import AdamParams, Datum, ModelInput
from weaver.wire import beside

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.protocol import Operation

B = TypeVar("B", bound=Body)

SAMPLER_TTL_S = 3600
"""Of an exported sampler whose request names none, as the client's own default."""
LOSSES = {"forward_logprob": "cross_entropy", "ppo_clip": "ppo"}
OPTIONS = {"entropy_coeff": "entropy_coef"}
IGNORED_OPTIONS = ("enable_debug_dump",)
INPUTS_KEPT = {
    "forward_logprob": ("target_tokens",),
    "surrogate": ("target_tokens", "surrogate_weights"),
}
"""Clients send these losses the inputs of another one along."""

router = APIRouter()


class RestDatum(Body):
    kind: str = "datum"
    datum_id: str | None = None
    model_input: ModelInput = ModelInput()
    loss_fn_inputs: Mapping[str, Any] = Field(default_factory=dict)

    def to_native(self, loss_fn: str) -> Datum:
        inputs = {
            name: value.get("data") if isinstance(value, Mapping) else value
            for name, value in self.loss_fn_inputs.items()
            if name in INPUTS_KEPT.get(loss_fn, (name,))
        }
        if loss_fn == "forward_logprob":
            inputs.setdefault("target_tokens", self.model_input.to_ints())
        return Datum(model_input=self.model_input, loss_fn_inputs=inputs)


class PassInput(Body):
    loss_fn: str
    data: tuple[RestDatum, ...]
    loss_fn_config: Mapping[str, Any] = Field(default_factory=dict)


class ForwardBody(Body):
    given: PassInput = Field(validation_alias=AliasPath("payload", "forward_input"))


class BackwardBody(Body):
    given: PassInput = Field(validation_alias=AliasPath("payload", "forward_backward_input"))


class StepBody(Body):
    adam_params: AdamParams = Field(validation_alias=AliasPath("payload", "adam_params"))


class ExportBody(Body):
    path: str | None = None
    ttl_seconds: TtlSeconds = SAMPLER_TTL_S


class SaveBody(Body):
    type: Literal["weight", "weight_and_optimizer", "sampling"] = "weight"
    name: str | None = None
    ttl_seconds: TtlSeconds = None


class LoadBody(Body):
    path: str
    include_optimizer: bool = False


def _pass(body: ForwardBody | BackwardBody) -> ForwardBackward:
    given = body.given
    if any(datum.kind == "sample_ref" for datum in given.data):
        raise UnsupportedError(
            "refers to a managed dataset, of which this server has none.",
            field="data",
            hint="Send the tokens.",
        )
    options = {
        OPTIONS.get(name, name): value
        for name, value in given.loss_fn_config.items()
        if name not in IGNORED_OPTIONS
    }
    ids = [datum.datum_id or "" for datum in given.data]
    return ForwardBackward(
        datums=tuple(datum.to_native(given.loss_fn) for datum in given.data),
        loss_fn=LOSSES.get(given.loss_fn, given.loss_fn),
        loss_fn_config=options,
        backward=isinstance(body, BackwardBody),
        labels=tuple(ids) if any(ids) else (),
    )


def _sampler(name: str | None, ttl_seconds: int | None) -> SaveCheckpoint:
    """Each export has a path of its own, so that none changes under those who sample from it."""
    unique = f"{name or 'sampler'}-{secrets.token_hex(4)}"
    return SaveCheckpoint(purpose="sampler", name=unique, ttl_seconds=ttl_seconds)


def _save(body: SaveBody) -> SaveCheckpoint:
    if body.type == "sampling":
        return _sampler(body.name, body.ttl_seconds)
    return SaveCheckpoint(
        purpose="state",
        name=body.name,
        include_optimizer=body.type == "weight_and_optimizer",
        ttl_seconds=body.ttl_seconds,
    )


VERBS: dict[str, tuple[type[Body], Callable[[Any], Operation]]] = {
    "forward-passes": (ForwardBody, _pass),
    "forward-backward-passes": (BackwardBody, _pass),
    "optimizer-steps": (StepBody, lambda body: OptimStep(params=body.adam_params)),
    "export-sampler": (ExportBody, lambda body: _sampler(body.path, body.ttl_seconds)),
    "checkpoints": (SaveBody, _save),
    "load": (LoadBody, lambda body: LoadCheckpoint(**body.model_dump())),
}
"""What is posted below /models/{model_id}, and the operation that is made of it."""


async def ordered(
    request: Request,
    desk: Desk,
    model_id: str,
    *,
    kind: type[B],
    make: Callable[[B], Operation],
    artifact: bool = False,
) -> Response:
    """Submits an operation of a run in the order in which its request began to arrive."""
    await desk.service.get_run(model_id)
    async with desk.turns[model_id]:
        body = await kind.read(request)
        operation = await beside(len(await request.body()), partial(make, body))
        if isinstance(operation, LoadCheckpoint):  # its path may be an id
            path = (await find_checkpoint(desk.service, operation.path)).path
            operation = operation.model_copy(update={"path": path})
        note = Note(artifact=artifact)
        entry = await desk.submit(request, operation, note, run_id=model_id)
    return await answered(desk, entry)


def _add(path: str, kind: type[Body], make: Callable[[Any], Operation]) -> None:
    async def submit(model_id: str, request: Request, desk: Desked) -> Response:
        return await ordered(request, desk, model_id, kind=kind, make=make)

    router.add_api_route(f"/models/{{model_id}}/{path}", submit, methods=["POST"])


for _path, (_kind, _make) in VERBS.items():
    _add(_path, _kind, _make)
