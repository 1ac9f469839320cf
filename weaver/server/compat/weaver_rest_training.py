"""Training operations of the Weaver REST interface: passes, optimizer steps, saving and loading."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from pydantic import Field

from weaver.errors import UnsupportedError
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    ForwardBackward,
    GradientsDone,
    LoadCheckpoint,
    OptimStep,
    SaveCheckpoint,
    StepDone,
)
from weaver.server.compat.weaver_rest_ids import checkpoint_json, find_checkpoint, session_of
from weaver.server.compat.weaver_rest_operations import Desk, Desked, answered, resend_key
from weaver.server.compat.weaver_rest_tensors import LARGE_BYTES, Body, Prompt, read_body
from weaver.types import AdamParams, Datum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver.protocol import Operation
    from weaver.types import JsonDict

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
    model_input: Prompt = Prompt(chunks=())
    loss_fn_inputs: Mapping[str, Any] = Field(default_factory=dict)


class PassInput(Body):
    loss_fn: str
    data: tuple[RestDatum, ...]
    loss_fn_config: Mapping[str, Any] = Field(default_factory=dict)


class Forward(Body):
    forward_input: PassInput


class ForwardBody(Body):
    payload: Forward


class Backward(Body):
    forward_backward_input: PassInput


class BackwardBody(Body):
    payload: Backward


class Step(Body):
    adam_params: AdamParams


class StepBody(Body):
    payload: Step


class ExportBody(Body):
    path: str | None = None
    ttl_seconds: int | None = Field(default=SAMPLER_TTL_S, ge=1)


class SaveBody(Body):
    type: Literal["weight", "weight_and_optimizer", "sampling"] = "weight"
    name: str | None = None
    ttl_seconds: int | None = Field(default=None, ge=1)


class LoadBody(Body):
    path: str
    include_optimizer: bool = False


@router.post("/models/{model_id}/forward-passes")
async def forward(model_id: str, request: Request, desk: Desked) -> Response:
    return await _ordered(
        request,
        desk,
        model_id,
        kind=ForwardBody,
        make=lambda body: _pass(body.payload.forward_input, backward=False),
    )


@router.post("/models/{model_id}/forward-backward-passes")
async def forward_backward(model_id: str, request: Request, desk: Desked) -> Response:
    return await _ordered(
        request,
        desk,
        model_id,
        kind=BackwardBody,
        make=lambda body: _pass(body.payload.forward_backward_input, backward=True),
    )


@router.post("/models/{model_id}/optimizer-steps")
async def optim_step(model_id: str, request: Request, desk: Desked) -> Response:
    return await _ordered(
        request,
        desk,
        model_id,
        kind=StepBody,
        make=lambda body: (OptimStep(params=body.payload.adam_params), _step_json),
    )


@router.post("/models/{model_id}/export-sampler")
async def export_sampler(model_id: str, request: Request, desk: Desked) -> Response:
    return await _ordered(
        request,
        desk,
        model_id,
        kind=ExportBody,
        make=lambda body: (_sampler(body.path, body.ttl_seconds), _export_json),
    )


@router.post("/models/{model_id}/checkpoints")
async def save_checkpoint(model_id: str, request: Request, desk: Desked) -> Response:
    return await _ordered(
        request,
        desk,
        model_id,
        kind=SaveBody,
        make=lambda body: (_save(body), _saved_json),
        numbered=False,
    )


@router.post("/models/{model_id}/load")
async def load(model_id: str, request: Request, desk: Desked) -> Response:
    body, _ = await read_body(request, LoadBody)
    path = (await find_checkpoint(desk.service, body.path)).path
    operation = LoadCheckpoint(path=path, include_optimizer=body.include_optimizer)
    return await _ordered(
        request,
        desk,
        model_id,
        kind=LoadBody,
        make=lambda body: (operation, _loaded_json),
        numbered=False,
    )


async def _ordered(
    request: Request,
    desk: Desk,
    model_id: str,
    *,
    kind: type[Any],
    make: Callable[[Any], tuple[Operation, Callable[[Any], JsonDict]]],
    numbered: bool = True,
) -> Response:
    """Submits an operation of a run in the order in which its request began to arrive."""
    await desk.service.get_run(model_id)
    async with desk.turn(model_id):
        body, data = await read_body(request, kind)
        if len(data) <= LARGE_BYTES:
            operation, answer = make(body)
        else:
            operation, answer = await to_thread.run_sync(make, body)
        key = resend_key(request, data, numbered=numbered)
        entry = await desk.submit(operation, answer, key=key, run_id=model_id)
    return await answered(desk, entry)


def _pass(given: PassInput, *, backward: bool) -> tuple[ForwardBackward, Callable[..., JsonDict]]:
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
    operation = ForwardBackward(
        datums=tuple(_datum(datum, given.loss_fn) for datum in given.data),
        loss_fn=LOSSES.get(given.loss_fn, given.loss_fn),
        loss_fn_config=options,
        backward=backward,
    )
    return operation, partial(_pass_json, [datum.datum_id for datum in given.data])


def _datum(given: RestDatum, loss_fn: str) -> Datum:
    model_input = given.model_input.to_model_input()
    inputs = {
        name: value.get("data") if isinstance(value, Mapping) else value
        for name, value in given.loss_fn_inputs.items()
        if name in INPUTS_KEPT.get(loss_fn, (name,))
    }
    if loss_fn == "forward_logprob":
        inputs.setdefault("target_tokens", model_input.to_ints())
    return Datum(model_input=model_input, loss_fn_inputs=inputs)


def _pass_json(datum_ids: Sequence[str | None], result: GradientsDone) -> JsonDict:
    outputs = [
        {name: values.tolist() for name, values in output.items()}
        | ({} if datum_id is None else {"datum_id": datum_id})
        for datum_id, output in zip(datum_ids, result.output.loss_fn_outputs, strict=True)
    ]
    metrics = dict(result.output.metrics)
    return {"result": {"loss_fn_outputs": outputs, "metrics": metrics}, "metrics": metrics}


def _step_json(result: StepDone) -> JsonDict:
    metrics = dict(result.output.metrics)
    return {"metrics": metrics, "result": {"metrics": metrics}}


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


def _export_json(result: CheckpointSaved) -> JsonDict:
    path = result.checkpoint.path
    return {"model_path": path, "path": path, "sampling_session_id": session_of(path)}


def _saved_json(result: CheckpointSaved) -> JsonDict:
    return checkpoint_json(result.checkpoint)


def _loaded_json(result: CheckpointLoaded) -> JsonDict:
    return {"checkpoint": checkpoint_json(result.checkpoint), "status": "succeeded"}
