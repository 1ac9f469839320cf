"""Training runs, checkpoints and sessions of Tinker's protocol: what there is, and what may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request

from weaver import errors
from weaver.server.adapters.tinker import answers, bodies
from weaver.server.adapters.tinker.routes import PREFIX
from weaver.server.adapters.tinker.session import run_of, session_of
from weaver.server.http.gateway import ServiceDep
from weaver.types import JsonDict

if TYPE_CHECKING:
    from collections.abc import Sequence


router = APIRouter(prefix=PREFIX, include_in_schema=False)
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, le=2**31)]
CHECKPOINT = "/training_runs/{model_id}/checkpoints/{kind}/{name}"


@router.get("/training_runs")
async def list_runs(
    request: Request, service: ServiceDep, limit: Limit = 20, offset: Offset = 0
) -> JsonDict:
    runs = sorted(await service.list_runs(), key=lambda run: run.last_request_at, reverse=True)
    owner = request.state.caller.project
    shown = [
        answers.run_json(run, await service.list_checkpoints(run.run_id), owner=owner)
        for run in runs[offset : offset + limit]
    ]
    return {"training_runs": shown, "cursor": _cursor(runs, limit, offset)}


@router.get("/training_runs/{model_id}")
async def get_run(model_id: str, request: Request, service: ServiceDep) -> JsonDict:
    run = await service.get_run(run_of(model_id))
    checkpoints = await service.list_checkpoints(run.run_id)
    return answers.run_json(run, checkpoints, owner=request.state.caller.project)


@router.get("/training_runs/{model_id}/checkpoints")
async def list_checkpoints_of(model_id: str, service: ServiceDep) -> JsonDict:
    found = await service.list_checkpoints(run_of(model_id))
    if not found:  # those of a deleted run stay
        await service.get_run(run_of(model_id))
    names = {run_of(model_id): model_id}
    return {"checkpoints": [answers.checkpoint_json(one, names) for one in found], "cursor": None}


@router.get("/checkpoints")
async def list_checkpoints(service: ServiceDep, limit: Limit = 100, offset: Offset = 0) -> JsonDict:
    found = sorted(await service.list_checkpoints(), key=lambda one: one.created_at, reverse=True)
    names = {run.run_id: answers.model_of(run) for run in await service.list_runs()}
    shown = [answers.checkpoint_json(one, names) for one in found[offset : offset + limit]]
    return {"checkpoints": shown, "cursor": _cursor(found, limit, offset)}


@router.delete(CHECKPOINT, status_code=204)
async def delete_checkpoint(
    model_id: str, kind: bodies.Kind, name: str, service: ServiceDep
) -> None:
    await service.delete_checkpoint(checkpoint_path(model_id, kind, name))


@router.put(f"{CHECKPOINT}/ttl", status_code=204)
async def set_ttl(
    model_id: str, kind: bodies.Kind, name: str, request: Request, service: ServiceDep
) -> None:
    body = await bodies.TtlBody.read(request)
    await service.set_checkpoint_ttl(checkpoint_path(model_id, kind, name), body.ttl_seconds)


@router.api_route(f"{CHECKPOINT}/publish", methods=["POST", "DELETE"])
async def publish(model_id: str, kind: bodies.Kind, name: str) -> None:
    raise errors.UnsupportedError(
        "checkpoints of this server are their project's own.",
        hint="Download it, or give the other user a key of the project.",
    )


@router.post("/weights_info")
async def weights_info(request: Request, service: ServiceDep) -> JsonDict:
    body = await bodies.PathBody.read(request)
    info = await service.get_checkpoint(answers.native_path(body.tinker_path))
    lora: dict[str, Any] = {}
    if info.lora_config is not None:
        trained = info.lora_config.model_dump(include={"train_unembed", "train_mlp", "train_attn"})
        lora = {"lora_rank": info.lora_config.rank, **trained}
    return {"base_model": info.base_model, "is_lora": info.training_mode == "lora", **lora}


@router.get("/billing/usage/checkpoints/current")
async def storage(service: ServiceDep, project_id: str | None = None) -> JsonDict:
    """What checkpoints take on the disk, by project; that of a deleted run's is not known."""
    projects = {run.run_id: run.project for run in await service.list_runs()}
    used: dict[str | None, list[int]] = {}
    for info in await service.list_checkpoints():
        used.setdefault(projects.get(info.run_id), []).append(info.size_bytes)
    data = [
        {
            "project_id": project,
            "checkpoint_count": len(sizes),
            "size_bytes": sum(sizes),
            "size_gigabytes": sum(sizes) / 1e9,
        }
        for project, sizes in used.items()
        if project_id in (None, project)
    ]
    return {"data": data}


@router.get("/sessions")
async def list_sessions(service: ServiceDep, limit: Limit = 20, offset: Offset = 0) -> JsonDict:
    ids = [one.session_id for one in await service.list_sessions() if "tinker" in one.user_metadata]
    return {"sessions": ids[::-1][offset : offset + limit]}


@router.get("/sessions/session-{rest}")
async def get_session(rest: str, request: Request, service: ServiceDep) -> JsonDict:
    session_id = f"session-{rest}"
    session = session_of(request, session_id)
    models = [answers.model_of(run) for run in await service.list_runs()]
    (state,) = [one for one in await service.list_sessions() if one.session_id == session_id]
    given = dict(state.user_metadata)
    shown = given.pop("tinker", {})
    return {
        "training_run_ids": [one for one in models if one.startswith(f"{session_id}:")],
        "sampler_ids": session.samplers(),
        "user_metadata": {name: str(value) for name, value in given.items()},
        "display_name": shown.get("display_name"),
    }


def checkpoint_path(model_id: str, kind: bodies.Kind, name: str) -> str:
    """The native one."""
    return answers.native_path(f"{answers.SCHEME}{model_id}/{kind}/{name}")


def _cursor(items: Sequence[object], limit: int, offset: int) -> JsonDict:
    return {"offset": offset, "limit": limit, "total_count": len(items)}
