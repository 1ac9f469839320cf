"""The routes of the native protocol: each hands one request to the caller's view of the service.

Bodies and answers that carry arrays are messages of `weaver.wire`; all else is JSON.
"""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field

from weaver import wire
from weaver.fields import ShortText
from weaver.protocol import Export, SessionInfo, SessionState
from weaver.server.http.adapter import Adapter
from weaver.server.http.errors import REFUSALS, native_envelope
from weaver.server.http.exchange import BINARY, add_exchange
from weaver.server.http.front import BODY_LIMITS, MEDIA_TYPE, Scoped
from weaver.server.http.replies import OnceRoute
from weaver.server.http.streaming import EventStream
from weaver.types import (
    CheckpointInfo,
    JsonDict,
    MetricPoint,
    ModelInfo,
    TrainingRun,
    Value,
)

PREFIX = "/v1"
FILE: dict[str, Any] = {"content": {"application/octet-stream": {}}}


class SessionRequest(Value):
    user_metadata: JsonDict = Field(default_factory=dict)


class CancelRequest(Value):
    submission_ids: tuple[ShortText, ...] = Field(max_length=10_000, fail_fast=True)


class TtlRequest(Value):
    ttl_seconds: int | None = Field(ge=1, le=2**31)


class MetricsRequest(Value):
    points: tuple[MetricPoint, ...] = Field(max_length=10_000, fail_fast=True)


Name = Annotated[str, Query(min_length=1, max_length=1024)]
Path = Annotated[str, Query(min_length=1, max_length=1024, examples=["weaver://run/weights/name"])]

router = APIRouter(prefix=PREFIX, route_class=OnceRoute, responses=REFUSALS)
add_exchange(router)


# --- sessions -----------------------------------------------------------------------------------


@router.post("/sessions", response_model=SessionInfo, status_code=201)
async def open_session(body: SessionRequest, service: Scoped) -> SessionInfo:
    return await service.open_session(user_metadata=body.user_metadata)


@router.get("/sessions", response_model=list[SessionState])
async def list_sessions(service: Scoped) -> list[SessionState]:
    return list(await service.list_sessions())


@router.delete("/sessions/{session_id}", status_code=204)
async def close_session(session_id: str, service: Scoped) -> None:
    await service.close_session(session_id)


@router.post("/sessions/{session_id}/cancel", status_code=204)
async def cancel(session_id: str, body: CancelRequest, service: Scoped) -> None:
    await service.cancel(session_id, body.submission_ids)


@router.get(
    "/sessions/{session_id}/stream/{submission_id}",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def stream(
    session_id: str,
    submission_id: str,
    service: Scoped,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> Response:
    return EventStream(service.stream(session_id, submission_id), after=last_event_id)


# --- models -------------------------------------------------------------------------------------


@router.get("/models", response_model=list[ModelInfo])
async def list_models(service: Scoped) -> list[ModelInfo]:
    return list(await service.list_models())


@router.get("/models/info", response_model=ModelInfo)
async def get_model(name: Name, service: Scoped) -> ModelInfo:
    return await service.get_model(name)


@router.get("/models/tokenizer", response_class=Response, responses={200: BINARY})
async def tokenizer_files(name: Name, service: Scoped) -> Response:
    files = await service.tokenizer_files(name)
    return Response(await to_thread.run_sync(wire.encode, files), media_type=MEDIA_TYPE)


# --- runs, checkpoints, metrics -----------------------------------------------------------------


@router.get("/runs", response_model=list[TrainingRun])
async def list_runs(service: Scoped) -> list[TrainingRun]:
    return list(await service.list_runs())


@router.get("/runs/{run_id}", response_model=TrainingRun)
async def get_run(run_id: str, service: Scoped) -> TrainingRun:
    return await service.get_run(run_id)


@router.post("/runs/{run_id}/stop", response_model=TrainingRun)
async def stop_run(run_id: str, service: Scoped) -> TrainingRun:
    return await service.stop_run(run_id)


@router.delete("/runs/{run_id}", status_code=204)
async def delete_run(run_id: str, service: Scoped, checkpoints: bool = False) -> None:
    await service.delete_run(run_id, checkpoints=checkpoints)


@router.post("/runs/{run_id}/metrics", status_code=204)
async def log_metrics(run_id: str, body: MetricsRequest, request: Request, service: Scoped) -> None:
    await service.log_metrics(run_id, body.points, key=request.state.resend_key)


@router.get("/runs/{run_id}/metrics", response_model=list[MetricPoint])
async def read_metrics(run_id: str, service: Scoped, name: str | None = None) -> list[MetricPoint]:
    return list(await service.read_metrics(run_id, name=name))


@router.get("/checkpoints", response_model=list[CheckpointInfo])
async def list_checkpoints(service: Scoped, run_id: str | None = None) -> list[CheckpointInfo]:
    return list(await service.list_checkpoints(run_id))


@router.get("/checkpoints/info", response_model=CheckpointInfo)
async def get_checkpoint(path: Path, service: Scoped) -> CheckpointInfo:
    return await service.get_checkpoint(path)


@router.delete("/checkpoints", status_code=204)
async def delete_checkpoint(path: Path, service: Scoped) -> None:
    await service.delete_checkpoint(path)


@router.put("/checkpoints/ttl", response_model=CheckpointInfo)
async def set_checkpoint_ttl(path: Path, body: TtlRequest, service: Scoped) -> CheckpointInfo:
    return await service.set_checkpoint_ttl(path, body.ttl_seconds)


@router.get("/checkpoints/export", response_model=Export)
async def export_checkpoint(path: Path, service: Scoped, merge: bool = False) -> Export:
    export = await service.export_checkpoint(path, merge=merge)
    return export.model_copy(update={"folder": None})


@router.get("/checkpoints/export/file", response_class=Response, responses={200: FILE})
async def read_exported(
    path: Path,
    name: Name,
    service: Scoped,
    merge: bool = False,
    offset: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> Response:
    data = await service.read_exported(path, name, merge=merge, offset=offset)
    return Response(data, media_type="application/octet-stream")


NATIVE = Adapter(
    routes=router.routes,
    prefix=PREFIX,
    envelope=native_envelope,
    body_limits=BODY_LIMITS,
)
