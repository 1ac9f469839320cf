"""Checkpoints of the Weaver REST interface and their Hugging Face artifacts, to be downloaded.

An artifact is a checkpoint seen from outside: its adapter, or a whole model (merged at first need).
It lives as long as its checkpoint. A download's address carries its own right, for its files
and a limited time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from weaver.errors import NotFoundError, PermissionDeniedError
from weaver.protocol import SaveCheckpoint
from weaver.server.compat.weaver_rest_answers import (
    MERGED,
    artifact_id,
    artifact_json,
    artifact_kind,
    checkpoint_json,
)
from weaver.server.compat.weaver_rest_errors import PREFIX
from weaver.server.compat.weaver_rest_ids import by_id, native_path
from weaver.server.compat.weaver_rest_operations import Desked, JsonResponse
from weaver.server.compat.weaver_rest_tensors import Body, TtlSeconds, read_body
from weaver.server.compat.weaver_rest_training import Verb, ordered
from weaver.server.scoped import ScopedService
from weaver.server.tenancy import Caller

if TYPE_CHECKING:
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


@router.get("/models/{model_id}/checkpoints")
async def list_checkpoints(model_id: str, desk: Desked) -> Response:
    items = await desk.service.list_checkpoints((await desk.service.get_run(model_id)).run_id)
    return JsonResponse({"items": [checkpoint_json(info) for info in items]})


@router.patch("/models/{model_id}/checkpoints/ttl")
async def set_ttl(model_id: str, request: Request, desk: Desked) -> Response:
    body = await read_body(request, TtlBody)
    info = await desk.service.set_checkpoint_ttl(native_path(body.path), body.ttl_seconds)
    return JsonResponse(checkpoint_json(info))


@router.post("/models/{model_id}/export-hf")
async def export_model(model_id: str, request: Request, desk: Desked) -> Response:
    """Saves the model as it is now, and answers the checkpoint's artifact."""
    verb = Verb("export-hf", ExportBody, _export, numbered=False)
    return await ordered(request, desk, model_id, verb=verb, artifact=True)


@router.post("/checkpoints/{checkpoint_id}/export")
async def export_checkpoint(checkpoint_id: str, request: Request, desk: Desked) -> Response:
    body = await read_body(request, ExportBody)
    info = by_id(await _exportable(desk), checkpoint_id)
    if not body.merge_adapter:
        return JsonResponse(artifact_json(info, artifact_kind(info)))
    await desk.service.export_checkpoint(info.path, merge=True)
    desk.merged.add(info.path)
    return JsonResponse(artifact_json(info, "hf_model"))


@router.get("/checkpoints/{checkpoint_id}/artifacts")
async def list_artifacts(checkpoint_id: str, desk: Desked) -> Response:
    info = by_id(await _exportable(desk), checkpoint_id)
    kinds = sorted({artifact_kind(info), *(["hf_model"] if info.path in desk.merged else [])})
    return JsonResponse({"items": [artifact_json(info, kind) for kind in kinds]})


@router.get("/artifacts/{artifact}/download")
async def describe_download(artifact: str, request: Request, desk: Desked) -> Response:
    known = await _exportable(desk)
    merge = artifact in (artifact_id(info, "hf_model") for info in known)
    kind = "hf_model" if merge else "hf_adapter"
    info = by_id(known, artifact, id_of=lambda info: artifact_id(info, kind))
    export = await desk.service.export_checkpoint(info.path, merge=merge)
    expires = int(time.time()) + URL_LIFE_S
    caller: Caller = request.state.caller
    right = [info.path, merge, caller.project, caller.admin, expires]
    token = _sign(right, request.state.front.secret)
    base = f"{request.base_url}{PREFIX[1:]}/downloads/{token}"
    files = [
        {"name": f.name, "url": f"{base}/{f.name}", "size": f.size_bytes, "sha256": f.sha256}
        for f in export.files
    ]
    return JsonResponse({"files": files})


@router.get("/downloads/{token}/{name}")
async def download(token: str, name: str, request: Request) -> Response:
    """Needs no key, as its address is known only to who was given it. Obeys Range."""
    front = request.state.front
    path, merge, project, admin, expires = _verify(token, front.secret)
    if expires < time.time():
        raise PermissionDeniedError("this address has expired.", hint="Ask for a new one.")
    service = ScopedService(front.service, Caller(project, admin=admin))
    export = await service.export_checkpoint(path, merge=merge)
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


def _sign(content: list[Any], secret: bytes) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
    return f"{payload}.{hmac.new(secret, payload.encode(), hashlib.sha256).hexdigest()}"


def _verify(token: str, secret: bytes) -> list[Any]:
    """Raises PermissionDeniedError."""
    payload, _, mac = token.partition(".")
    expected = hmac.new(secret, payload.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(mac.encode(), expected.encode()):
        raise PermissionDeniedError("this address is not valid.", hint="Ask for a new one.")
    content: list[Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return content
