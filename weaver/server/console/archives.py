"""A checkpoint's export as one file that a browser downloads by itself: a tar archive.

A page cannot send its key with a download, so that it asks for an address that needs none, which is
good for 15 minutes and known to nobody else.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response

from weaver import types
from weaver.server.http.downloads import Grants
from weaver.server.http.errors import REFUSALS
from weaver.server.http.gateway import GatewayDep, ServiceDep

ARCHIVES = "/console/archives/"
"""Below which addresses are secrets, and need no key."""
router = APIRouter(responses=REFUSALS)


class ArchiveAddress(types.Value):
    url: str
    """Relative to that of the server; its last part is the file's name."""
    size_bytes: int
    """Of the files in it."""
    expires_at: datetime


@router.post("/v1/checkpoints/archive", status_code=201)
async def open_archive(
    path: Annotated[str, Query(min_length=1, max_length=1024)],
    gateway: GatewayDep,
    service: ServiceDep,
    merge: bool = False,
) -> ArchiveAddress:
    """What `weaver checkpoints export` writes, as an archive: first it is made, if it is merged."""
    export = await service.export_checkpoint(path, merge=merge)
    token, expires_at = gateway.own(Grants).give(service, path, merge=merge)
    run_id, *_, name = path.rpartition("//")[2].split("/")
    return ArchiveAddress(
        url=f"{ARCHIVES[1:]}{token}/{run_id}-{name}{'-merged' if merge else ''}.tar",
        size_bytes=sum(file.size_bytes for file in export.files),
        expires_at=expires_at,
    )


@router.get(f"{ARCHIVES}{{token}}/{{name}}", include_in_schema=False)
async def download(token: str, name: str, gateway: GatewayDep) -> Response:
    reply = await gateway.own(Grants).find(token).archive()
    reply.headers["Content-Disposition"] = "attachment"  # as the address names it
    return reply
