"""The routes of the Weaver REST interface, but for those of checkpoints: `artifacts.py` has them.

docs/weaver-rest.md has their table. A session has no meaning here: it is an id that a client was
given, and gives no right. A sampling session is a name for weights that never change: there is
nothing to start or to free.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from functools import partial
from typing import Annotated
from uuid import UUID, uuid4

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response

from weaver import errors, protocol, wire
from weaver.server.adapters.weaver_rest import answers, bodies
from weaver.server.http.caller_session import CallerDep, CallerSession, Entry
from weaver.server.sampling import BASE
from weaver.types import JsonDict, MetricPoint

PREFIX = "/api/v1"
"""With which the paths of the interface begin."""
HOLD_S = 1.0
"""How long a submission is held for an outcome: below it, a client never polls."""
LENGTH_SUFFIX = re.compile(r":[0-9]+$")
"""`Qwen/Qwen3-8B:262144`: the context that a name asks for; models have one here."""


router = APIRouter(
    prefix=PREFIX, include_in_schema=False, default_response_class=answers.JsonResponse
)

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


# --- sessions -----------------------------------------------------------------------------------


@router.post("/sessions", status_code=201)
async def open_session(request: Request) -> JsonDict:
    body = await bodies.OpenBody.read(request)
    if body.scheduling_policy is not None:  # the client expects it to be obeyed
        raise errors.UnsupportedError(
            "is not for clients to choose: operations run in fair turns.",
            field="scheduling_policy",
            hint="Leave it out.",
        )
    return {"id": uuid4()}


@router.get("/sessions/{session}")
async def get_session(session: UUID) -> JsonDict:
    return {"id": session}


@router.post("/sessions/{session}/heartbeat", status_code=204)
async def heartbeat(session: UUID) -> None:
    """Nothing ends for want of one."""


@router.post("/sessions/{session}/metrics", status_code=202)
async def log_metrics(session: UUID, request: Request, caller: CallerDep) -> JsonDict:
    body = await bodies.MetricsBody.read(request)
    by_run: defaultdict[str, list[MetricPoint]] = defaultdict(list)
    for point in body.metrics:
        by_run[point.model_id].append(MetricPoint(**point.model_dump(exclude={"model_id"})))
    key = await resend_key(request)
    for run_id, points in by_run.items():
        name = key and hashlib.sha256(f"{key} {run_id}".encode()).hexdigest()
        await caller.service.log_metrics(run_id, points, key=name)
    return {"accepted": len(body.metrics)}


# --- models -------------------------------------------------------------------------------------


@router.post("/sessions/{session}/models", status_code=201)
async def create_model(session: UUID, request: Request, caller: CallerDep) -> JsonDict:
    body = await bodies.ModelBody.read(request)
    models = {model.name for model in await caller.service.list_models()}
    name = body.base_model
    operation = protocol.CreateModel(
        base_model=name if name in models else LENGTH_SUFFIX.sub("", name),
        training_mode=body.training_mode or "lora",
        lora_config=body.lora_config,
        user_metadata=body.user_metadata or {},
    )
    created = await caller.carry_out(operation, answers.RestNote(key=await resend_key(request)))
    assert isinstance(created, protocol.ModelCreated)
    path = await tokenizer_path(request, created.run.base_model)
    return {
        **answers.run_json(created.run, last_seq=0),
        "session_id": session,
        "tokenizer_path": path,
    }


@router.get("/models")
@router.get("/training-runs")
async def list_runs(caller: CallerDep, limit: Limit = 25, offset: Offset = 0) -> JsonDict:
    seqs, runs = caller.last_seqs(), await caller.service.list_runs()
    described = [answers.run_json(run, last_seq=seqs.get(run.run_id, 0)) for run in runs]
    return _page(described, limit, offset)


@router.get("/models/{model_id}")
@router.get("/training-runs/{model_id}")
@router.post("/models/{model_id}/terminate")
async def get_run(model_id: str, caller: CallerDep) -> JsonDict:
    """Terminating leaves the run as it is: closing a client destroys no state."""
    run = await caller.service.get_run(model_id)
    described = answers.run_json(run, last_seq=caller.last_seqs().get(model_id, 0))
    checkpoints = await caller.service.list_checkpoints(model_id)
    return {**described, "checkpoints": [answers.checkpoint_json(info) for info in checkpoints]}


@router.get("/supported-models")
@router.get("/model-catalog")
async def list_base_models(caller: CallerDep, limit: Limit = 100, offset: Offset = 0) -> JsonDict:
    models = [answers.catalog_json(model) for model in await caller.service.list_models()]
    return _page(models, limit, offset)


# --- operations ---------------------------------------------------------------------------------


@router.get("/operations/{operation_id}")
async def get_operation(operation_id: str, caller: CallerDep) -> Response:
    return await answered(caller, caller.find(operation_id), hold_s=protocol.LONGEST_POLL_S)


def _add(path: str, kind: type[bodies.RunBody]) -> None:
    @router.post(f"/models/{{model_id}}/{path}")
    async def submit(model_id: str, request: Request, caller: CallerDep) -> Response:
        """An operation of a run, in the order in which its request began to arrive."""
        await caller.service.get_run(model_id)
        async with caller.turns[model_id]:
            body = await kind.read(request)
            operation = await wire.beside(len(await request.body()), body.operation)
            if isinstance(operation, protocol.LoadCheckpoint):  # its path may be an id
                path = (await answers.find_checkpoint(caller.service, operation.path)).path
                operation = operation.model_copy(update={"path": path})
            note = answers.RestNote(key=await resend_key(request), artifact=kind.artifact)
            entry = await caller.submit(operation, note, run_id=model_id)
        return await answered(caller, entry)


for _path, _kind in bodies.OF_RUNS.items():
    _add(_path, _kind)


async def resend_key(request: Request) -> str | None:
    """What all attempts of one call share, and no other call has.

    The client sends one `traceparent` with all attempts of a call. Without it only a body that has
    a seq_id can be told from an equal one.
    """
    trace, body = request.headers.get("traceparent", ""), await request.body()
    if not trace and b'"seq_id"' not in body:
        return None
    digest = hashlib.blake2b(f"{trace}\n{request.url.path}\n".encode(), digest_size=16)
    await wire.beside(len(body), partial(digest.update, body))
    return digest.hexdigest()


async def answered(caller: CallerSession, entry: Entry, *, hold_s: float = HOLD_S) -> Response:
    """The operation's envelope, with its outcome if that comes within `hold_s`."""
    await caller.wait(entry, hold_s)
    return await to_thread.run_sync(lambda: answers.JsonResponse(answers.operation_json(entry)))


# --- sampling -----------------------------------------------------------------------------------


async def sampler_in(sampling_session: str, caller: CallerDep) -> str:
    """The sampler that a path names, if the caller may see it."""
    sampler_id = answers.sampler_of(sampling_session)
    await _base_model(caller, sampler_id)
    return sampler_id


SamplerId = Annotated[str, Depends(sampler_in)]


@router.post("/sessions/{session}/sampling-sessions", status_code=201)
async def open_sampling_session(session: UUID, request: Request, caller: CallerDep) -> JsonDict:
    body = await bodies.SamplingSessionBody.read(request)
    if body.model_path is not None:
        path = (await answers.find_checkpoint(caller.service, body.model_path)).path
        operation, sampler_id = protocol.OpenSampler(model_path=path), path
    elif body.base_model is not None:
        base_model = (await caller.service.get_model(body.base_model)).name
        operation, sampler_id = protocol.OpenSampler(base_model=base_model), f"{BASE}{base_model}"
    else:
        raise errors.InvalidRequestError("needs base_model or model_path.", field="body")
    await caller.carry_out(operation, answers.RestNote(key=await resend_key(request)))
    return await get_sampling_session(sampler_id, request, caller)


@router.get("/sampling-sessions/{sampling_session}")
async def get_sampling_session(
    sampler_id: SamplerId, request: Request, caller: CallerDep
) -> JsonDict:
    base_model = await _base_model(caller, sampler_id)
    return {
        "id": answers.sampling_session_of(sampler_id),
        "base_model": base_model,
        "model_path": None if sampler_id.startswith(BASE) else sampler_id,
        "status": "ready",
        "tokenizer_path": await tokenizer_path(request, base_model),
    }


@router.delete("/sampling-sessions/{sampling_session}", status_code=204)
async def delete_sampling_session(sampler_id: SamplerId) -> None:
    """Nothing is held for it."""


@router.post("/sampling-sessions/{sampling_session}/samples")
async def sample(sampler_id: SamplerId, request: Request, caller: CallerDep) -> Response:
    body = await bodies.SampleBody.read(request)
    operation = protocol.Sample(
        sampler_id=sampler_id,
        prompt=body.prompt,
        params=bodies.params_of(body.sampling_params),
        num_samples=body.num_samples,
        include_prompt_logprobs=body.prompt_logprobs,
        prompt_top_logprobs=body.topk_prompt_logprobs,
    )
    note = answers.RestNote(
        key=await resend_key(request),
        sampler_id=sampler_id,
        samples=body.num_samples,
        old_logprobs=body.return_old_logprob,
    )
    return await answered(caller, await caller.submit(operation, note))


@router.post("/sampling-sessions/{sampling_session}/logprobs")
async def logprobs(sampler_id: SamplerId, request: Request, caller: CallerDep) -> Response:
    body = await bodies.LogprobsBody.read(request)
    if body.loss_fn_config.get("temperature", 1) != 1:
        raise bodies.unsupported("loss_fn_config.temperature")
    operation = protocol.Sample(
        sampler_id=sampler_id, prompt=body.prompt, num_samples=0, include_prompt_logprobs=True
    )
    note = answers.RestNote(key=await resend_key(request), sampler_id=sampler_id)
    return await answered(caller, await caller.submit(operation, note))


@router.post("/sampling-sessions/{sampling_session}/pause-generation")
async def pause(sampler_id: SamplerId, request: Request, caller: CallerDep) -> JsonDict:
    body = await bodies.PauseBody.read(request)
    await caller.pause(sampler_id, abort=body.mode == "abort")
    return {"ok": True, "status": "paused", "mode": body.mode}


@router.post("/sampling-sessions/{sampling_session}/continue-generation")
async def go_on(sampler_id: SamplerId, caller: CallerDep) -> JsonDict:
    await caller.go_on(sampler_id)
    return {"ok": True, "status": "running"}


async def _base_model(caller: CallerDep, sampler_id: str) -> str:
    if sampler_id.startswith(BASE):
        return (await caller.service.get_model(sampler_id.removeprefix(BASE))).name
    return (await caller.service.get_checkpoint(sampler_id)).base_model


async def tokenizer_path(request: Request, base_model: str) -> str | None:
    gateway, where = request.state.gateway, request.client.host if request.client else ""
    path: str | None = await gateway.tokenizer_path(request.state.service, base_model, client=where)
    return path


def _page(items: list[JsonDict], limit: int, offset: int) -> JsonDict:
    pagination = {"total_count": len(items), "limit": limit, "offset": offset}
    return {"items": items[offset : offset + limit], "pagination": pagination}


# --- what has no meaning on this server ---------------------------------------------------------

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
DEPLOYMENTS = "Sample from a checkpoint, or export it."
DATA_SETS = "Send the tokens of each datum."
ABSENT = {
    "organizations": "Projects come with API keys: `weaver keys create --project NAME`.",
    "scope": "Projects come with API keys: leave organization and project out.",
    "quota": "Nothing is billed here.",
    "scheduling": "Operations run in fair turns: leave scheduling_policy out.",
    "managed-datasets": DATA_SETS,
    "models/{model_id}/managed-dataset-sample-lengths": DATA_SETS,
    "deployments": DEPLOYMENTS,
    "checkpoints/{checkpoint_id}/deployments": DEPLOYMENTS,
}
"""Beginnings of paths, and what to do instead."""


def _refuse(path: str, hint: str) -> None:
    async def absent() -> None:
        raise errors.UnsupportedError(f"this server has no {path.rpartition('/')[2]}.", hint=hint)

    for ending in ("", "/{rest:path}"):
        router.add_api_route(f"/{path}{ending}", absent, methods=METHODS)


for _path, _hint in ABSENT.items():
    _refuse(_path, _hint)
