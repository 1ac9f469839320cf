"""Sampling sessions of the Weaver REST interface: weights to sample from, samples, logprobs.

A sampling session is a name for weights that never change: there is nothing to start or to free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from weaver.errors import InvalidRequestError, UnsupportedError
from weaver.protocol import OpenSampler, Sample
from weaver.server.compat.weaver_rest_answers import Note
from weaver.server.compat.weaver_rest_ids import find_checkpoint, sampler_of, session_of
from weaver.server.compat.weaver_rest_models import tokenizer_path
from weaver.server.compat.weaver_rest_operations import (
    POLL_S,
    Desked,
    JsonResponse,
    answered,
    resend_key,
)
from weaver.server.compat.weaver_rest_tensors import Body, Prompt, read_body
from weaver.types import SamplingParams

if TYPE_CHECKING:
    from weaver.types import JsonDict

BASE = "base:"
UNSUPPORTED = (
    "score_centering",
    "return_sampling_mask",
    "return_moe_topk_indices",
    "topk_prompt_logprobs",
)

router = APIRouter()


class SessionBody(Body):
    base_model: str | None = None
    model_path: str | None = None


class RestSamplingParams(Body):
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = None
    stop: Any = None
    stop_token_ids: Any = ()
    seed: int | None = None
    sampling_seed: int | None = None

    def to_native(self) -> SamplingParams:
        given = self.model_dump(exclude_none=True, exclude={"sampling_seed"})
        if self.seed is None and self.sampling_seed is not None:
            given["seed"] = self.sampling_seed
        return SamplingParams(**given)


class SampleBody(Body):
    prompt: Prompt
    sampling_params: RestSamplingParams = RestSamplingParams()
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    return_old_logprob: bool = False
    score_centering: Any = None
    return_sampling_mask: Any = None
    return_moe_topk_indices: Any = None


class LogprobsBody(Body):
    prompt: Prompt
    loss_fn_config: dict[str, Any] = Field(default_factory=dict)
    return_rollout_token_expert: bool = False


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


async def sampler_in(sampling_session: str, desk: Desked) -> str:
    """The sampler that a path names, if the caller may see it."""
    sampler_id = sampler_of(sampling_session)
    await _base_model(desk, sampler_id)
    return sampler_id


SamplerId = Annotated[str, Depends(sampler_in)]


@router.post("/sessions/{session}/sampling-sessions", status_code=201)
async def open_session(session: str, request: Request, desk: Desked) -> Response:
    body = await read_body(request, SessionBody)
    if body.model_path is not None:
        path = (await find_checkpoint(desk.service, body.model_path)).path
        operation, sampler_id = OpenSampler(model_path=path), path
    elif body.base_model is not None:
        base_model = (await desk.service.get_model(body.base_model)).name
        operation, sampler_id = OpenSampler(base_model=base_model), f"{BASE}{base_model}"
    else:
        raise InvalidRequestError("needs base_model or model_path.", field="body")
    entry = await desk.submit(operation, Note(key=await resend_key(request)))
    await desk.wait(entry, POLL_S)
    if entry.outcome is not None and entry.outcome.error is not None:
        raise entry.outcome.error.to_error()
    described = await _describe(request, desk, sampler_id)
    if entry.outcome is not None:
        return JsonResponse(described, status_code=201)
    reply = {"sampling_session": described, "sync_operation": entry.envelope()}
    return JsonResponse(reply, status_code=202)


@router.get("/sampling-sessions/{sampling_session}")
async def get_session(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    return JsonResponse(await _describe(request, desk, sampler_id))


@router.delete("/sampling-sessions/{sampling_session}", status_code=204)
async def delete_session(sampler_id: SamplerId) -> None:
    """Nothing is held for it."""


@router.post("/sampling-sessions/{sampling_session}/samples")
async def sample(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    body = await read_body(request, SampleBody)
    for name in UNSUPPORTED:
        if getattr(body, name):
            raise _unsupported(name)
    operation = Sample(
        sampler_id=sampler_id,
        prompt=body.prompt.to_model_input(),
        params=body.sampling_params.to_native(),
        num_samples=body.num_samples,
        include_prompt_logprobs=body.prompt_logprobs,
    )
    note = Note(
        key=await resend_key(request),
        sampler_id=sampler_id,
        samples=body.num_samples,
        old_logprobs=body.return_old_logprob,
    )
    return await answered(desk, await desk.submit(operation, note))


@router.post("/sampling-sessions/{sampling_session}/logprobs")
async def logprobs(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    body = await read_body(request, LogprobsBody)
    if body.return_rollout_token_expert:
        raise _unsupported("return_rollout_token_expert")
    if body.loss_fn_config.get("temperature", 1) != 1:
        raise _unsupported("loss_fn_config.temperature")
    operation = Sample(
        sampler_id=sampler_id,
        prompt=body.prompt.to_model_input(),
        num_samples=0,
        include_prompt_logprobs=True,
    )
    note = Note(key=await resend_key(request), sampler_id=sampler_id)
    return await answered(desk, await desk.submit(operation, note))


@router.post("/sampling-sessions/{sampling_session}/pause-generation")
async def pause(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    body = await read_body(request, PauseBody)
    await desk.pause(sampler_id, abort=body.mode == "abort")
    return JsonResponse({"ok": True, "status": "paused", "mode": body.mode})


@router.post("/sampling-sessions/{sampling_session}/continue-generation")
async def go_on(sampler_id: SamplerId, desk: Desked) -> Response:
    await desk.go_on(sampler_id)
    return JsonResponse({"ok": True, "status": "running"})


async def _base_model(desk: Desked, sampler_id: str) -> str:
    if sampler_id.startswith(BASE):
        return (await desk.service.get_model(sampler_id.removeprefix(BASE))).name
    return (await desk.service.get_checkpoint(sampler_id)).base_model


async def _describe(request: Request, desk: Desked, sampler_id: str) -> JsonDict:
    base_model = await _base_model(desk, sampler_id)
    return {
        "id": session_of(sampler_id),
        "base_model": base_model,
        "model_path": None if sampler_id.startswith(BASE) else sampler_id,
        "status": "ready",
        "tokenizer_path": await tokenizer_path(request, base_model),
    }


def _unsupported(field: str) -> UnsupportedError:
    return UnsupportedError("has no counterpart here.", field=field, hint="Leave it out.")
