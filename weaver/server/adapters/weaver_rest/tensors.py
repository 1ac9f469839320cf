"""How bodies of the Weaver REST interface are read: JSON, or a manifest beside raw tensors.

The latter is `http-binary`, multipart/form-data of `manifest` (JSON) and `tensor_pack` (bytes)::

    {"version": 1, "request": {...},
     "tensor_pack": {"size_bytes", "sha256", "codec": "raw"|"zstd", "decoded_size_bytes"}}

In `request` a tensor is `{"$tensor": {"dtype", "shape", "offset", "size_bytes", ...}}`, its offset
counted in the decoded pack. Nothing is allocated beyond what the limit allows.
"""

from __future__ import annotations

import hashlib
import io
import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import numpy as np
import zstandard
from pydantic import Field

from weaver import errors, wire
from weaver.fields import validate
from weaver.server.http.body import Body as JsonBody
from weaver.server.http.body import json_of
from weaver.tensors import MAX_DIMENSIONS

if TYPE_CHECKING:
    import numpy.typing as npt
    from fastapi import Request

    from weaver.server.http.gateway import Gateway

B = TypeVar("B", bound="Body")
DECODED_BYTES = 512 * 2**20
MULTIPART = "multipart/form-data"


class Body(JsonBody):
    """Part of a request, in either form."""

    @classmethod
    async def read(cls, request: Request) -> Self:
        """The request's body as this, with its tensors as numpy arrays; a dependency of routes.

        Raises:
            InvalidRequestError: it is not what it should be, with the field at fault.
            TooLargeError: its tensors have more than `DECODED_BYTES`.
        """
        gateway: Gateway = request.state.gateway
        data = await request.body()
        media_type = request.headers.get("Content-Type", "")
        announced = len(data) if not media_type.startswith(MULTIPART) else DECODED_BYTES
        async with gateway.read(announced, partial(parse, data, media_type, cls)) as body:
            return body


Dimension = Annotated[int, Field(ge=0, lt=2**63)]


class PackInfo(Body):
    size_bytes: int = Field(ge=0)
    sha256: str
    codec: Literal["raw", "zstd"] = "raw"
    decoded_size_bytes: int = Field(ge=0)


class Manifest(Body):
    version: Literal[1]
    request: Any
    tensor_pack: PackInfo


class Reference(Body):
    format: Literal["raw-tensor"] = "raw-tensor"
    codec: Literal["raw"] = "raw"
    dtype: Literal["int64", "int32", "float32", "float64"]
    shape: tuple[Dimension, ...] = Field(max_length=MAX_DIMENSIONS, fail_fast=True)
    offset: int = Field(ge=0)
    size_bytes: int = Field(ge=0)


def parse(data: bytes, media_type: str, kind: type[B]) -> B:
    """See `Body.read`."""
    if not media_type.startswith(MULTIPART):
        return validate(json_of(data or b"{}"), kind.model_validate, name="body")
    head, pack = _parts(data, media_type)
    manifest = validate(json_of(head), Manifest.model_validate, name="manifest")
    request = _filled(manifest.request, _unpacked(pack, manifest.tensor_pack))
    return validate(request, kind.model_validate, name="request")


def _parts(data: bytes, media_type: str) -> tuple[bytes, memoryview]:
    """The bodies of the two parts, the second without a copy."""
    boundary = media_type.partition("boundary=")[2].strip('"').encode()
    mark = b"--" + boundary
    first = data.find(b"\r\n\r\n")
    second = data.find(b"\r\n" + mark, first)
    body = data.find(b"\r\n\r\n", second)
    end = data.rfind(b"\r\n" + mark)
    named = b'name="manifest"' in data[:first], b'name="tensor_pack"' in data[second:body]
    if not boundary or not 0 < first < second < body < end or named != (True, True):
        raise errors.InvalidRequestError(
            "is not a manifest followed by a tensor_pack.",
            field="body",
            hint="Send two parts of multipart/form-data, in this order.",
        )
    return data[first + 4 : second], memoryview(data)[body + 4 : end]


def _unpacked(pack: memoryview, info: PackInfo) -> memoryview:
    size = info.decoded_size_bytes
    limit = min(DECODED_BYTES, max(wire.RATIO_FREE_BYTES, wire.RATIO * len(pack)))
    if size > limit:
        raise errors.TooLargeError(
            f"has {size} bytes when decoded, the limit is {limit}.",
            field="tensor_pack",
            hint="Send fewer datums at once.",
        )
    if len(pack) != info.size_bytes or hashlib.sha256(pack).hexdigest() != info.sha256:
        raise errors.InvalidRequestError(
            "is not what its size_bytes and sha256 say.", field="tensor_pack", hint="Send it again."
        )
    if info.codec == "zstd":
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(pack))
            pack = memoryview(reader.read(size + 1))
        except zstandard.ZstdError as error:
            raise errors.InvalidRequestError(
                f"is not zstd: {error}.", field="tensor_pack"
            ) from None
    if len(pack) != size:
        raise errors.InvalidRequestError(
            f"does not have the {size} bytes of decoded_size_bytes.", field="tensor_pack"
        )
    return pack


def _filled(node: Any, pack: memoryview) -> Any:
    """The tree with each reference replaced by its array."""
    if isinstance(node, list):
        return [_filled(item, pack) for item in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        reference = validate(node["$tensor"], Reference.model_validate, name="$tensor")
        return _array(reference, pack)
    return {key: _filled(value, pack) for key, value in node.items()}


def _array(reference: Reference, pack: memoryview) -> npt.NDArray[Any]:
    dtype = np.dtype(reference.dtype).newbyteorder("<")
    start, end = reference.offset, reference.offset + reference.size_bytes
    shape = reference.shape
    if math.prod(shape) * dtype.itemsize != reference.size_bytes or end > len(pack):
        raise errors.InvalidRequestError(
            f"has a tensor of shape {list(shape)} at {start} that is not in its pack.",
            field="tensor_pack",
        )
    return np.frombuffer(pack[start:end], dtype).reshape(shape)
