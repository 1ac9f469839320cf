"""Downloading what other programs read of a checkpoint; for the clients and the command line."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from functools import partial
from os import PathLike
from pathlib import Path

import anyio
from anyio import CancelScope, to_thread

from weaver.errors import CheckpointCorruptError, ServiceConnectionError, StorageError
from weaver.exchange import ExportedFile
from weaver.protocol import Service


async def export_to(
    service: Service, path: str, folder: str | PathLike[str], *, merge: bool
) -> Path:
    """Writes the files of a checkpoint into a new folder, which is there whole or not at all.

    Raises:
        StorageError: the folder exists, or the disk is full or not writable.
        CheckpointCorruptError: what came is not what was saved.
        CheckpointNotFoundError, UnsupportedError: see `Service.export_checkpoint`.
    """
    to = await anyio.Path(folder).expanduser()
    if await to.exists():
        raise StorageError(f"{to} exists already.", field="to", hint="Name a new folder.")
    export = await service.export_checkpoint(path, merge=merge)
    try:
        draft = to.parent / f".{to.name}-{secrets.token_hex(4)}"
        await draft.mkdir(parents=True)
        try:
            for file in export.files:
                await _copy(service, path, file, draft, merge=merge)
            await draft.rename(to)
            return Path(to)
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(partial(shutil.rmtree, draft, ignore_errors=True))
    except OSError as error:
        raise StorageError(
            f"{to} cannot be written: {error.strerror or error}.",
            field="to",
            hint="Check the free space and the permissions, or choose another folder.",
        ) from error


async def _copy(
    service: Service, path: str, file: ExportedFile, folder: anyio.Path, *, merge: bool
) -> None:
    if Path(file.name).name != file.name:
        raise ServiceConnectionError(f"the server names a file {file.name!r}, which is not safe.")
    digest, offset = hashlib.sha256(), 0
    async with await anyio.open_file(folder / file.name, "wb") as target:
        while offset < file.size_bytes:
            data = await service.read_exported(path, file.name, merge=merge, offset=offset)
            if not data:
                break
            digest.update(data)
            offset += len(data)
            await target.write(data)
    if digest.hexdigest() != file.sha256:
        raise CheckpointCorruptError(
            f"{file.name} of {path} is not what was saved.",
            field="path",
            hint="Try again; if it happens again, the checkpoint is damaged.",
        )
