"""Sessions, models, runs and metrics of the Weaver REST interface.

A session has no meaning here: it is an id that a client was given, and gives no right.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID, uuid4

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from pydantic import ConfigDict, Field

from weaver.config import is_loopback
from weaver.errors import InvalidRequestError, UnsupportedError
from weaver.protocol import CreateModel, ModelCreated
from weaver.server.compat.weaver_rest_answers import catalog_json, checkpoint_json, run_json
from weaver.server.compat.weaver_rest_operations import Desked, resend_key
from weaver.server.compat.weaver_rest_tensors import Body
from weaver.tokenizers import store_tokenizer
from weaver.types import JsonDict, LoraConfig, MetricPoint, TrainingMode

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH_SUFFIX = re.compile(r":[0-9]+$")
"""`Qwen/Qwen3-8B:262144`: the context that a name asks for; models have one here."""

router = APIRouter()

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


class SessionBody(Body):
    scheduling_policy: Any = None


class ModelBody(Body):
    base_model: str
    training_mode: TrainingMode | None = None
    lora_config: LoraConfig | None = None
    user_metadata: JsonDict | None = None


class Point(MetricPoint):
    model_config = ConfigDict(extra="ignore")
    _error = InvalidRequestError
    model_id: str


class MetricsBody(Body):
    metrics: tuple[Point, ...] = Field(max_length=10_000, fail_fast=True)


# --- sessions -----------------------------------------------------------------------------------


@router.post("/sessions", status_code=201)
async def open_session(request: Request) -> JsonDict:
    body = await SessionBody.read(request)
    if body.scheduling_policy is not None:  # the client expects it to be obeyed
        raise UnsupportedError(
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
async def log_metrics(session: UUID, request: Request, desk: Desked) -> JsonDict:
    body = await MetricsBody.read(request)
    by_run: defaultdict[str, list[MetricPoint]] = defaultdict(list)
    for point in body.metrics:
        by_run[point.model_id].append(MetricPoint(**point.model_dump(exclude={"model_id"})))
    key = await resend_key(request)
    for run_id, points in by_run.items():
        name = key and hashlib.sha256(f"{key} {run_id}".encode()).hexdigest()
        await desk.service.log_metrics(run_id, points, key=name)
    return {"accepted": len(body.metrics)}


# --- models -------------------------------------------------------------------------------------


@router.post("/sessions/{session}/models", status_code=201)
async def create_model(session: UUID, request: Request, desk: Desked) -> JsonDict:
    body = await ModelBody.read(request)
    models = {model.name for model in await desk.service.list_models()}
    name = body.base_model
    operation = CreateModel(
        base_model=name if name in models else LENGTH_SUFFIX.sub("", name),
        training_mode=body.training_mode or "lora",
        lora_config=body.lora_config,
        user_metadata=body.user_metadata or {},
    )
    created = await desk.carry_out(request, operation)
    assert isinstance(created, ModelCreated)
    path = await tokenizer_path(request, created.run.base_model)
    return {**run_json(created.run, last_seq=0), "session_id": session, "tokenizer_path": path}


@router.get("/models")
@router.get("/training-runs")
async def list_runs(desk: Desked, limit: Limit = 25, offset: Offset = 0) -> JsonDict:
    seqs, runs = desk.last_seqs(), await desk.service.list_runs()
    described = [run_json(run, last_seq=seqs.get(run.run_id, 0)) for run in runs]
    return _page(described, limit, offset)


@router.get("/models/{model_id}")
@router.get("/training-runs/{model_id}")
@router.post("/models/{model_id}/terminate")
async def get_run(model_id: str, desk: Desked) -> JsonDict:
    """Terminating leaves the run as it is: closing a client destroys no state."""
    run = await desk.service.get_run(model_id)
    described = run_json(run, last_seq=desk.last_seqs().get(model_id, 0))
    checkpoints = await desk.service.list_checkpoints(model_id)
    return {**described, "checkpoints": [checkpoint_json(info) for info in checkpoints]}


@router.get("/supported-models")
@router.get("/model-catalog")
async def list_base_models(desk: Desked, limit: Limit = 100, offset: Offset = 0) -> JsonDict:
    models = [catalog_json(model) for model in await desk.service.list_models()]
    return _page(models, limit, offset)


async def tokenizer_path(request: Request, base_model: str) -> str | None:
    """A folder from which a client on this machine loads the tokenizer; None for any other.

    Those take it from where `base_model` says, or the native client fetches it.
    """
    front, service = request.state.front, request.state.service
    if front.folder is None or request.client is None or not is_loopback(request.client.host):
        return None
    try:
        files = await service.tokenizer_files(base_model)
    except UnsupportedError:  # it has none
        return None
    return str(await to_thread.run_sync(store_tokenizer, files, front.folder / "tokenizers"))


def _page(items: Sequence[JsonDict], limit: int, offset: int) -> JsonDict:
    pagination = {"total_count": len(items), "limit": limit, "offset": offset}
    return {"items": items[offset : offset + limit], "pagination": pagination}
