"""The routes of the native protocol: each hands one request to the caller's view of the service.

Bodies and answers that carry arrays are messages of `weaver.wire`; all else is JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, HTTPException, Query, Request, Response
from fastapi.routing import APIRoute
from pydantic import Field, TypeAdapter
from starlette.routing import request_response

from weaver import errors, exchange, fields, protocol, types, wire
from weaver.server.http.errors import REFUSALS
from weaver.server.http.gateway import Adapter, GatewayDep, ServiceDep
from weaver.server.http.streaming import EventStream, Turns

PREFIX = "/v1"
MOST_POINTS = 10_000
"""So many of a run's metrics are in one answer."""
SUBMISSIONS = TypeAdapter(Annotated[tuple[protocol.Submission, ...], Field(fail_fast=True)])
BINARY: dict[str, Any] = {
    "content": {protocol.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
}
FILE: dict[str, Any] = {"content": {"application/octet-stream": {}}}


class SessionRequest(types.Value):
    user_metadata: types.JsonDict = Field(default_factory=dict)


class RunRequest(types.Value):
    name: fields.ShortText


class CancelRequest(types.Value):
    submission_ids: tuple[fields.ShortText, ...] = Field(max_length=10_000, fail_fast=True)


class TtlRequest(types.Value):
    ttl_seconds: int | None = Field(ge=1, le=2**31)


class MetricsRequest(types.Value):
    points: tuple[types.MetricPoint, ...] = Field(max_length=10_000, fail_fast=True)


class Accepted(types.Value):
    accepted: int


class Poll(types.Value):
    after: int = Field(0, ge=0, le=2**63)
    timeout: float = Field(0.0, ge=0, le=protocol.LONGEST_POLL_S)


class Piece(types.Value):
    """Where the bytes of a body belong."""

    name: str
    offset: int = Field(0, ge=0, lt=2**63)


Name = Annotated[str, Query(min_length=1, max_length=1024)]
Path = Annotated[str, Query(min_length=1, max_length=1024, examples=["weaver://run/weights/name"])]


class _CheckedRoute(APIRoute):
    """Counts what is in the JSON of a request before it is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            if request.method != "GET":
                wire.check_json(await request.body(), share=2)
            return await handle(request)

        return check_and_handle


class _DirectRoute(APIRoute):
    """Its endpoint takes the request and answers the response, with nothing between.

    What the framework does for other routes costs as much as all that the server does for an
    operation beside it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app = request_response(self.endpoint)


async def resend_key(request: Request, gateway: GatewayDep) -> AsyncIterator[str | None]:
    """What a request has in common with its resends, which wait until it has been answered."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        yield None
        return
    place = (request.state.caller.project, request.method, str(request.url), given)
    key = hashlib.sha256(repr(place).encode()).hexdigest()  # headers may be long
    async with gateway.alone(key):
        yield key


ResendKey = Annotated[str | None, Depends(resend_key)]
router = APIRouter(prefix=PREFIX, route_class=_CheckedRoute, responses=REFUSALS)
direct = APIRouter(prefix=PREFIX, route_class=_DirectRoute, responses=REFUSALS)


# --- operations ---------------------------------------------------------------------------------

SESSION_ID = {"name": "session_id", "in": "path", "required": True, "schema": {"type": "string"}}
POLL = [
    {"name": name, "in": "query", "schema": schema}
    for name, schema in Poll.model_json_schema()["properties"].items()
]
PUT_IMPORT = [
    {"name": "import_id", "in": "path", "required": True, "schema": {"type": "string"}},
    {"name": "name", "in": "query", "required": True, "schema": {"type": "string"}},
    {"name": "offset", "in": "query", "schema": {"type": "integer", "minimum": 0}},
]


@direct.post(
    "/sessions/{session_id}/submissions",
    response_model=Accepted,
    status_code=202,
    openapi_extra={"parameters": [SESSION_ID], "requestBody": {**BINARY, "required": True}},
)
async def submit(request: Request) -> Response:
    gateway, service = request.state.gateway, request.state.service
    if request.headers.get("Content-Type") != protocol.MEDIA_TYPE:
        raise HTTPException(415, f"Submissions are sent as {protocol.MEDIA_TYPE}")
    data = await request.body()
    read = partial(wire.decode, data, SUBMISSIONS, limits=gateway.message_limits)
    async with gateway.read(wire.announced_bytes(data), read) as submissions:
        count, limit = len(submissions), gateway.service.parts.limits.submissions
        if count > limit:
            raise errors.TooLargeError(f"{count} submissions in a request, the limit is {limit}.")
        request.state.logged = {"operation_ids": [submission.id for submission in submissions]}
        request.state.quiet = all(submission.kind == "sample" for submission in submissions)
        await service.submit(request.path_params["session_id"], submissions)
    gateway.metrics.submitted(submissions)
    accepted = Accepted(accepted=len(submissions)).model_dump_json()
    return Response(accepted, status_code=202, media_type="application/json")


@direct.get(
    "/sessions/{session_id}/outcomes",
    response_class=Response,
    responses={200: BINARY},
    openapi_extra={"parameters": [SESSION_ID, *POLL]},
)
async def collect(request: Request) -> Response:
    gateway, service = request.state.gateway, request.state.service
    poll = Poll(**request.query_params)
    outcomes: Sequence[protocol.Outcome] = ()
    with gateway.until_it_stops():
        outcomes = await service.collect(
            request.path_params["session_id"], after=poll.after, timeout_s=poll.timeout
        )
    outcomes = next(wire.portions(outcomes), [])  # the cursor of the next poll asks for the rest
    gateway.metrics.collected(outcomes)
    data = await wire.beside(wire.about_bytes(outcomes), partial(wire.encode, outcomes))
    return Response(data, media_type=protocol.MEDIA_TYPE)


# --- sessions -----------------------------------------------------------------------------------


@router.post("/sessions", status_code=201)
async def open_session(
    body: SessionRequest, service: ServiceDep, key: ResendKey
) -> protocol.SessionInfo:
    return await service.open_session(user_metadata=body.user_metadata, key=key)


@router.get("/sessions")
async def list_sessions(service: ServiceDep) -> Sequence[protocol.SessionState]:
    return await service.list_sessions()


@router.delete("/sessions/{session_id}", status_code=204)
async def close_session(session_id: str, service: ServiceDep, key: ResendKey) -> None:
    await service.close_session(session_id, key=key)


@router.post("/sessions/{session_id}/cancel", status_code=204)
async def cancel(session_id: str, body: CancelRequest, service: ServiceDep) -> None:
    await service.cancel(session_id, body.submission_ids)


@router.get(
    "/sessions/{session_id}/stream/{submission_id}",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def stream(
    session_id: str,
    submission_id: str,
    service: ServiceDep,
    gateway: GatewayDep,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> Response:
    pieces = service.sample_stream(session_id, submission_id)
    return EventStream(pieces, gateway.own(Turns), after=last_event_id)


@router.get("/server")
async def about_server(gateway: GatewayDep, service: ServiceDep) -> exchange.ServerInfo:
    return await to_thread.run_sync(gateway.machine.about, service.parts.engine)


# --- models -------------------------------------------------------------------------------------


@router.get("/base-models")
async def list_models(service: ServiceDep) -> Sequence[types.ModelInfo]:
    return await service.list_models()


@router.get("/base-models/info")
async def get_model(name: Name, service: ServiceDep) -> types.ModelInfo:
    return await service.get_model(name)


@router.get("/base-models/tokenizer", response_class=Response, responses={200: BINARY})
async def tokenizer_files(name: Name, service: ServiceDep) -> Response:
    files = await service.tokenizer_files(name)
    return Response(await to_thread.run_sync(wire.encode, files), media_type=protocol.MEDIA_TYPE)


# --- runs, checkpoints, metrics -----------------------------------------------------------------


@router.get("/runs")
async def list_runs(service: ServiceDep) -> Sequence[types.TrainingRun]:
    return await service.list_runs()


@router.get("/runs/{run_id}")
async def get_run(run_id: str, service: ServiceDep) -> types.TrainingRun:
    return await service.get_run(run_id)


@router.patch("/runs/{run_id}")
async def rename_run(run_id: str, body: RunRequest, service: ServiceDep) -> types.TrainingRun:
    return await service.rename_run(run_id, body.name)


@router.post("/runs/{run_id}/stop")
async def stop_run(run_id: str, service: ServiceDep) -> types.TrainingRun:
    return await service.stop_run(run_id)


@router.delete("/runs/{run_id}", status_code=204)
async def delete_run(
    run_id: str, service: ServiceDep, key: ResendKey, checkpoints: bool = False
) -> None:
    await service.delete_run(run_id, checkpoints=checkpoints, key=key)


@router.post("/runs/{run_id}/metrics", status_code=204)
async def log_metrics(
    run_id: str, body: MetricsRequest, service: ServiceDep, key: ResendKey
) -> None:
    await service.log_metrics(run_id, body.points, key=key)


@router.delete("/runs/{run_id}/metrics", status_code=204)
async def rewind_metrics(
    run_id: str, service: ServiceDep, after: Annotated[int, Query(ge=-(2**63), lt=2**63)]
) -> None:
    await service.rewind_metrics(run_id, after)


@router.get("/runs/{run_id}/metrics")
async def read_metrics(
    run_id: str,
    service: ServiceDep,
    response: Response,
    name: str | None = None,
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST_POINTS)] = MOST_POINTS,
) -> Sequence[types.MetricPoint]:
    """Where there are more, a header says where they begin."""
    points = await service.read_metrics(run_id, name=name, offset=offset, limit=limit + 1)
    if len(points) > limit:
        response.headers[protocol.NEXT_OFFSET] = str(offset + limit)
    return points[:limit]


@router.get("/checkpoints")
async def list_checkpoints(
    service: ServiceDep, run_id: str | None = None
) -> Sequence[types.CheckpointInfo]:
    return await service.list_checkpoints(run_id)


@router.get("/checkpoints/info")
async def get_checkpoint(path: Path, service: ServiceDep) -> types.CheckpointInfo:
    return await service.get_checkpoint(path)


@router.delete("/checkpoints", status_code=204)
async def delete_checkpoint(path: Path, service: ServiceDep, key: ResendKey) -> None:
    await service.delete_checkpoint(path, key=key)


@router.post("/checkpoints/delete")
async def delete_checkpoints(
    body: exchange.Selection, service: ServiceDep, key: ResendKey, dry_run: bool = False
) -> Sequence[types.CheckpointInfo]:
    """A resend deletes what is left, and answers that."""
    return await service.delete_checkpoints(body, dry_run=dry_run)


@router.put("/checkpoints/ttl")
async def set_checkpoint_ttl(
    path: Path, body: TtlRequest, service: ServiceDep, key: ResendKey
) -> types.CheckpointInfo:
    return await service.set_checkpoint_ttl(path, body.ttl_seconds, key=key)


@direct.put(
    "/imports/{import_id}",
    status_code=204,
    openapi_extra={"parameters": PUT_IMPORT, "requestBody": {**FILE, "required": True}},
)
async def put_import(request: Request) -> Response:
    """A piece of a file, at most 4 MiB of it."""
    where = Piece(**request.query_params)
    data = await request.body()
    if len(data) > exchange.IMPORT_PIECE_BYTES:
        limit = exchange.IMPORT_PIECE_BYTES
        raise errors.TooLargeError(f"the piece has {len(data)} bytes, the limit is {limit}.")
    service, import_id = request.state.service, request.path_params["import_id"]
    await service.put_import(import_id, where.name, data, offset=where.offset)
    return Response(status_code=204)


@router.post("/imports/{import_id}")
async def import_checkpoint(
    import_id: str, body: exchange.Import, service: ServiceDep, key: ResendKey
) -> types.CheckpointInfo:
    return await service.import_checkpoint(import_id, body)


@router.delete("/imports/{import_id}", status_code=204)
async def drop_import(import_id: str, service: ServiceDep) -> None:
    await service.drop_import(import_id)


@router.get("/checkpoints/export")
async def export_checkpoint(
    path: Path, service: ServiceDep, merge: bool = False
) -> exchange.Export:
    export = await service.export_checkpoint(path, merge=merge)
    return export.model_copy(update={"folder": None})


@router.get("/checkpoints/export/file", response_class=Response, responses={200: FILE})
async def read_exported(
    path: Path,
    name: Name,
    service: ServiceDep,
    merge: bool = False,
    offset: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> Response:
    data = await service.read_exported(path, name, merge=merge, offset=offset)
    return Response(data, media_type="application/octet-stream")


NATIVE = Adapter(routes=[*direct.routes, *router.routes], prefix=PREFIX)
