"""Frozen weights of 8 or 4 bits a value: how they are made, kept and multiplied with.

`ModelStore` puts `QuantisedLinear` in the place of the layers in attention and MLP while a model is
read; frozen, they are kernels as in `kernels.py`. A product makes the dense weight anew, and
keeps it no longer: trainer and sampler compute with the very same one. Embeddings, norms, the head,
a mixture's routers and fused experts stay in the dtype that is computed in.

int8: each row has a scale, its largest magnitude over 127. nf4: each 64 values have one, their
largest magnitude, of 16 quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314,
section 3); without the paper's second quantisation, of the scales. N rows; x [N, in], weight
[out, in].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Self

import torch
from torch.nn import functional

from weaver.engine.torch.kernels import Plain
from weaver.errors import ConfigError, requiring

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.lora import Target
    from weaver.types import Quantize

NF4_BLOCK = 64
"""Values that have one scale, as in QLoRA."""
NF4_PIECE = 2**18
"""Values that are quantised at once: on a CPU each takes about 100 bytes meanwhile."""
INT8_MOST = 127
"""Symmetric, so that zero is zero."""


class Quantised(ABC):
    """A kernel that makes its dense weight for each product."""

    differentiable = False

    @classmethod
    @abstractmethod
    def of(cls, weight: torch.Tensor, *, dtype: torch.dtype) -> Self:
        """Of a weight in any float dtype; what is computed is `dtype`."""

    @classmethod
    @abstractmethod
    def joined(cls, kernels: Sequence[Self]) -> Self:
        """Of the weights one below the other."""

    @staticmethod
    @abstractmethod
    def size_bytes(out_features: int, in_features: int) -> int: ...

    @abstractmethod
    def dense(self) -> torch.Tensor: ...

    def project(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, self.dense(), bias)

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        return Plain(self.dense()).project_back(*ys)


class Int8(Quantised):
    def __init__(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """int8 [out, in]; float32 [out, 1]"""
        self._values, self._scales, self._dtype = values, scales, dtype

    @classmethod
    def of(cls, weight: torch.Tensor, *, dtype: torch.dtype) -> Self:
        weight = weight.float()
        scales = weight.abs().amax(1, keepdim=True) / INT8_MOST
        tiny = torch.finfo(torch.float32).tiny  # a row of zeros
        return cls((weight / scales.clamp(min=tiny)).round_().to(torch.int8), scales, dtype)

    @classmethod
    def joined(cls, kernels: Sequence[Self]) -> Self:
        values, scales = (torch.cat(parts) for parts in zip(*map(cls._parts, kernels), strict=True))
        return cls(values, scales, kernels[0]._dtype)

    @staticmethod
    def size_bytes(out_features: int, in_features: int) -> int:
        return out_features * (in_features + 4)

    def dense(self) -> torch.Tensor:
        return self._values.to(self._dtype).mul_(self._scales)

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._values, self._scales


class NF4(Quantised):
    """By the operators of bitsandbytes, whose `Linear4bit` holds the same bits."""

    def __init__(
        self, codes: torch.Tensor, scales: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
    ) -> None:
        """uint8 [values / 2, 1]; float32 [values / NF4_BLOCK]; that of the weight"""
        self._codes, self._scales = codes, scales
        self._shape, self._dtype = tuple(shape), dtype

    @classmethod
    def of(cls, weight: torch.Tensor, *, dtype: torch.dtype) -> Self:
        quantise = torch.ops.bitsandbytes.quantize_4bit
        pieces = torch.split(weight.reshape(-1), NF4_PIECE)
        made = [quantise(piece, NF4_BLOCK, "nf4", torch.uint8) for piece in pieces]
        codes, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
        return cls(codes, scales.float(), weight.shape, dtype)

    @classmethod
    def joined(cls, kernels: Sequence[Self]) -> Self:
        codes = torch.cat([kernel._codes for kernel in kernels])
        scales = torch.cat([kernel._scales for kernel in kernels])
        rows = sum(kernel._shape[0] for kernel in kernels)
        return cls(codes, scales, (rows, kernels[0]._shape[1]), kernels[0]._dtype)

    @staticmethod
    def size_bytes(out_features: int, in_features: int) -> int:
        values = out_features * in_features
        return values // 2 + 4 * (values // NF4_BLOCK)

    def dense(self) -> torch.Tensor:
        dequantise = torch.ops.bitsandbytes.dequantize_4bit
        dense: torch.Tensor = dequantise(
            self._codes, self._scales, NF4_BLOCK, "nf4", self._shape, self._dtype
        )
        return dense


KINDS: Mapping[str, type[Quantised]] = {"int8": Int8, "nf4": NF4}


class QuantisedLinear(torch.nn.Module):
    """A linear layer of a model, between its reading and its freezing."""

    def __init__(self, linear: torch.nn.Linear, *, kind: Quantize, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.kernel = KINDS[kind].of(linear.weight.detach(), dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        return functional.linear(x, self.kernel.dense(), self.bias)


def check_kind(quantize: Quantize) -> None:
    """What a setting needs before anything is loaded.

    Raises:
        ConfigError: there is no such kind.
        MissingDependencyError: the library of its operators is not installed.
    """
    if quantize not in ("none", *KINDS):
        raise ConfigError(f"is {quantize!r}.", field="quantize", hint="Use none, int8 or nf4.")
    if quantize == "nf4":
        with requiring("quantize=nf4", "quant"):
            import_module("bitsandbytes")


def can_quantise(target: Target, kind: Quantize) -> bool:
    """Whether a layer is of those that are quantised, and of a size that can be."""
    values = target.out_features * target.in_features
    return target.role != "unembed" and (kind != "nf4" or values % NF4_BLOCK == 0)


def weights_bytes(
    facts: ModelFacts, *, dtype: torch.dtype, quantize: Quantize, copies: int = 1
) -> int:
    """Of a frozen model, where what is not quantised is there so many times."""
    chosen = [t for t in facts.targets.values() if quantize != "none" and can_quantise(t, quantize)]
    values = sum(t.out_features * t.in_features for t in chosen)
    small = sum(KINDS[quantize].size_bytes(t.out_features, t.in_features) for t in chosen)
    return small + copies * (facts.info.num_parameters - values) * dtype.itemsize
