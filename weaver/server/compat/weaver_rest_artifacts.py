"""Checkpoints of the Weaver REST interface and their Hugging Face artifacts, to be downloaded.

An artifact is a checkpoint seen from outside: its adapter, or a whole model (merged at first need).
It lives as long as its checkpoint. A download's address carries its own right, for its files
and a limited time.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from weaver.errors import NotFoundError, PermissionDeniedError
from weaver.protocol import SaveCheckpoint
from weaver.server.compat.weaver_rest_answers import (
    ARTIFACTS,
    MERGED,
    artifact_id,
    artifact_json,
    artifact_kind,
    checkpoint_json,
)
from weaver.server.compat.weaver_rest_ids import PREFIX, by_id, identified, native_path
from weaver.server.compat.weaver_rest_operations import Desked
from weaver.server.compat.weaver_rest_tensors import Body, TtlSeconds
from weaver.server.compat.weaver_rest_training import ordered
from weaver.types import JsonDict

if TYPE_CHECKING:
    from weaver.server.http.front import Front
    from weaver.server.scoped import ScopedService
    from weaver.types import CheckpointInfo

URL_LIFE_S = 900

router = APIRouter()


class TtlBody(Body):
    path: str
    ttl_seconds: TtlSeconds = None


class ExportBody(Body):
    format: Literal["huggingface"] = "huggingface"
    merge_adapter: bool = False
    ttl_seconds: TtlSeconds = None


@dataclass(frozen=True, slots=True)
class Grant:
    """What the address of a download gives a right to, whoever asks."""

    service: ScopedService
    path: str
    merge: bool
    ends_at: float


@router.get("/models/{model_id}/checkpoints")
async def list_checkpoints(model_id: str, desk: Desked) -> JsonDict:
    items = await desk.service.list_checkpoints((await desk.service.get_run(model_id)).run_id)
    return {"items": [checkpoint_json(info) for info in items]}


@router.patch("/models/{model_id}/checkpoints/ttl")
async def set_ttl(model_id: str, request: Request, desk: Desked) -> JsonDict:
    body = await TtlBody.read(request)
    info = await desk.service.set_checkpoint_ttl(native_path(body.path), body.ttl_seconds)
    return checkpoint_json(info)


@router.post("/models/{model_id}/export-hf")
async def export_model(model_id: str, request: Request, desk: Desked) -> Response:
    """Saves the model as it is now, and answers the checkpoint's artifact."""
    return await ordered(request, desk, model_id, kind=ExportBody, make=_export, artifact=True)


@router.post("/checkpoints/{checkpoint_id}/export")
async def export_checkpoint(checkpoint_id: str, request: Request, desk: Desked) -> JsonDict:
    body = await ExportBody.read(request)
    info = by_id(identified(await _exportable(desk)), checkpoint_id)
    if not body.merge_adapter:
        return artifact_json(info, artifact_kind(info))
    await desk.service.export_checkpoint(info.path, merge=True)
    desk.merged.add(info.path)
    return artifact_json(info, "hf_model")


@router.get("/checkpoints/{checkpoint_id}/artifacts")
async def list_artifacts(checkpoint_id: str, desk: Desked) -> JsonDict:
    info = by_id(identified(await _exportable(desk)), checkpoint_id)
    kinds = sorted({artifact_kind(info), *(["hf_model"] if info.path in desk.merged else [])})
    return {"items": [artifact_json(info, kind) for kind in kinds]}


@router.get("/artifacts/{artifact}/download")
async def describe_download(artifact: str, request: Request, desk: Desked) -> JsonDict:
    known = {
        artifact_id(info, kind): (info.path, kind == "hf_model")
        for info in await _exportable(desk)
        for kind in ARTIFACTS
    }
    path, merge = by_id(known, artifact)
    export = await desk.service.export_checkpoint(path, merge=merge)
    front: Front = request.state.front
    token, now = secrets.token_urlsafe(32), time.monotonic()
    kept = {token: grant for token, grant in front.downloads.items() if grant.ends_at > now}
    front.downloads = kept | {token: Grant(desk.service, path, merge, now + URL_LIFE_S)}
    base = f"{request.base_url}{PREFIX[1:]}/downloads/{token}"
    files = [
        {"name": f.name, "url": f"{base}/{f.name}", "size": f.size_bytes, "sha256": f.sha256}
        for f in export.files
    ]
    return {"files": files}


@router.get("/downloads/{token}/{name}")
async def download(token: str, name: str, request: Request) -> Response:
    """Needs no key, as its address is known only to who was given it. Obeys Range."""
    front: Front = request.state.front
    grant = front.downloads.get(token)
    if grant is None or grant.ends_at <= time.monotonic():
        raise PermissionDeniedError(
            "this address is not valid, or no longer.", hint="Ask for a new one."
        )
    export = await grant.service.export_checkpoint(grant.path, merge=grant.merge)
    if name not in (file.name for file in export.files):
        raise NotFoundError(f"the artifact has no file {name[:80]!r}.")
    return FileResponse(f"{export.folder}/{name}", media_type="application/octet-stream")


async def _exportable(desk: Desked) -> list[CheckpointInfo]:
    return [c for c in await desk.service.list_checkpoints() if c.kind != "sampler"]


def _export(body: ExportBody) -> SaveCheckpoint:
    return SaveCheckpoint(
        purpose="state",
        name=f"{MERGED if body.merge_adapter else 'export-'}{secrets.token_hex(4)}",
        include_optimizer=False,
        ttl_seconds=body.ttl_seconds,
    )
