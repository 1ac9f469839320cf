"""The seam through which every frozen projection passes, with LoRA of several adapters by rows.

`FrozenLinear` replaces the linear layers of a frozen base model. Layers that are given the same
input, such as those of queries, keys and values, are one `Projection`: one product, made when the
first of them is called. It finds the adapters of its rows in the model's `Routing`.

N rows, n of a segment, R rank, M layers of a projection, S segments; x [N, in], weight [out, in].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from weaver.engine.torch.device import give_back_freed
from weaver.engine.torch.kernels import Divided, Kernel, kernel_of
from weaver.engine.torch.quantised import Quantised, QuantisedLinear
from weaver.engine.torch.routing import Call, Part, Routing
from weaver.engine.torch.shards import is_divided

Layer = torch.nn.Linear | QuantisedLinear


class Projection:
    """For each of its layers, x -> x W^T + bias + scale (x A^T) B^T, A and B of the row's adapter.

    The weights of the layers lie one below the other, [sum of out, in]; so do their A in an
    adapter, and x is multiplied with each once. What is computed for layers yet to be called lies
    in the routing, and goes with the model call at the latest.
    """

    def __init__(self, layers: Sequence[Layer], *, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.in_features = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        whole = [layer for layer in layers if not _is_divided(layer)]
        self.bias = _joined_bias(whole)
        self.kernel = _take_kernel(layers)

    def outputs(self, x: torch.Tensor, call: Call) -> Sequence[torch.Tensor]:
        """[N, in] -> [N, out] of each layer, which may be changed in place."""
        parts = call.parts(self.paths, len(x))
        if torch.is_grad_enabled() and (
            x.requires_grad or any(pair.a.requires_grad for _, _, b in parts for pair in b.pairs)
        ):
            return self._differentiable(x, parts)
        ys = self.split(self.project(x))
        if len(parts) > 1 and call.stackable:
            rows, stack = call.stacked_rows, call.stack(self.paths)
            low = torch.bmm(rows.gather(x), stack.a_t)
            for index, span, b_t in stack.members:
                rows.add(ys[index], torch.bmm(low[:, :, span], b_t))
            return ys
        for start, stop, block in parts:
            low = x[start:stop] @ block.a_t().to(x.dtype)
            for index, span, b_t in block.members:
                ys[index][start:stop].addmm_(low[:, span], b_t.to(x.dtype), alpha=block.scale)
        return ys

    def _differentiable(self, x: torch.Tensor, parts: Sequence[Part]) -> Sequence[torch.Tensor]:
        pairs = [pair for part in parts for pair in part.block.pairs]
        if self.kernel.differentiable and len(parts) == 1 and parts[0][:2] == (0, len(x)):
            # torch's own operators: a Python backward costs small models 8% of a step
            block = parts[0].block
            ys = list(self.split(self.project(x)))
            a = torch.cat([pair.a for pair in pairs]) if len(pairs) > 1 else pairs[0].a
            low = functional.linear(x, a.to(x.dtype)) * block.scale
            for (index, span, _), pair in zip(block.members, pairs, strict=True):
                ys[index] = torch.addmm(ys[index], low[:, span], pair.b.to(x.dtype).t())
            return ys
        tensors = (t for pair in pairs for t in (pair.a, pair.b))
        return _routed(x, self, parts, *tensors)

    def split(self, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """[N, sum of out] -> [N, out] of each layer, views that autograd takes for new tensors."""
        return torch.unsafe_split_with_sizes(y, self.sizes, 1) if len(self.sizes) > 1 else [y]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias: [N, in] -> [N, sum of out]"""
        return self.kernel.project(x, self.bias)

    def project_back(self, *ys: torch.Tensor) -> torch.Tensor:
        """y W of the outputs y [N, out] of all layers: -> [N, in]"""
        return self.kernel.project_back(*ys)


class FrozenLinear(torch.nn.Module):
    """One layer of a projection: its only one, or the one at `index`."""

    def __init__(self, projection: Projection, index: int = 0, *, routing: Routing) -> None:
        super().__init__()
        self.projection = projection
        self.index = index
        self.routing = routing
        self.in_features, self.out_features = projection.in_features, projection.sizes[index]
        if isinstance(projection.kernel, Divided):
            self.divided = projection.kernel.layers[index]  # so that its parameters are the model's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]; the leading axes flatten to the rows of the current routing."""
        call = self.routing.call
        y = call.kept.take(self.projection, self.index, x)
        if y is None:
            ys = self.projection.outputs(x.reshape(-1, self.in_features), call)
            y = ys[self.index]
            if len(ys) > 1:
                call.kept.put(self.projection, self.index, x, ys)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; made anew where the kernel keeps it otherwise."""
        return torch.split(self.projection.kernel.dense(), self.projection.sizes)[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]"""
        bias = self.projection.bias
        return None if bias is None else torch.split(bias, self.projection.sizes)[self.index]


def freeze(module: torch.nn.Module, read: Callable[[], object], *, routing: Routing) -> None:
    """Puts frozen layers in the place of all linear layers; `read` calls the module on a token."""
    for paths in _siblings(module, read):
        layers: list[Any] = [module.get_submodule(path) for path in paths]
        projection = Projection(layers, paths=paths)
        for index, path in enumerate(paths):
            parent, _, name = path.rpartition(".")
            layer = FrozenLinear(projection, index, routing=routing)
            setattr(module.get_submodule(parent), name, layer)


def _siblings(module: torch.nn.Module, read: Callable[[], object]) -> list[list[str]]:
    """The paths of all linear layers, together where they can be one projection.

    Those are of one parent, and a call shows that they are called one after the other, once each,
    with the very same tensor, which is not changed in between.
    """
    kinds = (torch.nn.Linear, QuantisedLinear)
    layers = {path: m for path, m in module.named_modules() if type(m) in kinds}
    calls: list[tuple[str, torch.Tensor, int]] = []

    def note(path: str, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.extend((path, x, x._version) for x in inputs)

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: note(path, inputs))
        for path, layer in layers.items()
    ]
    read()
    for hook in hooks:
        hook.remove()

    def shared(call: tuple[str, torch.Tensor, int]) -> tuple[str, type, int, int]:
        path, x, version = call
        return path.rpartition(".")[0], type(layers[path]), id(x), version

    times = Counter(path for path, _, _ in calls)
    found = [[path for path, _, _ in together] for _, together in groupby(calls, shared)]
    joined = [paths for paths in found if all(times[path] == 1 for path in paths)]
    alone = layers.keys() - {path for paths in joined for path in paths}
    return joined + [[path] for path in layers if path in alone]


def _is_divided(layer: Layer) -> bool:
    return isinstance(layer, torch.nn.Linear) and is_divided(layer.weight)


def _take_kernel(layers: Sequence[Any]) -> Kernel:
    """Of [sum of out, in]; several layers lose their weights, which else were there twice."""
    if isinstance(layers[0], QuantisedLinear):
        kernels: list[Quantised] = [layer.kernel for layer in layers]
        return kernels[0].joined(kernels) if len(kernels) > 1 else kernels[0]
    if _is_divided(layers[0]):
        return Divided(layers)
    if len(layers) == 1:
        return kernel_of(layers[0].weight.detach())
    joined = torch.cat([layer.weight.detach() for layer in layers])
    for layer in layers:
        del layer.weight
    give_back_freed()
    return kernel_of(joined)


def _joined_bias(layers: Sequence[Layer]) -> torch.Tensor | None:
    like = next((layer.bias for layer in layers if layer.bias is not None), None)
    if like is None:
        return None
    return torch.cat(
        [
            like.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            for layer in layers
        ]
    ).detach()


class _RoutedProjection(torch.autograd.Function):
    """Forward and backward of `Projection`; the frozen weight gets no gradient.

    Only x and scale x A^T [N, sum of R] are kept for the backward pass. `ab` are the tensors of
    the parts' blocks, which autograd is to know of.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, projection: Projection, parts: Sequence[Part], *ab: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ys = projection.split(projection.project(x))
        lows: list[torch.Tensor] = []
        for start, stop, block in parts:
            low = (x[start:stop] @ block.a_t().to(x.dtype)).mul_(block.scale)
            for index, span, b_t in block.members:
                ys[index][start:stop].addmm_(low[:, span], b_t.to(x.dtype))
            lows.append(low)
        ctx.projection, ctx.parts = projection, parts
        ctx.save_for_backward(x, *lows)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *lows = ctx.saved_tensors
        gx = ctx.projection.project_back(*gys) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = []
        for (start, stop, block), low in zip(ctx.parts, lows, strict=True):
            some = [gy[start:stop] for gy in gys]
            g_low = torch.empty_like(low)
            for index, span, b_t in block.members:
                torch.mm(some[index], b_t.t().to(x.dtype), out=g_low[:, span])
            g_low.mul_(block.scale)
            if gx is not None:
                gx[start:stop].addmm_(g_low, block.a_t().to(x.dtype).t())
            trains = ctx.needs_input_grad[3 + len(grads)]
            g_a = g_low.t() @ x[start:stop] if trains else None
            for (index, span, _), pair in zip(block.members, block.pairs, strict=True):
                grads.append(None if g_a is None else g_a[span].to(pair.a.dtype))
                g_b = some[index].t() @ low[:, span] if trains else None
                grads.append(None if g_b is None else g_b.to(pair.b.dtype))
        return gx, None, None, *grads


_routed: Callable[..., tuple[torch.Tensor, ...]] = _RoutedProjection.apply
