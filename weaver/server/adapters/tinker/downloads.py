"""How a checkpoint leaves the server by Tinker's protocol: as a tar archive, or file by file.

Clients up to 0.30 ask for the archive of any checkpoint; later ones save weights as external ones
and ask for the address of each file. Both are PEFT's layout, or transformers' after full
fine-tuning, and both addresses need no key: they are given to the checkpoint's project alone.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from weaver.server.adapters.tinker import bodies
from weaver.server.adapters.tinker.records import CHECKPOINT, checkpoint_path
from weaver.server.adapters.tinker.routes import PREFIX
from weaver.server.http.downloads import Grants
from weaver.server.http.gateway import GatewayDep, ServiceDep
from weaver.types import JsonDict

FILES = f"{PREFIX}/weights_files/"
"""Below which addresses are secrets, and need no key."""
ARCHIVE = "checkpoint.tar"

router = APIRouter(include_in_schema=False)


@router.get(f"{PREFIX}{CHECKPOINT}/archive")
async def archive_url(
    model_id: str,
    kind: bodies.Kind,
    name: str,
    request: Request,
    gateway: GatewayDep,
    service: ServiceDep,
) -> JsonDict:
    path = (await service.get_checkpoint(checkpoint_path(model_id, kind, name))).path
    token, expires_at = gateway.own(Grants).give(service, path)
    url = f"{request.base_url}{FILES[1:]}{token}/{ARCHIVE}"
    return {"url": url, "expires": expires_at.isoformat()}


@router.get(f"{PREFIX}{CHECKPOINT}/external_weights_urls")
async def file_urls(
    model_id: str,
    kind: bodies.Kind,
    name: str,
    request: Request,
    gateway: GatewayDep,
    service: ServiceDep,
) -> JsonDict:
    path = checkpoint_path(model_id, kind, name)
    export = await service.export_checkpoint(path)
    token, expires_at = gateway.own(Grants).give(service, path)
    base = f"{request.base_url}{FILES[1:]}{token}"
    urls = {file.name: f"{base}/{file.name}" for file in export.files}
    return {"urls": urls, "expires": expires_at.isoformat()}


@router.get(f"{FILES}{{token}}/{{name}}")
async def download(token: str, name: str, gateway: GatewayDep) -> Response:
    grant = gateway.own(Grants).find(token)
    return await (grant.archive() if name == ARCHIVE else grant.file(name))
