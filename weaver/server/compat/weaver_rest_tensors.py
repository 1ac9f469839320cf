"""Bodies of the Weaver REST interface: JSON, or `http-binary`: a manifest beside raw tensors.

The latter is multipart/form-data of two parts, `manifest` (JSON) and `tensor_pack` (bytes)::

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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from weaver import wire
from weaver.errors import InvalidRequestError, TooLargeError
from weaver.types import EncodedTextChunk, ModelInput

if TYPE_CHECKING:
    from typing import TypeVar

    import numpy.typing as npt
    from starlette.requests import Request

    B = TypeVar("B", bound="Body")

DECODED_BYTES = 512 * 2**20
DTYPES = {"int64": "<i8", "int32": "<i4", "float32": "<f4", "float64": "<f8"}


class Body(BaseModel):
    """Part of a request; fields that it does not name are ignored, as clients may be newer."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())


TtlSeconds = Annotated[int | None, Field(ge=1, le=2**31)]


class Chunk(Body):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: Any


class Prompt(Body):
    chunks: tuple[Chunk, ...]

    def to_model_input(self) -> ModelInput:
        return ModelInput(chunks=tuple(EncodedTextChunk(tokens=c.tokens) for c in self.chunks))


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
    shape: tuple[int, ...] = Field(max_length=8)
    offset: int = Field(ge=0)
    size_bytes: int = Field(ge=0)


async def read_body(request: Request, kind: type[B]) -> B:
    """The request's body as a `kind`, with its tensors as numpy arrays.

    Raises:
        InvalidRequestError: it is not what it should be, with the field at fault.
        TooLargeError: its tensors have more than `DECODED_BYTES`.
    """
    data = await request.body()
    media_type = request.headers.get("Content-Type", "")
    return await wire.beside(len(data), partial(parse, data, media_type, kind))


def parse(data: bytes, media_type: str, kind: type[B]) -> B:
    """See `read_body`."""
    if not media_type.startswith("multipart/form-data"):
        return as_body(kind, _json(data or b"{}"))
    head, pack = _parts(data, media_type)
    manifest = as_body(Manifest, _json(head))
    return as_body(kind, _filled(manifest.request, _unpacked(pack, manifest.tensor_pack)))


def as_body(kind: type[B], tree: object) -> B:
    """Raises InvalidRequestError with the first field at fault."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        raise cause
    field = ".".join(str(part) for part in problem["loc"]) or "body"
    raise InvalidRequestError(f"{problem['msg']}.", field=field)


def _json(data: bytes) -> Any:
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"is not JSON: {error}.", field="body") from None


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
        raise InvalidRequestError(
            "is not a manifest followed by a tensor_pack.",
            field="body",
            hint="Send two parts of multipart/form-data, in this order.",
        )
    return data[first + 4 : second], memoryview(data)[body + 4 : end]


def _unpacked(pack: memoryview, info: PackInfo) -> memoryview:
    size = info.decoded_size_bytes
    if size > DECODED_BYTES:
        raise TooLargeError(
            f"has {size} bytes when decoded, the limit is {DECODED_BYTES}.",
            field="tensor_pack",
            hint="Send fewer datums at once.",
        )
    if len(pack) != info.size_bytes or hashlib.sha256(pack).hexdigest() != info.sha256:
        raise InvalidRequestError(
            "is not what its size_bytes and sha256 say.", field="tensor_pack", hint="Send it again."
        )
    if info.codec == "zstd":
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(pack))
            pack = memoryview(reader.read(size + 1))
        except zstandard.ZstdError as error:
            raise InvalidRequestError(f"is not zstd: {error}.", field="tensor_pack") from None
    if len(pack) != size:
        raise InvalidRequestError(
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
        return _array(as_body(Reference, node["$tensor"]), pack)
    return {key: _filled(value, pack) for key, value in node.items()}


def _array(reference: Reference, pack: memoryview) -> npt.NDArray[Any]:
    dtype = np.dtype(DTYPES[reference.dtype])
    start, end = reference.offset, reference.offset + reference.size_bytes
    shape = reference.shape
    if (
        min(shape, default=0) < 0
        or math.prod(shape) * dtype.itemsize != reference.size_bytes
        or end > len(pack)
    ):
        raise InvalidRequestError(
            f"has a tensor of shape {list(shape)} at {start} that is not in its pack.",
            field="tensor_pack",
        )
    return np.frombuffer(pack[start:end], dtype).reshape(shape)
