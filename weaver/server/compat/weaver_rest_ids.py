"""Ids and paths of the Weaver REST interface, computed from native ones so that none is stored.

| there                                | here                                        |
|--------------------------------------|---------------------------------------------|
| weaver://<model>/checkpoints/<name>  | weaver://<run>/weights/<name>               |
| weaver://<model>/sampler/<name>      | the same                                    |
| a checkpoint's or artifact's UUID    | UUID 5 of its path                          |
| a sampling session's id              | the sampler's id in base64url               |
"""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import TYPE_CHECKING

from weaver.errors import CheckpointNotFoundError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeVar

    from weaver.protocol import Service
    from weaver.types import CheckpointInfo

    T = TypeVar("T")

PREFIX = "/api/v1"
"""With which the paths of the interface begin."""


def native_path(path: str) -> str:
    return path.replace("/checkpoints/", "/weights/", 1)


def rest_path(path: str) -> str:
    return path.replace("/weights/", "/checkpoints/", 1)


def uuid_of(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path))


def session_of(sampler_id: str) -> str:
    return base64.urlsafe_b64encode(sampler_id.encode()).decode().rstrip("=")


def sampler_of(sampling_session: str) -> str:
    """Raises NotFoundError."""
    padded = sampling_session + "=" * (-len(sampling_session) % 4)
    try:
        return base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise NotFoundError(
            f"no sampling session is called {sampling_session[:80]!r}.", field="sampling_session"
        ) from None


async def find_checkpoint(service: Service, reference: str) -> CheckpointInfo:
    """By its path of either form, or by its id.

    Raises:
        CheckpointNotFoundError
    """
    if "://" in reference:
        return await service.get_checkpoint(native_path(reference))
    return by_id(identified(await service.list_checkpoints()), reference)


def identified(checkpoints: Sequence[CheckpointInfo]) -> dict[str, CheckpointInfo]:
    return {uuid_of(info.path): info for info in checkpoints}


def by_id(known: Mapping[str, T], wanted: str) -> T:
    """Raises CheckpointNotFoundError."""
    if wanted not in known:
        raise CheckpointNotFoundError(
            f"no checkpoint or artifact has the id {wanted[:80]!r}.",
            field="id",
            hint="GET /models/{model_id}/checkpoints lists them.",
        )
    return known[wanted]
