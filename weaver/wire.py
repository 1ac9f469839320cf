"""The binary message: a JSON header beside raw arrays; what travels over HTTP and lies in journals.

`encode` and `decode` are called by `HttpService`, by the HTTP front of the server and its journal.
A message is a `Value`, a sequence of them, or a mapping of bytes::

    offset  bytes
    0       4       b"WVR" and the version, 1
    4       4       H, length of the header, little-endian
    8       8       R, length of the arrays when decompressed, little-endian
    16      H       the header: UTF-8 JSON of the message, each array replaced by a reference
    16+H    rest    one zstd frame that holds exactly R bytes; absent when R is 0

A reference is `{"$tensor": [dtype, shape, offset]}` for a `TensorData`, `"$list"` for a list of
numbers (NaN stands for None) and `"$bytes"` for bytes, which only a mapping of bytes has; dtype is
one of `DTYPES`, little-endian, and offset counts bytes into the arrays. All references together
cover the R bytes exactly. A key of a message that begins with `$` is written with one `$` more.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard
from anyio import CapacityLimiter, to_thread
from pydantic import TypeAdapter
from pydantic_core import from_json

from weaver.errors import InvalidRequestError, TooLargeError
from weaver.fields import validate
from weaver.tensors import MAX_DIMENSIONS, Numbers, TensorData
from weaver.types import Value

T = TypeVar("T")
Message = Value | Sequence[Value] | Mapping[str, bytes]

MAGIC = b"WVR\x01"
PREFIX_BYTES = 16
DTYPES = {"u1": 1, "i4": 4, "i8": 8, "f4": 4, "f8": 8}
RATIO, RATIO_FREE_BYTES = 1024, 16 * 2**20
"""Arrays above the latter have at most so many bytes for each of their frame."""
PLAIN = frozenset({int, float, bool, type(None)})
LARGE_BYTES = 64 * 1024
"""Above this, a message is read and written beside the event loop; below, a thread takes longer."""
JSON_MARKS = {"[": 2**17, "{": 2**17, '"': 2**19, ",": 2**21}
"""What JSON may have of each. The interpreter stands still while it is parsed: 0.3 s at most."""
PORTION, PORTION_BYTES = 256, 16 * 2**20
"""The most that is put into one message, unless a single item takes more."""
PACKED_LENGTH = 16
"""Shorter lists of numbers stay in the header: a reference would be longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """What `decode` refuses to exceed, checked before anything is parsed or decompressed."""

    header_bytes: int = 32 * 2**20
    array_bytes: int = 512 * 2**20
    list_numbers: int | None = None
    """In lists, all together; each becomes a Python object."""
    trusted: bool = False
    """It was checked before, so that what it costs to read is known."""

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
    header, arrays = pack(message)
    frame = compress(arrays) if arrays else b""
    lengths = len(header).to_bytes(4, "little") + len(arrays).to_bytes(8, "little")
    return b"".join((MAGIC, lengths, header, frame))


def pack(message: object, *, canonical: bool = False) -> tuple[bytes, bytearray]:
    """The header and the arrays of a message, for `encode`, which says what it raises.

    If `canonical`, the order of a mapping's keys makes no difference.
    """
    arrays = bytearray()
    try:
        tree = _pack_files(message, arrays) or _pack(message, arrays, canonical)
        header = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return header.encode(), arrays
    except InvalidRequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"cannot be sent: {error}.", field="message", hint="Use plain JSON values in metadata."
        ) from None


def decode(data: bytes, adapter: TypeAdapter[T], *, limits: WireLimits = DEFAULT_LIMITS) -> T:
    """The message in `data`, validated as `adapter`'s type.

    Raises:
        TooLargeError: a length in its prefix is above the limits.
        InvalidRequestError: not a message, or damaged; subclasses: a field of it is invalid.
    """
    header_size, raw_size = _lengths(data, limits)
    body = memoryview(data)[PREFIX_BYTES:]
    header, frame = bytes(body[:header_size]), body[header_size:]
    if not limits.trusted:
        check_json(header)
        if raw_size > max(RATIO_FREE_BYTES, RATIO * len(frame)):
            raise _too_large(
                f"its arrays have {raw_size} bytes in {len(frame)}, the limit is {RATIO} in one.",
                hint="Send what weaver.wire encodes.",
            )
    try:
        tree = from_json(header, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(f"its header is not JSON: {error}") from None
    reader = _ArrayReader(decompress(frame, raw_size), limits.list_numbers)
    message = _unpack_files(tree, reader) or _unpack(tree, reader)
    if reader.used != raw_size:
        raise malformed(f"{raw_size - reader.used} bytes of its arrays belong to nothing")
    return validate(message, adapter.validate_python)


def check_json(data: bytes, *, share: int = 1) -> None:
    """Raises TooLargeError if it would take long to parse, and everything else stood still.

    `share` divides the limits, for what is handled on the event loop.
    """
    for mark, most in JSON_MARKS.items():
        limit = most // share
        if (count := data.count(mark.encode())) > limit:
            raise _too_large(
                f"its JSON has {count} times {mark!r}, the limit is {limit}.",
                hint="Send less at once, or arrays in place of lists.",
            )


def announced_bytes(data: bytes) -> int:
    """What `decode` would make of it, by its own word, which `decode` checks."""
    return len(data) + int.from_bytes(data[8:PREFIX_BYTES], "little")


def about_bytes(message: object) -> int:
    """Roughly how long `encode` makes it, without the work: to choose a thread, or to split."""
    if type(message) in PLAIN:
        return 8
    if isinstance(message, TensorData):
        return message.to_numpy().nbytes
    if isinstance(message, Value):
        return 16 + sum(about_bytes(getattr(message, name)) for name in type(message).model_fields)
    if isinstance(message, str):
        return len(message) if message.isascii() else 4 * len(message)
    if isinstance(message, bytes):
        return len(message)
    if isinstance(message, (tuple, list)):
        plain = message and type(message[0]) in PLAIN
        return 8 * len(message) if plain else sum(map(about_bytes, message))
    if isinstance(message, Mapping):
        return sum(map(about_bytes, (*message, *message.values())))
    return 8


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


async def beside(
    size_bytes: int, work: Callable[[], T], *, limiter: CapacityLimiter | None = None
) -> T:
    """What `work` on about so many bytes answers; large ones are left to a thread."""
    if size_bytes <= LARGE_BYTES:
        return work()
    return await to_thread.run_sync(work, limiter=limiter)


# --- writing ------------------------------------------------------------------------------------


def _pack_files(message: object, arrays: bytearray) -> Any:
    """The tree of a mapping of bytes; None of anything else."""
    if not isinstance(message, Mapping) or {type(value) for value in message.values()} != {bytes}:
        return None
    return {
        _escaped(key): _refer("$bytes", "u1", np.frombuffer(value, np.uint8), arrays)
        for key, value in message.items()
    }


def _pack(value: object, arrays: bytearray, canonical: bool) -> Any:
    if type(value) in PLAIN or isinstance(value, str):
        return value
    if isinstance(value, Value):
        return {n: _pack(getattr(value, n), arrays, canonical) for n in type(value).model_fields}
    if isinstance(value, TensorData):
        array = value.to_numpy()
        dtype = "f4" if array.dtype.kind == "f" else int_dtype(array)
        return _refer("$tensor", dtype, array, arrays)
    if isinstance(value, (tuple, list)):
        numbers = as_numbers(value) if len(value) >= PACKED_LENGTH else None
        if numbers is not None:
            return _refer("$list", *numbers, arrays)
        return [_pack(item, arrays, canonical) for item in value]
    if isinstance(value, Mapping):
        items = sorted(value.items()) if canonical else value.items()
        return {_escaped(key): _pack(item, arrays, canonical) for key, item in items}
    return value.isoformat() if isinstance(value, datetime) else value


def _escaped(key: object) -> str:
    if not isinstance(key, str):
        raise InvalidRequestError(
            f"has the key {key!r}.", field="message", hint="Keys of metadata must be strings."
        )
    return f"${key}" if key.startswith("$") else key


def _refer(kind: str, dtype: str, array: npt.NDArray[Any], arrays: bytearray) -> dict[str, Any]:
    """Puts an array behind the others, and answers the reference to it."""
    offset = len(arrays)
    arrays += array.astype(f"<{dtype}", copy=False).tobytes()
    return {kind: [dtype, list(array.shape), offset]}


def as_numbers(values: Sequence[Any]) -> tuple[str, npt.NDArray[Any]] | None:
    """A dtype and array that hold exactly these numbers; None if there is no such dtype."""
    kinds = set(map(type, values))
    if kinds == {int}:
        try:
            integers = np.array(values, np.int64)
        except OverflowError:
            return None
        return int_dtype(integers), integers
    if not kinds <= {float, type(None)}:
        return None
    wide = np.array(values, np.float64)
    if np.isfinite(wide).sum() != len(values) - values.count(None):
        return None
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32)
    return ("f4", narrow) if np.array_equal(narrow, wide, equal_nan=True) else ("f8", wide)


def int_dtype(array: npt.NDArray[Any]) -> str:
    fits = array.size == 0 or (-(2**31) <= int(array.min()) and int(array.max()) < 2**31)
    return "i4" if fits else "i8"


def compress(raw: bytearray) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1)
    frame = compressor.compress(raw)
    if len(raw) <= max(RATIO_FREE_BYTES, RATIO * len(frame)):
        return frame
    blocks, parts = compressor.compressobj(size=len(raw)), []
    for at in range(0, len(raw), 2048):  # a block of it takes 4 bytes at least
        parts.append(blocks.compress(raw[at : at + 2048]))
        parts.append(blocks.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join((*parts, blocks.flush()))


# --- reading ------------------------------------------------------------------------------------


def _lengths(data: bytes, limits: WireLimits) -> tuple[int, int]:
    if data[:3] == MAGIC[:3] and data[3:4] not in (b"", MAGIC[3:]):
        raise InvalidRequestError(
            f"is a Weaver message of version {data[3]}, and {MAGIC[3]} is read here.",
            field="message",
            hint="Install the same version of weaver on both sides.",
        )
    if data[:4] != MAGIC or len(data) < PREFIX_BYTES:
        raise malformed("it does not begin as one")
    header_size = int.from_bytes(data[4:8], "little")
    raw_size = int.from_bytes(data[8:16], "little")
    for what, size, limit in (
        ("header", header_size, limits.header_bytes),
        ("arrays", raw_size, limits.array_bytes),
        ("message", len(data), limits.message_bytes),
    ):
        if size > limit:
            raise _too_large(f"its {what} have {size} bytes, the limit is {limit}.")
    if PREFIX_BYTES + header_size > len(data):
        raise malformed("it ends inside its header")
    return header_size, raw_size


def _unpack_files(tree: Any, arrays: _ArrayReader) -> object:
    """A mapping of bytes; None if it is something else."""
    if not isinstance(tree, dict) or not all(
        isinstance(value, dict) and value.keys() == {"$bytes"} for value in tree.values()
    ):
        return None
    return {_unescaped(key): arrays.take("$bytes", v["$bytes"]) for key, v in tree.items()}


def _unpack(node: Any, arrays: _ArrayReader) -> object:
    if isinstance(node, list):
        return [_unpack(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        [(key, reference)] = node.items()
        if key == "$bytes":
            raise malformed("it has bytes where none belong")
        if key in ("$tensor", "$list"):
            return arrays.take(key, reference)
    return {_unescaped(key): _unpack(item, arrays) for key, item in node.items()}


def _unescaped(key: str) -> str:
    if key.startswith("$") and not key.startswith("$$"):
        raise malformed(f"it has the reserved key {key[:80]!r}")
    return key.removeprefix("$")


class _ArrayReader:
    """Hands out the arrays of one message, checked first; together never more than its bytes."""

    def __init__(self, raw: memoryview, list_numbers: int | None) -> None:
        self.raw = raw
        self.used = 0
        self._list_numbers = math.inf if list_numbers is None else list_numbers

    def take(self, kind: str, reference: object) -> object:
        match reference:
            case [str(dtype), list(shape), int(offset)] if (
                dtype in DTYPES and len(shape) <= MAX_DIMENSIONS
            ):
                pass
            case _:
                raise malformed(f"it has the reference {reprlib.repr(reference)}")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
            raise malformed(f"it has an array of shape {reprlib.repr(shape)}")
        size = math.prod(shape) * DTYPES[dtype]
        self.used += size
        if not 0 <= offset <= offset + size <= len(self.raw) or self.used > len(self.raw):
            raise malformed("a reference points outside its arrays")
        if (kind == "$bytes") != (dtype == "u1") or (kind != "$tensor" and len(shape) != 1):
            raise malformed(f"it has a {kind} of dtype {dtype} and {len(shape)} dimensions")
        try:
            array = np.frombuffer(self.raw[offset : offset + size], f"<{dtype}").reshape(shape)
        except (ValueError, OverflowError):  # empty, with dimensions longer than numpy has
            raise malformed(f"it has an array of shape {reprlib.repr(shape)}") from None
        if kind == "$tensor":
            return TensorData(array)
        if kind == "$bytes":
            return array.tobytes()
        self._list_numbers -= len(array)
        if self._list_numbers < 0:
            raise _too_large("its lists have too many numbers.")
        return Numbers(array)


def decompress(frame: memoryview, raw_size: int) -> memoryview:
    """Exactly `raw_size` bytes, which the frame must announce: nothing else is ever allocated."""
    if raw_size == 0 and len(frame) == 0:
        return memoryview(b"")
    try:
        if zstandard.get_frame_parameters(frame).content_size != raw_size:
            raise malformed("its arrays have another length than it says")
        raw = zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=raw_size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise malformed(f"its arrays cannot be decompressed: {error}") from None
    return memoryview(raw)


def malformed(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"is not a Weaver message: {why}.", field="message", hint="Send what weaver.wire encodes."
    )


def _too_large(what: str, *, hint: str = "Send less at once.") -> TooLargeError:
    return TooLargeError(what, field="message", hint=hint)
