"""Checkpoints of the Weaver REST interface and their Hugging Face artifacts, to be downloaded.

An artifact is a checkpoint seen from outside: its adapter, or a whole model (merged at first need).
It lives as long as its checkpoint. A download's address carries its own right, for its files
and a limited time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from weaver import types
from weaver.server.adapters.weaver_rest import answers, bodies
from weaver.server.adapters.weaver_rest.routes import PREFIX
from weaver.server.http.caller_session import CallerDep, CallerSession
from weaver.server.http.downloads import Grants
from weaver.server.http.gateway import GatewayDep

if TYPE_CHECKING:
    from weaver.server.keys import Caller

router = APIRouter(
    prefix=PREFIX, include_in_schema=False, default_response_class=answers.JsonResponse
)


class Merged(set["tuple[Caller, str]"]):
    """Paths of adapters that their callers have exported as whole models, since the start."""


@router.get("/models/{model_id}/checkpoints")
async def list_checkpoints(model_id: str, caller: CallerDep) -> types.JsonDict:
    items = await caller.service.list_checkpoints((await caller.service.get_run(model_id)).run_id)
    return {"items": [answers.checkpoint_json(info) for info in items]}


@router.patch("/models/{model_id}/checkpoints/ttl")
async def set_ttl(model_id: str, request: Request, caller: CallerDep) -> types.JsonDict:
    body = await bodies.TtlBody.read(request)
    info = await caller.service.set_checkpoint_ttl(answers.native_path(body.path), body.ttl_seconds)
    return answers.checkpoint_json(info)


@router.post("/checkpoints/{checkpoint_id}/export")
async def export_checkpoint(
    checkpoint_id: str, request: Request, gateway: GatewayDep, caller: CallerDep
) -> types.JsonDict:
    body = await bodies.ExportBody.read(request)
    info = answers.by_id(await _exportable(caller), checkpoint_id)
    if not body.merge_adapter:
        return answers.artifact_json(info, answers.artifact_kind(info))
    await caller.service.export_checkpoint(info.path, merge=True)
    gateway.own(Merged).add((request.state.caller, info.path))
    return answers.artifact_json(info, "hf_model")


@router.get("/checkpoints/{checkpoint_id}/artifacts")
async def list_artifacts(
    checkpoint_id: str, request: Request, gateway: GatewayDep, caller: CallerDep
) -> types.JsonDict:
    info = answers.by_id(await _exportable(caller), checkpoint_id)
    merged = (request.state.caller, info.path) in gateway.own(Merged)
    kinds = sorted({answers.artifact_kind(info), *(["hf_model"] if merged else [])})
    return {"items": [answers.artifact_json(info, kind) for kind in kinds]}


@router.get("/artifacts/{artifact}/download")
async def describe_download(
    artifact: str, request: Request, gateway: GatewayDep, caller: CallerDep
) -> types.JsonDict:
    known = {
        answers.artifact_id(info, kind): (info.path, kind == "hf_model")
        for info in (await _exportable(caller)).values()
        for kind in answers.ARTIFACTS
    }
    path, merge = answers.by_id(known, artifact)
    export = await caller.service.export_checkpoint(path, merge=merge)
    token, _ = gateway.own(Grants).give(caller.service, path, merge=merge)
    base = f"{request.base_url}{PREFIX[1:]}/downloads/{token}"
    files = [
        {"name": f.name, "url": f"{base}/{f.name}", "size": f.size_bytes, "sha256": f.sha256}
        for f in export.files
    ]
    return {"files": files}


@router.get("/downloads/{token}/{name}")
async def download(token: str, name: str, gateway: GatewayDep) -> Response:
    """Needs no key, as its address is known only to who was given it. Obeys Range."""
    return await gateway.own(Grants).find(token).file(name)


async def _exportable(caller: CallerSession) -> dict[str, types.CheckpointInfo]:
    """By id."""
    known = await caller.service.list_checkpoints()
    return {answers.uuid_of(one.path): one for one in known if one.kind != "sampler"}
