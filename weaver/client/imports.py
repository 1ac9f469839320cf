"""Sending an adapter or a model from elsewhere to a service, which makes a checkpoint of it.

For the clients and the command line.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from os import PathLike
from pathlib import Path

import anyio
from anyio import to_thread

from weaver import errors, types
from weaver.exchange import IMPORT_PIECE_BYTES, ExportedFile, Import
from weaver.names import check_name
from weaver.protocol import Service

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GIVE_UP_S = 5.0
"""For telling the service that no more comes."""


async def import_from(
    service: Service,
    folder: str | PathLike[str],
    *,
    base_model: str | None,
    name: str,
    ttl_seconds: int | None,
) -> types.CheckpointInfo:
    """Sends what is read of a folder: its weights and configuration.

    Raises:
        InvalidRequestError: it holds neither an adapter nor a model in safetensors.
        InvalidNameError, StorageError
        CheckpointCorruptError, CheckpointMismatchError, UnsupportedError, UnknownModelError,
        InvalidParamsError, QuotaExceededError, TooLargeError: see `Service.import_checkpoint`.
    """
    check_name(name)
    source = Path(await anyio.Path(folder).expanduser())
    names, import_id = await to_thread.run_sync(_files_of, source), uuid.uuid4().hex
    try:
        try:
            files = tuple([await _send(service, import_id, source / name) for name in names])
        except OSError as error:
            raise errors.StorageError(
                f"{source} cannot be read: {error.strerror or error}.",
                field="folder",
                hint="Check its permissions.",
            ) from error
        what = Import(files=files, base_model=base_model, name=name, ttl_seconds=ttl_seconds)
        return await service.import_checkpoint(import_id, what)
    except BaseException:
        with anyio.move_on_after(GIVE_UP_S, shield=True):
            await service.drop_import(import_id)
        raise


def _files_of(folder: Path) -> list[str]:
    """Those of an adapter if it has one, else those of a model."""
    if (folder / ADAPTER[0]).is_file():
        names = list(ADAPTER)
    elif (folder / INDEX).is_file():
        names = [CONFIG, INDEX, *_shards(folder / INDEX)]
    else:
        names = [CONFIG, WEIGHTS]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise errors.InvalidRequestError(
            f"{folder} has no {missing}.",
            field="folder",
            hint=f"Give an adapter's folder ({ADAPTER[0]}, {ADAPTER[1]}), or a model's with its "
            f"{CONFIG} and weights in safetensors.",
        )
    return names


def _shards(index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shards = [""]
    if not all(isinstance(name, str) and name == Path(name).name != "" for name in shards):
        raise errors.InvalidRequestError(
            f"{index} does not name the files beside it.",
            field="folder",
            hint="Save or download the model again.",
        )
    return shards


async def _send(service: Service, import_id: str, file: Path) -> ExportedFile:
    digest, offset = hashlib.sha256(), 0
    async with await anyio.open_file(file, "rb") as content:
        while (piece := await content.read(IMPORT_PIECE_BYTES)) or not offset:
            await service.put_import(import_id, file.name, piece, offset=offset)
            digest.update(piece)
            offset += len(piece)
            if not piece:
                break
    return ExportedFile(name=file.name, size_bytes=offset, sha256=digest.hexdigest())
