"""TensorData: what it accepts, what it becomes, how it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weaver.errors import InvalidDatumError
from weaver.tensors import TensorData, as_token_ids


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        ([1, 2, 3], "int64"),
        ([1.0, 2, 3], "float32"),
        (np.array([1, 2, 3], dtype=np.int32), "int64"),
        (np.array([1, 2, 3], dtype=np.uint8), "int64"),
        (np.array([1, 2, 3], dtype=np.float64), "float32"),
        (torch.tensor([1, 2, 3], dtype=torch.int32), "int64"),
        (torch.tensor([1, 2, 3], dtype=torch.bfloat16), "float32"),
        (torch.tensor([1.0, 2, 3], requires_grad=True), "float32"),
        ((np.float32(1), 2.0, 3), "float32"),
    ],
)
def test_accepts_lists_numpy_and_torch(data: object, dtype: str) -> None:
    value = TensorData(data)
    assert value.dtype == dtype
    assert value.shape == (3,)
    assert value.tolist() == [1, 2, 3]
    assert TensorData(value) == value


@pytest.mark.parametrize("data", ["abc", [1, "a"], [[1], [1, 2]], [1j], [True, False], None, {}])
def test_refuses_what_is_not_numbers(data: object) -> None:
    with pytest.raises(InvalidDatumError, match="weights"):
        TensorData(data, field="weights")


def test_refuses_floats_where_integers_are_asked() -> None:
    with pytest.raises(InvalidDatumError, match="expected int64"):
        TensorData([1.5], dtype="int64")
    with pytest.raises(InvalidDatumError, match="fit int64"):
        TensorData(np.array([2**63], dtype=np.uint64))


def test_is_a_copy_that_never_changes() -> None:
    source = np.arange(3.0, dtype=np.float32)
    value = TensorData(source)
    source[0] = 9
    assert value.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="read-only"):
        value.to_numpy()[0] = 1
    value.to_torch()[0] = 5  # a torch copy is the caller's own
    assert value[0] == 0


def test_reads_as_array_and_as_mapping() -> None:
    value = TensorData([1.5, 2.5])
    assert np.asarray(value).tolist() == [1.5, 2.5]
    assert torch.tensor(value.data).tolist() == [1.5, 2.5]
    assert (len(value), list(value), value[1], value[-1:].tolist()) == (2, [1.5, 2.5], 2.5, [2.5])
    assert (value["data"], value["dtype"], value["shape"]) == ([1.5, 2.5], "float32", (2,))
    with pytest.raises(KeyError):
        value["values"]


def test_nan_equals_itself_and_dtype_counts() -> None:
    assert TensorData([float("nan")]) == TensorData([float("nan")])
    assert TensorData([1]) != TensorData([1.0])


def test_token_ids() -> None:
    assert as_token_ids([1, 2]) == (1, 2)
    assert as_token_ids(torch.tensor([1, 2])) == (1, 2)
    assert as_token_ids([]) == ()
    assert as_token_ids([np.int64(3)]) == (3,)
    for bad in ([[1, 2]], [1.0], ["a"], [True], "abc", 3):
        with pytest.raises(InvalidDatumError):
            as_token_ids(bad)
