"""`Grants`: addresses that give whoever knows one a checkpoint's files, for a while, without a key.

Adapters whose clients download from a bare address ask for them and answer those addresses.
"""

from __future__ import annotations

import secrets
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.responses import FileResponse, StreamingResponse

from weaver.errors import NotFoundError, PermissionDeniedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weaver.exchange import Export
    from weaver.server.view import View

URL_LIFE_S = 900
BLOCK, CHUNK_BYTES = tarfile.BLOCKSIZE, 2**20


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to one checkpoint's export, as its asker had it."""

    service: View
    path: str
    merge: bool
    expires_at: datetime

    async def export(self) -> Export:
        """Raises CheckpointNotFoundError: it is gone, or no longer its asker's."""
        return await self.service.export_checkpoint(self.path, merge=self.merge)

    async def file(self, name: str) -> FileResponse:
        """One of its files; obeys Range.

        Raises:
            NotFoundError: there is no such file.
        """
        export = await self.export()
        if name not in (file.name for file in export.files):
            raise NotFoundError(f"there is no file {name[:80]!r}.")
        return FileResponse(f"{export.folder}/{name}", media_type="application/octet-stream")

    async def archive(self) -> StreamingResponse:
        """All of them, as a tar archive."""
        members = _members(await self.export())
        padded = (len(head) + -(-size // BLOCK) * BLOCK for head, _, size in members)
        length = {"Content-Length": str(sum(padded) + 2 * BLOCK)}
        return StreamingResponse(_tar(members), media_type="application/x-tar", headers=length)


class Grants:
    """Those of one server, since it started; asked in its event loop."""

    def __init__(self) -> None:
        self._by_token: dict[str, Grant] = {}

    def give(self, service: View, path: str, *, merge: bool = False) -> tuple[str, datetime]:
        """The secret for an address, and until when it is good."""
        now = datetime.now(UTC)
        kept = {token: one for token, one in self._by_token.items() if one.expires_at > now}
        token, expires_at = secrets.token_urlsafe(32), now + timedelta(seconds=URL_LIFE_S)
        self._by_token = kept | {token: Grant(service, path, merge, expires_at)}
        return token, expires_at

    def find(self, token: str) -> Grant:
        """Raises PermissionDeniedError."""
        grant = self._by_token.get(token)
        if grant is None or grant.expires_at <= datetime.now(UTC):
            raise PermissionDeniedError(
                "this address is not valid, or no longer.", hint="Ask for a new one."
            )
        return grant


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
