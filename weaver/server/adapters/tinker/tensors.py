"""How tensors of Tinker's protocol are read and written: dense, or as compressed sparse rows.

`passes.py` reads the inputs of losses, `bodies.py` the targets of a prompt, `answers.py` writes
what was asked of them. N rows of K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from weaver import errors
from weaver.fields import MOST_ALTERNATIVES
from weaver.server.adapters.tinker import messages
from weaver.server.http.body import Body
from weaver.tensors import TensorData

MOST_CELLS = 2**22
"""Of the sparse tensors of a request, all together: a few bytes stand for many."""
DTYPES = {messages.FLOAT32: "<f4", messages.INT64: "<i8"}


class JsonTensor(Body):
    data: Any = ()
    shape: tuple[int, ...] | None = None
    sparse_crow_indices: Any = None
    sparse_col_indices: Any = None


class Tensors:
    """Reads those of one request; cells that nothing is said of get `fill`."""

    def __init__(self) -> None:
        self._left = MOST_CELLS

    def of_message(self, tensor: Any, *, field: str) -> npt.NDArray[Any]:
        """Raises InvalidDatumError, TooLargeError."""
        if tensor.dtype not in DTYPES:
            raise errors.InvalidDatumError("is neither float32 nor int64.", field=field)
        dtype, shape = DTYPES[tensor.dtype], tuple(tensor.shape)
        if tensor.WhichOneof("encoding") != "sparse_csr":
            return _dense(numbers(tensor.dense, dtype, field=field), shape, field=field)
        csr = tensor.sparse_csr
        crow, col = (numbers(x, "<i8", field=field) for x in (csr.crow_indices, csr.col_indices))
        values = numbers(csr.values, dtype, field=field)
        return self._sparse(values, crow, col, shape, fill=0, field=field)

    def of_json(
        self, tensor: JsonTensor, *, dtype: str, field: str, fill: int = 0
    ) -> npt.NDArray[Any]:
        """Raises InvalidDatumError, TooLargeError."""
        values = TensorData(tensor.data, dtype=dtype, field=field).to_numpy()
        if tensor.sparse_crow_indices is None:
            return _dense(values, tensor.shape or (), field=field)
        crow, col = (
            TensorData(x or (), dtype="int64", field=field).to_numpy().ravel()
            for x in (tensor.sparse_crow_indices, tensor.sparse_col_indices)
        )
        return self._sparse(values, crow, col, tensor.shape or (), fill=fill, field=field)

    def _sparse(
        self,
        values: npt.NDArray[Any],
        crow: npt.NDArray[np.int64],
        col: npt.NDArray[np.int64],
        shape: Sequence[int],
        *,
        fill: int,
        field: str,
    ) -> npt.NDArray[Any]:
        if len(shape) != 2 or not 0 <= shape[0] == len(crow) - 1:
            raise _wrong(f"has {len(crow)} row pointers for the shape {list(shape[:4])}", field)
        _check_columns(shape[1], field)
        self._left -= shape[0] * shape[1]
        if self._left < 0:
            raise errors.TooLargeError(
                f"stands for more than {MOST_CELLS} values, with the others of its request.",
                field=field,
                hint="Send fewer datums at once.",
            )
        inside = crow.min() >= 0 and crow.max() == crow[-1] == len(values) == len(col)
        if not inside or crow[0] or (np.diff(crow) < 0).any():
            raise _wrong("has row pointers that do not count its values", field)
        if len(col) and not 0 <= col.min() <= col.max() < shape[1]:
            raise _wrong(f"has a column outside of its {shape[1]}", field)
        filled = np.full(tuple(shape), fill, values.dtype)
        filled[np.arange(shape[0]).repeat(np.diff(crow)), col] = values
        return filled


def numbers(data: bytes, dtype: str, *, field: str) -> npt.NDArray[Any]:
    if len(data) % np.dtype(dtype).itemsize:
        raise errors.InvalidDatumError(f"has {len(data)} bytes of {dtype} values.", field=field)
    return np.frombuffer(data, dtype)


def write(message: Any, values: npt.NDArray[np.float32], *, sparse: bool) -> None:
    """Writes float32 [N, K]; NaN stands for what was not asked: 0, or no cell of sparse rows."""
    message.dtype = messages.FLOAT32
    message.shape.extend(values.shape)
    asked = ~np.isnan(values)
    if not sparse:
        message.dense = np.where(asked, values, 0).astype("<f4").tobytes()
        return
    rows = np.cumsum([0, *asked.sum(1)], dtype="<i8")
    message.sparse_csr.values = values[asked].astype("<f4").tobytes()
    message.sparse_csr.crow_indices = rows.tobytes()
    message.sparse_csr.col_indices = np.nonzero(asked)[1].astype("<i8").tobytes()


def _dense(values: npt.NDArray[Any], shape: Sequence[int], *, field: str) -> npt.NDArray[Any]:
    if not shape:
        return values
    columns = shape[1] if len(shape) == 2 else 1
    _check_columns(columns, field)
    if len(shape) > 2 or min(shape) < 0 or shape[0] * columns != values.size:
        raise _wrong(f"has {values.size} values for the shape {list(shape[:4])}", field)
    return values.reshape(tuple(shape))


def _check_columns(columns: int, field: str) -> None:
    if not 1 <= columns <= MOST_ALTERNATIVES:
        raise _wrong(f"has {columns} columns, the limit is {MOST_ALTERNATIVES}", field)


def _wrong(what: str, field: str) -> errors.InvalidDatumError:
    hint = "Send [N], [N, K], or compressed sparse rows of [N, K]."
    return errors.InvalidDatumError(f"{what}.", field=field, hint=hint)
