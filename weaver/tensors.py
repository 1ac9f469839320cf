"""`TensorData`: the one array value of Weaver; a read-only numpy array with a short dtype name.

Datums and results carry it. It accepts torch tensors, numpy arrays and (nested) lists, and torch
itself is never imported here: a tensor is recognised by what it can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from weaver.errors import InvalidDatumError
from weaver.keywords import suggesting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

DTYPES: tuple[str, ...] = ("int64", "float32")
MAX_DIMENSIONS = 8
"""What an array that comes in a message may have; no operation has more."""


class Numbers:
    """A list of numbers of a message, float or int [N], before the type of its field is known.

    Python objects take ten times the memory, so only fields that are lists of numbers make them.
    """

    __slots__ = ("array",)

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def tolist(self) -> list[Any]:
        """NaN stands for None."""
        values: list[Any] = self.array.tolist()
        return [None if x != x else x for x in values] if self.array.dtype.kind == "f" else values


@suggesting
class TensorData:
    """An immutable array of dtype int64 or float32 and any shape.

    Integer input becomes int64 and floating input (bf16 and fp64 included) becomes float32, unless
    `dtype` says otherwise. Reads as an array (`np.asarray(x)`, `len`, indexing, iteration) and as
    the mapping `{"data", "dtype", "shape"}`.

    Raises:
        InvalidDatumError: not numbers, ragged, complex, boolean, or floats where int64 is asked.
    """

    __slots__ = ("_array",)

    def __init__(self, data: object, *, dtype: str | None = None, field: str = "data") -> None:
        self._array = _as_array(data, dtype, field)
        self._array.flags.writeable = False

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    @property
    def data(self) -> list[Any]:
        return self.tolist()

    @property
    def dtype(self) -> str:
        return str(self._array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def to_numpy(self) -> npt.NDArray[Any]:
        """The array itself, read-only, without a copy."""
        return self._array

    def to_torch(self) -> torch.Tensor:
        """A torch tensor with a copy of the data."""
        import torch

        return torch.from_numpy(self._array.copy())

    def tolist(self) -> list[Any]:
        values: list[Any] = self._array.tolist()
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._array, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            if key in ("data", "dtype", "shape"):
                return getattr(self, key)
            raise KeyError(key)
        value = self._array[key]
        return value.item() if isinstance(value, np.generic) else value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        mine, its = self._array, other._array
        return mine.dtype == its.dtype and np.array_equal(
            mine, its, equal_nan=mine.dtype.kind == "f"
        )

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype}, shape={list(self.shape)})"


def as_token_ids(tokens: object) -> tuple[int, ...]:
    """Token ids from a list, numpy array or torch tensor of shape [T].

    Raises:
        InvalidDatumError: not one-dimensional, not integers, or negative.
    """
    if isinstance(tokens, (list, tuple)) and all(type(t) is int for t in tokens):
        ids = tuple(tokens)
    else:
        array = TensorData(tokens, dtype="int64", field="tokens")
        if len(array.shape) != 1:
            raise InvalidDatumError(
                f"has shape {list(array.shape)}, expected one dimension of token ids.",
                field="tokens",
                hint="Pass one sequence, such as tokenizer.encode(text).",
            )
        ids = tuple(array.tolist())
    if ids and min(ids) < 0:
        raise InvalidDatumError(
            f"has the negative token {min(ids)}.", field="tokens", hint="Token ids start at 0."
        )
    return ids


def _as_array(data: object, dtype: str | None, field: str) -> npt.NDArray[Any]:
    if isinstance(data, TensorData):
        data = data.to_numpy()
    if isinstance(data, Numbers):
        data = data.array
    if dtype is not None and dtype not in DTYPES:
        raise InvalidDatumError(f"unknown dtype {dtype!r}.", field=field, hint=f"Use {DTYPES}.")
    if hasattr(data, "detach"):  # a torch tensor, on any device and in any dtype
        tensor: Any = data
        tensor = tensor.detach().cpu()
        data = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if isinstance(data, (list, tuple)) and _holds_text(
        data
    ):  # each would take as much as the longest
        raise InvalidDatumError("has text in it.", field=field, hint="Pass integers or floats.")
    try:
        array = np.array(data)
    except (ValueError, TypeError) as error:
        raise InvalidDatumError(
            f"cannot be read as an array: {error}", field=field, hint="Pass a flat list of numbers."
        ) from None
    kind = array.dtype.kind
    if array.size == 0 and kind == "f" and dtype == "int64":
        return array.astype(np.int64)
    if kind not in "iuf":
        raise InvalidDatumError(
            f"has dtype {array.dtype}, expected numbers.",
            field=field,
            hint="Pass integers or floats.",
        )
    if dtype == "int64" and kind == "f":
        raise InvalidDatumError(
            f"has dtype {array.dtype}, expected int64.",
            field=field,
            hint="Use dtype=torch.int64 or a list of ints.",
        )
    target = dtype or ("float32" if kind == "f" else "int64")
    if kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidDatumError("has values that do not fit int64.", field=field)
    return np.ascontiguousarray(array.astype(target)).reshape(array.shape)


def _holds_text(items: Sequence[object]) -> bool:
    kinds = set(map(type, items))
    if str in kinds or bytes in kinds:
        return True
    nested = kinds & {list, tuple}
    return bool(nested) and any(_holds_text(x) for x in items if isinstance(x, (list, tuple)))
