"""How a checkpoint leaves the server by Tinker's protocol: as a tar archive, or file by file.

Clients up to 0.30 ask for the archive of any checkpoint; later ones save weights as external ones
and ask for the address of each file. Both are PEFT's layout, or transformers' after full
fine-tuning, and both addresses need no key: they are given to the checkpoint's project alone.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from weaver.server.adapters.tinker import bodies
from weaver.server.adapters.tinker.records import CHECKPOINT, checkpoint_path
from weaver.server.adapters.tinker.routes import PREFIX
from weaver.server.http.downloads import Grants
from weaver.server.http.gateway import GatewayDep, ServiceDep
from weaver.types import JsonDict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.exchange import Export

FILES = f"{PREFIX}/weights_files/"
"""Below which addresses are secrets, and need no key."""
ARCHIVE = "checkpoint.tar"
BLOCK, CHUNK_BYTES = tarfile.BLOCKSIZE, 2**20

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
    if name != ARCHIVE:
        return await grant.file(name)
    members = _members(await grant.export())
    padded = (len(head) + -(-size // BLOCK) * BLOCK for head, _, size in members)
    length = {"Content-Length": str(sum(padded) + 2 * BLOCK)}
    return StreamingResponse(_tar(members), media_type="application/x-tar", headers=length)


def _members(export: Export) -> list[tuple[bytes, Path, int]]:
    """Of each file its header in the archive, its place, and its size in bytes."""
    members = []
    for file in export.files:
        info = tarfile.TarInfo(file.name)
        info.size = file.size_bytes
        head = info.tobuf(tarfile.GNU_FORMAT)
        members.append((head, Path(export.folder or "", file.name), file.size_bytes))
    return members


def _tar(members: list[tuple[bytes, Path, int]]) -> Iterator[bytes]:
    """The archive, read as it is sent; a file that is gone meanwhile breaks it off."""
    for head, path, size in members:
        yield head
        with path.open("rb") as file:
            for at in range(0, size, CHUNK_BYTES):
                yield file.read(min(CHUNK_BYTES, size - at))
        yield bytes(-size % BLOCK)
    yield bytes(2 * BLOCK)
