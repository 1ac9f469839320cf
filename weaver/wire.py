"""The binary message: a JSON header beside raw arrays; what travels over HTTP and lies in journals.

`encode` and `decode` are called by `HttpService`, by the HTTP front of the server and by its store.
A message is a `Value`, a sequence of them, or a mapping of bytes::

    offset  bytes
    0       4       b"WVR" and the version, 1
    4       4       H, length of the header, little-endian
    8       8       R, length of the arrays when decompressed, little-endian
    16      H       the header: UTF-8 JSON of the message, each array replaced by a reference
    16+H    rest    one zstd frame that holds exactly R bytes; absent when R is 0

A reference is `{"$tensor": [dtype, shape, offset]}` for a `TensorData`, `"$list"` for a list of
numbers (NaN stands for None) and `"$bytes"` for bytes; dtype is one of `DTYPES`, little-endian, and
offset counts bytes into the arrays. All references together cover the R bytes exactly. A key of a
message that itself begins with `$` is written with one `$` more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import zstandard
from anyio import to_thread
from pydantic import ValidationError
from pydantic_core import from_json

from weaver.errors import InvalidRequestError, TooLargeError
from weaver.tensors import TensorData
from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt
    from pydantic import TypeAdapter

T = TypeVar("T")
Message = Value | Sequence[Value] | Mapping[str, bytes]

MAGIC = b"WVR\x01"
PREFIX_BYTES = 16
DTYPES = {"u1": 1, "i4": 4, "i8": 8, "f4": 4, "f8": 8}
PLAIN = frozenset({int, float, bool, type(None)})
REFERENCES = ("$tensor", "$list", "$bytes")
LARGE_BYTES = 64 * 1024
"""Above this, a message is read and written beside the event loop; below, a thread takes longer."""
PORTION, PORTION_BYTES = 256, 16 * 2**20
"""The most that is put into one message, unless a single item takes more."""
PACKED_LENGTH = 16
"""Shorter lists of numbers stay in the header: a reference would be longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """What `decode` refuses to exceed, checked before anything is parsed or decompressed."""

    header_bytes: int = 32 * 2**20
    array_bytes: int = 512 * 2**20

    @property
    def message_bytes(self) -> int:
        """The longest message that can be within both; zstd adds at most 1/256."""
        return PREFIX_BYTES + self.header_bytes + self.array_bytes + self.array_bytes // 256 + 64


DEFAULT_LIMITS = WireLimits()


def encode(message: Message) -> bytes:
    """The message in its binary form.

    Raises:
        InvalidRequestError: free-form data (`user_metadata`) that JSON cannot hold.
    """
    arrays = _Writer()
    try:
        tree = _pack(message, arrays)
        header = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        header_bytes = header.encode()
    except InvalidRequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"cannot be sent: {error}.", field="message", hint="Use plain JSON values in metadata."
        ) from None
    raw = b"".join(arrays.parts)
    frame = zstandard.ZstdCompressor(level=1).compress(raw) if raw else b""
    lengths = len(header_bytes).to_bytes(4, "little") + len(raw).to_bytes(8, "little")
    return b"".join((MAGIC, lengths, header_bytes, frame))


def decode(data: bytes, adapter: TypeAdapter[T], *, limits: WireLimits = DEFAULT_LIMITS) -> T:
    """The message in `data`, validated as `adapter`'s type.

    Raises:
        TooLargeError: a length in its prefix is above the limits.
        InvalidRequestError: not a message, or damaged; subclasses: a field of it is invalid.
    """
    header_size, raw_size = _lengths(data, limits)
    body = memoryview(data)[PREFIX_BYTES:]
    try:
        tree = from_json(bytes(body[:header_size]), allow_inf_nan=False)
    except ValueError as error:
        raise _malformed(f"its header is not JSON: {error}") from None
    reader = _Reader(_decompress(body[header_size:], raw_size))
    message = _unpack(tree, reader)
    if reader.used != raw_size:
        raise _malformed(f"{raw_size - reader.used} bytes of its arrays belong to nothing")
    return validate(message, adapter.validate_python)


def about_bytes(message: object) -> int:
    """Roughly how long `encode` makes it, without the work: to choose a thread, or to split."""
    if type(message) in PLAIN:
        return 8
    if isinstance(message, TensorData):
        return message.to_numpy().nbytes
    if isinstance(message, Value):
        return 16 + sum(about_bytes(getattr(message, name)) for name in type(message).model_fields)
    if isinstance(message, (str, bytes)):
        return len(message)
    if isinstance(message, (tuple, list)):
        plain = message and type(message[0]) in PLAIN
        return 8 * len(message) if plain else sum(map(about_bytes, message))
    return sum(map(about_bytes, message.values())) if isinstance(message, Mapping) else 8


def portions(items: Iterable[T], size: Callable[[T], int] = about_bytes) -> Iterator[list[T]]:
    """Messages of moderate size and number; what is larger has one of its own."""
    portion: list[T] = []
    total = 0
    for item in items:
        bytes_ = size(item)
        if portion and (total + bytes_ > PORTION_BYTES or len(portion) == PORTION):
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += bytes_
    if portion:
        yield portion


async def beside(size_bytes: int, work: Callable[[], T]) -> T:
    """What `work` on about so many bytes answers; large ones are left to a thread."""
    return await to_thread.run_sync(work) if size_bytes > LARGE_BYTES else work()


def validate(message: object, read: Callable[[object], T], *, name: str = "message") -> T:
    """What pydantic's `read` makes of it; the first problem is raised as an `InvalidRequestError`.

    `name` is what the error calls the message as a whole.
    """
    try:
        return read(message)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)[0], name=name) from None


def refusal(problem: Mapping[str, Any], *, name: str = "message") -> InvalidRequestError:
    """One of the problems that pydantic found; it may have been an error of ours at first."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):
        return cause
    field = ".".join(str(part) for part in problem["loc"]) or name
    return InvalidRequestError(f"{problem['msg']}.", field=field)


# --- writing ------------------------------------------------------------------------------------


class _Writer:
    """Collects the arrays of one message."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, kind: str, dtype: str, array: npt.NDArray[Any]) -> dict[str, Any]:
        part = array.astype(f"<{dtype}", copy=False).tobytes()
        reference = {kind: [dtype, list(array.shape), self.size]}
        self.parts.append(part)
        self.size += len(part)
        return reference


def _pack(value: object, arrays: _Writer) -> Any:
    if type(value) in PLAIN or isinstance(value, str):
        return value
    if isinstance(value, Value):
        return {name: _pack(getattr(value, name), arrays) for name in type(value).model_fields}
    if isinstance(value, TensorData):
        array = value.to_numpy()
        return arrays.add("$tensor", "f4" if array.dtype.kind == "f" else _int_dtype(array), array)
    if isinstance(value, bytes):
        return arrays.add("$bytes", "u1", np.frombuffer(value, np.uint8))
    if isinstance(value, (tuple, list)):
        numbers = _as_numbers(value) if len(value) >= PACKED_LENGTH else None
        if numbers is not None:
            return arrays.add("$list", *numbers)
        return [_pack(item, arrays) for item in value]
    if isinstance(value, Mapping):
        return {_escaped(key): _pack(item, arrays) for key, item in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value


def _as_numbers(values: Sequence[Any]) -> tuple[str, npt.NDArray[Any]] | None:
    """A dtype and array that hold exactly these numbers; None if there is no such dtype."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            integers = np.array(values, np.int64)
        except OverflowError:
            return None
        return _int_dtype(integers), integers
    if not kinds <= {float, type(None)}:
        return None
    wide = np.array(values, np.float64)
    if np.isfinite(wide).sum() != len(values) - values.count(None):
        return None
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32)
    return ("f4", narrow) if np.array_equal(narrow, wide, equal_nan=True) else ("f8", wide)


def _int_dtype(array: npt.NDArray[Any]) -> str:
    fits = array.size == 0 or (-(2**31) <= int(array.min()) and int(array.max()) < 2**31)
    return "i4" if fits else "i8"


def _escaped(key: object) -> str:
    if not isinstance(key, str):
        raise InvalidRequestError(
            f"has the key {key!r}.", field="message", hint="Keys of metadata must be strings."
        )
    return f"${key}" if key.startswith("$") else key


# --- reading ------------------------------------------------------------------------------------


def _lengths(data: bytes, limits: WireLimits) -> tuple[int, int]:
    if data[:3] == MAGIC[:3] and data[3:4] not in (b"", MAGIC[3:]):
        raise InvalidRequestError(
            f"is a Weaver message of version {data[3]}, and {MAGIC[3]} is read here.",
            field="message",
            hint="Install the same version of weaver on both sides.",
        )
    if data[:4] != MAGIC or len(data) < PREFIX_BYTES:
        raise _malformed("it does not begin as one")
    header_size = int.from_bytes(data[4:8], "little")
    raw_size = int.from_bytes(data[8:16], "little")
    for what, size, limit in (
        ("header", header_size, limits.header_bytes),
        ("arrays", raw_size, limits.array_bytes),
        ("message", len(data), limits.message_bytes),
    ):
        if size > limit:
            raise TooLargeError(
                f"its {what} have {size} bytes, the limit is {limit}.",
                field="message",
                hint="Send less at once.",
            )
    if PREFIX_BYTES + header_size > len(data):
        raise _malformed("it ends inside its header")
    return header_size, raw_size


def _decompress(frame: memoryview, raw_size: int) -> memoryview:
    """Exactly `raw_size` bytes, which the frame must announce: nothing else is ever allocated."""
    if raw_size == 0 and len(frame) == 0:
        return memoryview(b"")
    try:
        if zstandard.get_frame_parameters(frame).content_size != raw_size:
            raise _malformed("its arrays have another length than it says")
        raw = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=raw_size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise _malformed(f"its arrays cannot be decompressed: {error}") from None
    return memoryview(raw)


class _Reader:
    """Hands out the arrays of one message; together never more than its bytes."""

    def __init__(self, raw: memoryview) -> None:
        self.raw = raw
        self.used = 0

    def take(self, kind: str, reference: object) -> object:
        match reference:
            case [str(dtype), list(shape), int(offset)] if dtype in DTYPES:
                pass
            case _:
                raise _malformed(f"it has the reference {str(reference)[:80]}")
        if any(type(n) is not int or n < 0 for n in shape):
            raise _malformed(f"it has an array of shape {str(shape)[:80]}")
        size = math.prod(shape) * DTYPES[dtype]
        self.used += size
        if not 0 <= offset <= offset + size <= len(self.raw) or self.used > len(self.raw):
            raise _malformed("a reference points outside its arrays")
        try:
            array = np.frombuffer(self.raw[offset : offset + size], f"<{dtype}").reshape(shape)
        except (ValueError, OverflowError):  # more dimensions, or longer ones, than numpy has
            raise _malformed(f"it has an array of shape {str(shape)[:80]}") from None
        if (kind == "$bytes") != (dtype == "u1") or (kind != "$tensor" and array.ndim != 1):
            raise _malformed(f"it has a {kind} of dtype {dtype} and {array.ndim} dimensions")
        if kind == "$tensor":
            return TensorData(array)
        if kind == "$bytes":
            return array.tobytes()
        values = array.tolist()
        return [None if x != x else x for x in values] if dtype in ("f4", "f8") else values


def _unpack(node: Any, arrays: _Reader) -> object:
    if isinstance(node, list):
        return [_unpack(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        [(key, reference)] = node.items()
        if key in REFERENCES:
            return arrays.take(key, reference)
    return {_unescaped(key): _unpack(item, arrays) for key, item in node.items()}


def _unescaped(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise _malformed(f"it has the reserved key {key[:80]!r}")
    return key[1:]


def _malformed(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"is not a Weaver message: {why}.", field="message", hint="Send what weaver.wire encodes."
    )
