"""The arrays of one binary message, on their way out and in; `weaver.wire` puts them into it.

All sizes and counts that a message announces are checked before anything is made of them.
"""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from weaver.errors import InvalidRequestError, TooLargeError
from weaver.tensors import MAX_DIMENSIONS, Numbers, TensorData

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

DTYPES = {"u1": 1, "i4": 4, "i8": 8, "f4": 4, "f8": 8}
RATIO, RATIO_FREE_BYTES = 1024, 16 * 2**20
"""Arrays above the latter have at most so many bytes for each of their frame."""
BLOCK_BYTES = 2048
"""Of arrays that would be compressed by more than that: a block takes 4 bytes at least."""


class ArrayWriter:
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


class ArrayReader:
    """Hands out the arrays of one message; together never more than its bytes."""

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
            raise TooLargeError(
                "its lists have too many numbers.", field="message", hint="Send less at once."
            )
        return Numbers(array)


def compress(raw: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1)
    frame = compressor.compress(raw)
    if len(raw) <= max(RATIO_FREE_BYTES, RATIO * len(frame)):
        return frame
    blocks, parts = compressor.compressobj(size=len(raw)), []
    for at in range(0, len(raw), BLOCK_BYTES):
        parts.append(blocks.compress(raw[at : at + BLOCK_BYTES]))
        parts.append(blocks.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join((*parts, blocks.flush()))


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


def malformed(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"is not a Weaver message: {why}.", field="message", hint="Send what weaver.wire encodes."
    )
