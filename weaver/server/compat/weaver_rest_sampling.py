"""Sampling sessions of the Weaver REST interface: weights to sample from, samples, logprobs.

A sampling session is a name for weights that never change: there is nothing to start or to free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ConfigDict, Field, model_validator

from weaver.errors import InvalidRequestError, UnsupportedError
from weaver.protocol import OpenSampler, Sample
from weaver.server.compat.weaver_rest_answers import Note
from weaver.server.compat.weaver_rest_ids import find_checkpoint, sampler_of, session_of
from weaver.server.compat.weaver_rest_models import tokenizer_path
from weaver.server.compat.weaver_rest_operations import Desked, answered
from weaver.server.compat.weaver_rest_tensors import Body
from weaver.server.sampling import BASE
from weaver.types import JsonDict, ModelInput, SamplingParams

if TYPE_CHECKING:
    from typing import Self

UNSUPPORTED = (
    "score_centering",
    "return_sampling_mask",
    "return_moe_topk_indices",
    "return_rollout_token_expert",
    "topk_prompt_logprobs",
)

router = APIRouter()


class SessionBody(Body):
    base_model: str | None = None
    model_path: str | None = None


class PromptBody(Body):
    model_config = ConfigDict(extra="allow")
    prompt: ModelInput

    @model_validator(mode="after")
    def _refuse_what_is_not_computed(self) -> Self:
        for name in UNSUPPORTED:
            if (self.model_extra or {}).get(name):
                raise _unsupported(name)
        return self


class SampleBody(PromptBody):
    sampling_params: dict[str, Any] = Field(default_factory=dict)
    num_samples: int = Field(default=1, ge=1, le=4096)
    prompt_logprobs: bool = False
    return_old_logprob: bool = False


class LogprobsBody(PromptBody):
    loss_fn_config: dict[str, Any] = Field(default_factory=dict)


class PauseBody(Body):
    mode: Literal["abort", "retract", "in_place"] = "abort"


async def sampler_in(sampling_session: str, desk: Desked) -> str:
    """The sampler that a path names, if the caller may see it."""
    sampler_id = sampler_of(sampling_session)
    await _base_model(desk, sampler_id)
    return sampler_id


SamplerId = Annotated[str, Depends(sampler_in)]


@router.post("/sessions/{session}/sampling-sessions", status_code=201)
async def open_session(session: UUID, request: Request, desk: Desked) -> JsonDict:
    body = await SessionBody.read(request)
    if body.model_path is not None:
        path = (await find_checkpoint(desk.service, body.model_path)).path
        operation, sampler_id = OpenSampler(model_path=path), path
    elif body.base_model is not None:
        base_model = (await desk.service.get_model(body.base_model)).name
        operation, sampler_id = OpenSampler(base_model=base_model), f"{BASE}{base_model}"
    else:
        raise InvalidRequestError("needs base_model or model_path.", field="body")
    await desk.carry_out(request, operation)
    return await get_session(sampler_id, request, desk)


@router.get("/sampling-sessions/{sampling_session}")
async def get_session(sampler_id: SamplerId, request: Request, desk: Desked) -> JsonDict:
    base_model = await _base_model(desk, sampler_id)
    return {
        "id": session_of(sampler_id),
        "base_model": base_model,
        "model_path": None if sampler_id.startswith(BASE) else sampler_id,
        "status": "ready",
        "tokenizer_path": await tokenizer_path(request, base_model),
    }


@router.delete("/sampling-sessions/{sampling_session}", status_code=204)
async def delete_session(sampler_id: SamplerId) -> None:
    """Nothing is held for it."""


@router.post("/sampling-sessions/{sampling_session}/samples")
async def sample(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    body = await SampleBody.read(request)
    operation = Sample(
        sampler_id=sampler_id,
        prompt=body.prompt,
        params=_params(body.sampling_params),
        num_samples=body.num_samples,
        include_prompt_logprobs=body.prompt_logprobs,
    )
    note = Note(
        sampler_id=sampler_id, samples=body.num_samples, old_logprobs=body.return_old_logprob
    )
    return await answered(desk, await desk.submit(request, operation, note))


@router.post("/sampling-sessions/{sampling_session}/logprobs")
async def logprobs(sampler_id: SamplerId, request: Request, desk: Desked) -> Response:
    body = await LogprobsBody.read(request)
    if body.loss_fn_config.get("temperature", 1) != 1:
        raise _unsupported("loss_fn_config.temperature")
    operation = Sample(
        sampler_id=sampler_id, prompt=body.prompt, num_samples=0, include_prompt_logprobs=True
    )
    note = Note(sampler_id=sampler_id)
    return await answered(desk, await desk.submit(request, operation, note))


@router.post("/sampling-sessions/{sampling_session}/pause-generation")
async def pause(sampler_id: SamplerId, request: Request, desk: Desked) -> JsonDict:
    body = await PauseBody.read(request)
    await desk.pause(sampler_id, abort=body.mode == "abort")
    return {"ok": True, "status": "paused", "mode": body.mode}


@router.post("/sampling-sessions/{sampling_session}/continue-generation")
async def go_on(sampler_id: SamplerId, desk: Desked) -> JsonDict:
    await desk.go_on(sampler_id)
    return {"ok": True, "status": "running"}


def _params(given: JsonDict) -> SamplingParams:
    """Without what newer clients may send beside; `sampling_seed` is another name of `seed`."""
    set_ = {name: value for name, value in given.items() if value is not None}
    if "sampling_seed" in set_:
        set_.setdefault("seed", set_["sampling_seed"])
    return SamplingParams(**{n: v for n, v in set_.items() if n in SamplingParams.model_fields})


async def _base_model(desk: Desked, sampler_id: str) -> str:
    if sampler_id.startswith(BASE):
        return (await desk.service.get_model(sampler_id.removeprefix(BASE))).name
    return (await desk.service.get_checkpoint(sampler_id)).base_model


def _unsupported(field: str) -> UnsupportedError:
    return UnsupportedError("has no counterpart here.", field=field, hint="Leave it out.")
