"""Sessions, models, runs and metrics of the Weaver REST interface.

A session has no meaning here: it is an id that a client was given, and gives no right.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field

from weaver.errors import NotFoundError, ServiceConnectionError, UnsupportedError
from weaver.protocol import CreateModel, ErrorInfo, ModelCreated, Outcome
from weaver.server.compat.weaver_rest_answers import (
    Note,
    catalog_json,
    checkpoint_json,
    run_json,
)
from weaver.server.compat.weaver_rest_operations import (
    POLL_S,
    Desk,
    Desked,
    JsonResponse,
    resend_key,
)
from weaver.server.compat.weaver_rest_tensors import Body, read_body
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
    name: str | None = None
    tags: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    user_metadata: JsonDict | None = None
    scheduling_policy: Any = None


class ModelBody(Body):
    base_model: str
    training_mode: TrainingMode | None = None
    lora_config: LoraConfig | None = None
    user_metadata: JsonDict | None = None


class Point(Body):
    model_id: str
    name: str
    value: float
    step: int | None = None
    occurred_at: datetime | None = None


class MetricsBody(Body):
    metrics: tuple[Point, ...] = Field(max_length=10_000)


async def known_session(session: str) -> str:
    """Raises NotFoundError for what was never a session's id."""
    try:
        return str(uuid.UUID(session))
    except ValueError:
        raise NotFoundError(
            f"no session is called {session[:80]!r}.", field="session_id", hint="Open one."
        ) from None


SessionId = Annotated[str, Depends(known_session)]


# --- sessions -----------------------------------------------------------------------------------


@router.post("/sessions", status_code=201)
async def open_session(request: Request) -> Response:
    body = await read_body(request, SessionBody)
    if body.scheduling_policy is not None:  # the client expects it to be obeyed
        raise UnsupportedError(
            "is not for clients to choose: operations run in fair turns.",
            field="scheduling_policy",
            hint="Leave it out.",
        )
    described = body.model_dump(exclude_none=True)
    return JsonResponse({"id": str(uuid.uuid4()), **described}, status_code=201)


@router.get("/sessions/{session}")
async def get_session(session: SessionId) -> Response:
    return JsonResponse({"id": session})


@router.post("/sessions/{session}/heartbeat", status_code=204)
async def heartbeat(session: SessionId) -> None:
    """Nothing ends for want of one."""


@router.post("/sessions/{session}/metrics", status_code=202)
async def log_metrics(session: SessionId, request: Request, desk: Desked) -> Response:
    body = await read_body(request, MetricsBody)
    by_run: defaultdict[str, list[MetricPoint]] = defaultdict(list)
    for point in body.metrics:
        by_run[point.model_id].append(MetricPoint(**point.model_dump(exclude={"model_id"})))
    for run_id, points in by_run.items():
        await desk.service.log_metrics(run_id, points)
    return JsonResponse({"accepted": len(body.metrics)}, status_code=202)


# --- models -------------------------------------------------------------------------------------


@router.post("/sessions/{session}/models", status_code=201)
async def create_model(session: SessionId, request: Request, desk: Desked) -> Response:
    body = await read_body(request, ModelBody)
    models = {model.name for model in await desk.service.list_models()}
    name = body.base_model
    operation = CreateModel(
        base_model=name if name in models else LENGTH_SUFFIX.sub("", name),
        training_mode=body.training_mode or "lora",
        lora_config=body.lora_config,
        user_metadata=body.user_metadata or {},
    )
    entry = await desk.submit(operation, Note(key=await resend_key(request)))
    await desk.wait(entry, POLL_S)
    match entry.outcome:
        case Outcome(result=ModelCreated(run=run)):
            pass
        case Outcome(error=ErrorInfo() as error):
            raise error.to_error()
        case _:
            raise ServiceConnectionError("the model is still being made.", hint="Ask again.")
    path = await tokenizer_path(request, run.base_model)
    reply = {**run_json(run, last_seq=0), "session_id": session, "tokenizer_path": path}
    return JsonResponse(reply, status_code=201)


@router.get("/models")
@router.get("/training-runs")
async def list_runs(desk: Desked, limit: Limit = 25, offset: Offset = 0) -> Response:
    seqs, runs = desk.last_seqs(), await desk.service.list_runs()
    described = [run_json(run, last_seq=seqs.get(run.run_id, 0)) for run in runs]
    return JsonResponse(_page(described, limit, offset))


@router.get("/models/{model_id}")
async def get_model(model_id: str, desk: Desked) -> Response:
    return JsonResponse(await _described(desk, model_id))


@router.get("/training-runs/{model_id}")
async def get_run(model_id: str, desk: Desked) -> Response:
    run = await _described(desk, model_id)
    checkpoints = await desk.service.list_checkpoints(model_id)
    return JsonResponse({**run, "checkpoints": [checkpoint_json(info) for info in checkpoints]})


@router.post("/models/{model_id}/terminate")
async def terminate(model_id: str, desk: Desked) -> Response:
    """Leaves the run as it is: closing a client destroys no state."""
    return JsonResponse(await _described(desk, model_id))


@router.get("/supported-models")
async def supported_models(desk: Desked, limit: Limit = 100, offset: Offset = 0) -> Response:
    names = [model.name for model in await desk.service.list_models()]
    models = [{"id": name, "name": name, "status": "healthy"} for name in names]
    return JsonResponse(_page(models, limit, offset))


@router.get("/model-catalog")
async def model_catalog(desk: Desked, limit: Limit = 100, offset: Offset = 0) -> Response:
    models = [catalog_json(model) for model in await desk.service.list_models()]
    return JsonResponse(_page(models, limit, offset))


async def _described(desk: Desk, model_id: str) -> JsonDict:
    run = await desk.service.get_run(model_id)
    return run_json(run, last_seq=desk.last_seqs().get(model_id, 0))


async def tokenizer_path(request: Request, base_model: str) -> str | None:
    """A folder from which a client on this machine loads the tokenizer; None for any other.

    Those take it from where `base_model` says, or the native client fetches it.
    """
    front, service = request.state.front, request.state.service
    if front.folder is None or request.client is None or not _is_local(request.client.host):
        return None
    try:
        files = await service.tokenizer_files(base_model)
    except UnsupportedError:  # it has none
        return None
    return str(await to_thread.run_sync(store_tokenizer, files, front.folder / "tokenizers"))


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _page(items: Sequence[JsonDict], limit: int, offset: int) -> JsonDict:
    pagination = {"total_count": len(items), "limit": limit, "offset": offset}
    return {"items": items[offset : offset + limit], "pagination": pagination}
