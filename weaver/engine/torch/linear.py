"""The seam through which every frozen projection passes, with LoRA of several adapters by rows.

`FrozenLinear` replaces the linear layers of a frozen base model, and finds the adapters of its rows
in the model's `Routing`. N rows, R rank; x [N, in], weight [out, in], A [R, in], B [out, R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from weaver.engine.torch.kernels import kernel_of
from weaver.engine.torch.lora import Adapter
from weaver.errors import EngineError

Segment = tuple[int, int, Adapter]
"""First row, row behind the last, the adapter of these rows."""
Part = tuple[int, int, float]
"""First row, row behind the last, scale."""


class Routing:
    """Which adapter each row of the running model call has; one per base model.

    Calls on a model are serialized, so it is set for the duration of one: `with routing.of(...)`.
    """

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._rows: int | None = None

    @contextmanager
    def of(self, lengths: Sequence[int], adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """Routes `lengths[i]` rows to `adapters[i]`, in this order."""
        previous = self._segments, self._rows
        self._segments, self._rows = _merge(lengths, adapters), sum(lengths)
        try:
            yield
        finally:
            self._segments, self._rows = previous

    def parts(self, path: str, rows: int) -> tuple[list[Part], list[torch.Tensor]]:
        """Each segment of one layer, and its A and B."""
        if rows != self._rows:
            raise EngineError(f"{path} got {rows} rows, the routing has {self._rows}.")
        parts: list[Part] = []
        tensors: list[torch.Tensor] = []
        for start, stop, adapter in self._segments:
            pair = adapter.pairs.get(path)
            if pair is not None:
                parts.append((start, stop, adapter.scale))
                tensors += (pair.a, pair.b)
        return parts, tensors


def _merge(lengths: Sequence[int], adapters: Sequence[Adapter | None]) -> list[Segment]:
    """Neighbours of one adapter are one segment."""
    segments: list[Segment] = []
    start = 0
    for length, adapter in zip(lengths, adapters, strict=True):
        stop = start + length
        if adapter is not None:
            if segments and segments[-1][1] == start and segments[-1][2] is adapter:
                segments[-1] = (segments[-1][0], stop, adapter)
            else:
                segments.append((start, stop, adapter))
        start = stop
    return segments


class FrozenLinear(torch.nn.Module):
    """x -> x W^T + bias + scale (x A^T) B^T, where A and B are those of the row's adapter."""

    def __init__(self, linear: torch.nn.Linear, *, path: str, routing: Routing) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.path = path
        self.routing = routing
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.kernel = kernel_of(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]; the leading axes flatten to the rows of the current routing."""
        rows = x.reshape(-1, self.in_features)
        parts, tensors = self.routing.parts(self.path, rows.shape[0])
        if self.kernel.differentiable and len(parts) == 1 and parts[0][:2] == (0, rows.shape[0]):
            a, b = (t.to(rows.dtype) for t in tensors)
            # torch's own operators: a Python backward costs small models 8% of a step
            low = functional.linear(rows, a) * parts[0][2]
            y = torch.addmm(self.project(rows), low, b.t())
        else:
            y = _routed(rows, self, parts, *tensors)
        return y.view(*x.shape[:-1], self.out_features)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias: [N, in] -> [N, out]"""
        return self.kernel.project(x, self.bias)

    def project_back(self, y: torch.Tensor) -> torch.Tensor:
        """y W: [N, out] -> [N, in]"""
        return self.kernel.project_back(y)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; made anew where the kernel keeps it otherwise."""
        return self.kernel.dense()


class _RoutedLinear(torch.autograd.Function):
    """Forward and backward of `FrozenLinear`; the frozen weight gets no gradient.

    Only x and scale x A^T [N, R] are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, linear: FrozenLinear, parts: Sequence[Part], *ab: torch.Tensor
    ) -> torch.Tensor:
        y = linear.project(x)
        low: list[torch.Tensor] = []
        for (start, stop, scale), a, b in zip(parts, ab[::2], ab[1::2], strict=True):
            xa = (x[start:stop] @ a.to(x.dtype).t()).mul_(scale)
            y[start:stop].addmm_(xa, b.to(x.dtype).t())
            low.append(xa)
        ctx.linear, ctx.parts = linear, parts
        ctx.save_for_backward(x, *ab, *low)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        n = len(ctx.parts)
        ab, low = rest[: 2 * n], rest[2 * n :]
        gy = gy.contiguous()
        gx = ctx.linear.project_back(gy) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = []
        for i, (start, stop, scale) in enumerate(ctx.parts):
            a, b = ab[2 * i], ab[2 * i + 1]
            rows = gy[start:stop]
            gxa = (rows @ b.to(x.dtype)).mul_(scale)
            if gx is not None:
                gx[start:stop].addmm_(gxa, a.to(x.dtype))
            trains = ctx.needs_input_grad[3 + 2 * i]
            grads.append((gxa.t() @ x[start:stop]).to(a.dtype) if trains else None)
            grads.append((rows.t() @ low[i]).to(b.dtype) if trains else None)
        return gx, None, None, *grads


_routed: Callable[..., torch.Tensor] = _RoutedLinear.apply
