"""How a frozen weight is kept and multiplied with: `FrozenLinear` has one kernel for its weight.

The kind is chosen by a fixed rule, not by a stopwatch, so that two processes on one machine always
compute the same bits: on a CPU whose oneDNN prepacks the dtype, weights of at least
`PREPACK_MIN_SIZE` elements are kept in its blocked layout; everything else is `F.linear`. Measured
on two-core AMD machines in fp32, it is 1.2 to 2.4 times as fast at training sizes and 1.7 to 3
times at 1 to 32 rows; below the threshold the call's overhead of about 15 us eats the gain.

N rows; x [N, in], weight [out, in].
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn import functional

PREPACK_MIN_SIZE = 2**17
PACKING_ROWS = 512
BLOCK_ROWS = (64, 48, 32, 24, 16, 8, 1)
"""Rows of a weight that lie side by side in oneDNN's layouts, by processor and shape; small weights
may lie as they are, or transposed."""


class Kernel(Protocol):
    """Computes without gradient, and answers new tensors."""

    differentiable: bool
    """Whether `project` may be called for autograd to differentiate it in x."""

    def project(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + bias: [N, in] -> [N, out]"""

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        """y W: [N, out] -> [N, in]; y may come in columns, always in the same."""

    def dense(self) -> torch.Tensor:
        """The weight [out, in]; made anew where it is kept otherwise."""


def kernel_of(weight: torch.Tensor) -> Kernel:
    """The kernel that keeps a weight, or what stands for it."""
    on_cpu = weight.device.type == "cpu"
    if on_cpu and weight.numel() >= PREPACK_MIN_SIZE and prepackable(weight.dtype):
        return Prepacked(weight)
    return Plain(weight)


class Plain:
    differentiable = True

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def project(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self._weight, bias)

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        first, *others = torch.split(self._weight, [y.shape[1] for y in ys])
        x = ys[0] @ first
        for y, weight in zip(ys[1:], others, strict=True):
            x.addmm_(y, weight)
        return x

    def dense(self) -> torch.Tensor:
        return self._weight


class Divided:
    """Of layers whose weights lie in parts in several processes, see `shards.py`.

    FSDP2 puts the whole ones in their place while the decoder layer that they are of is computed.
    """

    differentiable = True

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        """torch's own."""

    def project(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """With the biases of the layers; `bias` is None."""
        ys = [functional.linear(x, layer.weight, layer.bias) for layer in self.layers]
        return torch.cat(ys, 1) if len(ys) > 1 else ys[0]

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = ys[0] @ self.layers[0].weight
        for y, layer in zip(ys[1:], self.layers[1:], strict=True):
            x.addmm_(y, layer.weight)
        return x

    def dense(self) -> torch.Tensor:
        return torch.cat([layer.weight for layer in self.layers])


class Prepacked:
    """In oneDNN's blocked layout, in place of the original.

    The first backward pass adds blocked transposes: 1x the memory for sampling, 2x for training.
    """

    differentiable = False

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed = _prepack(weight)
        self._transposes: list[torch.Tensor] = []
        self._blocks: torch.Tensor | None = None

    def project(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _packed_linear(x, self._packed, bias)

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        if not self._transposes:
            weights = torch.split(self.dense(), [y.shape[1] for y in ys])
            self._transposes = [_prepack(weight.t().contiguous()) for weight in weights]
        x = _packed_linear(ys[0], self._transposes[0], None)
        for y, packed in zip(ys[1:], self._transposes[1:], strict=True):
            x = torch.ops.mkldnn._linear_pointwise.binary(y.contiguous(), x, packed, None, "add")
        return x

    def dense(self) -> torch.Tensor:
        return self._packed.to_dense()

    def read_rows(self, weight: torch.Tensor) -> bool:
        """Whether `rows` can be called, found by comparing rows with those of the original."""
        self._blocks = _blocks_of(self._packed, weight)
        return self._blocks is not None

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the weight [out, in], those at ids [N]: [N, in]"""
        assert self._blocks is not None
        size = self._blocks.shape[2]
        return self._blocks[ids // size, : self._packed.shape[1], ids % size]


@cache
def prepackable(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN prepacks weights of a dtype, found by trying a small one.

    For bfloat16 it needs AVX-512 or avx_ne_convert, and there is no function that tells.
    """
    ones = torch.ones(64, 64, dtype=dtype)
    try:
        _packed_linear(ones[:1], _prepack(ones), None)
    except (RuntimeError, AttributeError):  # AttributeError: a torch without oneDNN
        return False
    return True


def _prepack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)
    return packed


def _blocks_of(packed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """A packed weight's own memory as [blocks, in or more, b], where row r is [r // b, :in, r % b].

    None where its layout is another. The memory is the packed tensor's, and gone with it.
    """
    try:
        address = torch.ops.mkldnn.data_ptr(packed)
        memory = (ctypes.c_char * torch.ops.mkldnn._nbytes(packed)).from_address(address)
    except AttributeError:  # a torch that does not tell
        return None
    values = torch.frombuffer(memory, dtype=weight.dtype)
    out, width = weight.shape
    some = torch.cat([torch.arange(min(out, 64)), torch.linspace(0, out - 1, 64).long()])
    for size in (*BLOCK_ROWS, out):
        padded, rest = divmod(len(values), -(-out // size) * size)
        if rest == 0 and padded >= width:
            blocks = values.view(-1, padded, size)
            if torch.equal(blocks[some // size, :width, some % size], weight[some]):
                return blocks
    return None


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), packed, bias, "none", [], ""
    )
    return y
