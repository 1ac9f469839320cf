"""Checkpoints of the Weaver REST interface and their Hugging Face artifacts, to be downloaded.

An artifact is a checkpoint seen from outside: its adapter or model files. It is not stored a second
time, and lives as long as its checkpoint. A download's address carries its own right, for one file
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

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from weaver.errors import NotFoundError, PermissionDeniedError, UnsupportedError
from weaver.protocol import SaveCheckpoint
from weaver.server.checkpoints import MANIFEST
from weaver.server.compat.weaver_rest_answers import artifact_id, artifact_json, checkpoint_json
from weaver.server.compat.weaver_rest_errors import PREFIX
from weaver.server.compat.weaver_rest_ids import by_id, native_path
from weaver.server.compat.weaver_rest_operations import Desked, JsonResponse
from weaver.server.compat.weaver_rest_tensors import Body, TtlSeconds, read_body
from weaver.server.compat.weaver_rest_training import Verb, ordered
from weaver.server.scoped import ScopedService
from weaver.server.tenancy import Caller

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.types import CheckpointInfo

URL_LIFE_S = 900
INTERNAL = ("weaver_state.json", "optimizer.safetensors")

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
    body, _ = await read_body(request, TtlBody)
    info = await desk.service.set_checkpoint_ttl(native_path(body.path), body.ttl_seconds)
    return JsonResponse(checkpoint_json(info))


@router.post("/models/{model_id}/export-hf")
async def export_model(model_id: str, request: Request, desk: Desked) -> Response:
    """Saves the model as it is now, and answers the checkpoint's artifact."""
    verb = Verb("export-hf", ExportBody, _export, numbered=False)
    return await ordered(request, desk, model_id, verb=verb, artifact=True)


@router.post("/checkpoints/{checkpoint_id}/export")
async def export_checkpoint(checkpoint_id: str, request: Request, desk: Desked) -> Response:
    _check((await read_body(request, ExportBody))[0])
    return JsonResponse(artifact_json(by_id(await _exportable(desk), checkpoint_id)))


@router.get("/checkpoints/{checkpoint_id}/artifacts")
async def list_artifacts(checkpoint_id: str, desk: Desked) -> Response:
    return JsonResponse({"items": [artifact_json(by_id(await _exportable(desk), checkpoint_id))]})


@router.get("/artifacts/{artifact}/download")
async def describe_download(artifact: str, request: Request, desk: Desked) -> Response:
    info = by_id(await _exportable(desk), artifact, id_of=artifact_id)
    folder = await request.state.service.checkpoint_folder(info.path)
    expires = int(time.time()) + URL_LIFE_S
    caller: Caller = request.state.caller
    token = _sign([info.path, caller.project, caller.admin, expires], request.state.front.secret)
    base = f"{request.base_url}{PREFIX[1:]}/downloads/{token}"
    files = [
        {"name": name, "url": f"{base}/{name}", "size": size, "sha256": sha256}
        for name, size, sha256 in await to_thread.run_sync(_files, folder)
    ]
    return JsonResponse({"files": files})


@router.get("/downloads/{token}/{name}")
async def download(token: str, name: str, request: Request) -> Response:
    """Needs no key, as its address is known only to who was given it. Obeys Range."""
    front = request.state.front
    path, project, admin, expires = _verify(token, front.secret)
    if expires < time.time():
        raise PermissionDeniedError("this address has expired.", hint="Ask for a new one.")
    service = ScopedService(front.service, Caller(project, admin=admin))
    folder = await service.checkpoint_folder(path)
    if name not in (found for found, _, _ in await to_thread.run_sync(_files, folder)):
        raise NotFoundError(f"the artifact has no file {name[:80]!r}.")
    return FileResponse(folder / name, media_type="application/octet-stream")


async def _exportable(desk: Desked) -> list[CheckpointInfo]:
    return [c for c in await desk.service.list_checkpoints() if c.kind != "sampler"]


def _export(body: ExportBody) -> SaveCheckpoint:
    _check(body)
    return SaveCheckpoint(
        purpose="state",
        name=f"export-{secrets.token_hex(4)}",
        include_optimizer=False,
        ttl_seconds=body.ttl_seconds,
    )


def _check(body: ExportBody) -> None:
    if body.merge_adapter:
        raise UnsupportedError(
            "adapters are not merged on this server.",
            field="merge_adapter",
            hint="Export the adapter; `PeftModel.merge_and_unload` merges it.",
        )


def _files(folder: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of what belongs to others than Weaver."""
    sums: dict[str, str] = json.loads((folder / MANIFEST).read_text())["sha256"]
    return [
        (name, (folder / name).stat().st_size, sha256)
        for name, sha256 in sums.items()
        if name not in INTERNAL
    ]


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
