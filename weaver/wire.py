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
numbers (NaN stands for None) and `"$bytes"` for bytes, which only a mapping of bytes has; dtype is
one of `DTYPES`, little-endian, and offset counts bytes into the arrays. All references together
cover the R bytes exactly. A key of a message that itself
begins with `$` is written with one `$` more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from anyio import to_thread
from pydantic import ValidationError
from pydantic_core import from_json

from weaver.errors import InvalidRequestError, TooLargeError
from weaver.tensors import TensorData
from weaver.types import Value
from weaver.wire_arrays import (
    RATIO,
    RATIO_FREE_BYTES,
    ArrayReader,
    ArrayWriter,
    as_numbers,
    compress,
    decompress,
    int_dtype,
    malformed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from anyio import CapacityLimiter
    from pydantic import TypeAdapter

T = TypeVar("T")
Message = Value | Sequence[Value] | Mapping[str, bytes]

MAGIC = b"WVR\x01"
PREFIX_BYTES = 16
PLAIN = frozenset({int, float, bool, type(None)})
REFERENCES = ("$tensor", "$list")
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
    arrays = ArrayWriter()
    try:
        tree = _pack_files(message, arrays) or _pack(message, arrays)
        header = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        header_bytes = header.encode()
    except InvalidRequestError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"cannot be sent: {error}.", field="message", hint="Use plain JSON values in metadata."
        ) from None
    raw = b"".join(arrays.parts)
    frame = compress(raw) if raw else b""
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
    header, frame = bytes(body[:header_size]), body[header_size:]
    if not limits.trusted:
        check_json(header)
        if raw_size > max(RATIO_FREE_BYTES, RATIO * len(frame)):
            raise TooLargeError(
                f"its arrays have {raw_size} bytes in {len(frame)}, the limit is {RATIO} in one.",
                field="message",
                hint="Send what weaver.wire encodes.",
            )
    try:
        tree = from_json(header, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(f"its header is not JSON: {error}") from None
    reader = ArrayReader(decompress(frame, raw_size), limits.list_numbers)
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
            raise TooLargeError(
                f"its JSON has {count} times {mark!r}, the limit is {limit}.",
                field="message",
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
    field = ".".join(str(part)[:80] for part in problem["loc"]) or name
    return InvalidRequestError(f"{problem['msg'][:500]}.", field=field)


# --- writing ------------------------------------------------------------------------------------


def _pack_files(message: object, arrays: ArrayWriter) -> Any:
    """Of a mapping of bytes; None of anything else."""
    if not isinstance(message, Mapping) or {type(value) for value in message.values()} != {bytes}:
        return None
    return {
        _escaped(key): arrays.add("$bytes", "u1", np.frombuffer(value, np.uint8))
        for key, value in message.items()
    }


def _pack(value: object, arrays: ArrayWriter) -> Any:
    if type(value) in PLAIN or isinstance(value, str):
        return value
    if isinstance(value, Value):
        return {name: _pack(getattr(value, name), arrays) for name in type(value).model_fields}
    if isinstance(value, TensorData):
        array = value.to_numpy()
        return arrays.add("$tensor", "f4" if array.dtype.kind == "f" else int_dtype(array), array)
    if isinstance(value, (tuple, list)):
        numbers = as_numbers(value) if len(value) >= PACKED_LENGTH else None
        if numbers is not None:
            return arrays.add("$list", *numbers)
        return [_pack(item, arrays) for item in value]
    if isinstance(value, Mapping):
        return {_escaped(key): _pack(item, arrays) for key, item in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value


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
        raise malformed("it does not begin as one")
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
        raise malformed("it ends inside its header")
    return header_size, raw_size


def _unpack_files(tree: Any, arrays: ArrayReader) -> object:
    """A mapping of bytes; None if it is something else."""
    if not isinstance(tree, dict) or not all(
        isinstance(value, dict) and value.keys() == {"$bytes"} for value in tree.values()
    ):
        return None
    return {_unescaped(key): arrays.take("$bytes", v["$bytes"]) for key, v in tree.items()}


def _unpack(node: Any, arrays: ArrayReader) -> object:
    if isinstance(node, list):
        return [_unpack(item, arrays) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        [(key, reference)] = node.items()
        if key == "$bytes":
            raise malformed("it has bytes where none belong")
        if key in REFERENCES:
            return arrays.take(key, reference)
    return {_unescaped(key): _unpack(item, arrays) for key, item in node.items()}


def _unescaped(key: str) -> str:
    if not key.startswith("$"):
        return key
    if not key.startswith("$$"):
        raise malformed(f"it has the reserved key {key[:80]!r}")
    return key[1:]
