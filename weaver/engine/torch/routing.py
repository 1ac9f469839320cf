"""`Routing`: which adapter each row of the running model call has; one for each base model.

`LoadedModel` sets it for a call, and the projections of `weaver.engine.torch.linear` ask it. It
also keeps what they need for longer than one call of a layer: outputs of a projection until its
other layers are called, and adapters that are multiplied together, until others are.

N rows, n of a segment, S segments, R rank; x [N, in], A [R, in], B [out, R].
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch

from weaver.engine.torch.lora import Adapter, Block
from weaver.errors import EngineError

Segment = tuple[int, int, Adapter]
"""First row, row behind the last, the adapter of these rows."""
STACKED_ROWS = 32
"""Rows of a segment from which on a product of its own is as fast as its share of a batched one."""


class Part(NamedTuple):
    """A segment as one projection sees it."""

    start: int
    stop: int
    block: Block


class Kept:
    """The outputs of a projection for its layers that were not called yet.

    They are those of one input, the very same tensor, so that a layer that is called with another
    gets what belongs to that.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._owner: object = None
        self._x: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}
        self._with_gradient = False

    def put(
        self, owner: object, index: int, x: torch.Tensor, outputs: Sequence[torch.Tensor]
    ) -> None:
        """All but those of the layer at `index`, which is being called."""
        self._owner, self._x = owner, x
        self._outputs = {i: y for i, y in enumerate(outputs) if i != index}
        self._with_gradient = torch.is_grad_enabled()

    def take(self, owner: object, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """Those of a layer for this input, once; None where they are not there."""
        if self._x is not x or self._owner is not owner:
            return None
        if self._with_gradient != torch.is_grad_enabled():
            return None
        y = self._outputs.pop(index, None)
        if not self._outputs:
            self._clear()
        return y


class StackedRows:
    """Where the rows of S segments lie in [S, n, ...], with n those of the longest."""

    def __init__(self, segments: Sequence[Segment], rows: int, device: torch.device) -> None:
        n = max(stop - start for start, stop, _ in segments)
        places = [
            (s * n + i, start + i)
            for s, (start, stop, _) in enumerate(segments)
            for i in range(stop - start)
        ]
        self._shape = len(segments), n, -1
        self._even = len(places) == rows == len(segments) * n
        self._places, self._rows = torch.tensor(places, device=device).t().contiguous()
        self._source = torch.zeros(len(segments) * n, dtype=torch.int64, device=device)
        self._source[self._places] = self._rows

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [S, n, in]; what stands behind the rows of a segment is of no account."""
        return (x if self._even else x[self._source]).view(self._shape)

    def add(self, y: torch.Tensor, stacked: torch.Tensor) -> None:
        """Adds [S, n, out] to y [N, out], in place."""
        if self._even:
            y.view(self._shape).add_(stacked)
        else:
            y.index_add_(0, self._rows, stacked.flatten(0, 1)[self._places])


class Stack(NamedTuple):
    """What the adapters of all segments have for one projection; zeros where one has nothing."""

    a_t: torch.Tensor
    """[S, in, sum of R]"""
    members: list[tuple[int, slice, torch.Tensor]]
    """For each layer: its index, its columns of x A^T, and scale B^T [S, R, out]."""


class Stacks:
    """The stacks of one set of adapters.

    They take the adapters' memory once more, until there are others, or one of them is no more.
    """

    def __init__(self) -> None:
        self._of: list[weakref.ref[Adapter]] = []
        self._stacks: dict[tuple[str, ...], Stack] = {}

    def get(self, adapters: Sequence[Adapter], paths: tuple[str, ...]) -> Stack:
        """That of frozen adapters, for layers of one input that one of them changes."""
        if len(adapters) != len(self._of) or any(
            ref() is not adapter for ref, adapter in zip(self._of, adapters, strict=True)
        ):
            self._stacks.clear()
            self._of = [weakref.ref(a, lambda _: self._stacks.clear()) for a in adapters]
        if paths not in self._stacks:
            self._stacks[paths] = _stack([adapter.block(paths) for adapter in adapters])
        return self._stacks[paths]


class Call:
    """A call of the model: which adapter each of its rows has."""

    def __init__(self, segments: Sequence[Segment], rows: int | None, stacks: Stacks) -> None:
        self.kept = Kept()
        self._segments = segments
        self._rows = rows
        self._stacks = stacks

    def parts(self, paths: tuple[str, ...], rows: int) -> list[Part]:
        """Each segment whose adapter changes one of these layers.

        Raises:
            EngineError: the call has another number of rows.
        """
        if rows != self._rows:
            raise EngineError(f"{paths[0]} got {rows} rows, the routing has {self._rows}.")
        parts: list[Part] = []
        for start, stop, adapter in self._segments:
            block = adapter.block(paths)
            if block is not None:
                parts.append(Part(start, stop, block))
        return parts

    @cached_property
    def stackable(self) -> bool:
        """Whether products of all segments at once cost less than one after the other.

        That needs segments of few and about as many rows, and adapters that copies can be kept of.
        """
        sizes = [stop - start for start, stop, _ in self._segments]
        even = max(sizes) <= STACKED_ROWS and len(sizes) * max(sizes) <= 2 * sum(sizes)
        return even and all(adapter.frozen for _, _, adapter in self._segments)

    @cached_property
    def stacked_rows(self) -> StackedRows:
        """How the rows lie in such products."""
        pair = next(iter(self._segments[0][2].pairs.values()))
        return StackedRows(self._segments, self._rows or 0, pair.a.device)

    def stack(self, paths: tuple[str, ...]) -> Stack:
        """The adapters of all segments, for layers of one input that one of them changes."""
        return self._stacks.get([adapter for _, _, adapter in self._segments], paths)


class Routing:
    """Calls on a model are serialized, so it is set for the duration of one: `with of(...)`."""

    def __init__(self) -> None:
        self._stacks = Stacks()
        self.call = Call([], None, self._stacks)

    @contextmanager
    def of(self, lengths: Sequence[int], adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """Routes `lengths[i]` rows to `adapters[i]`, in this order."""
        previous = self.call
        self.call = Call(_merge(lengths, adapters), sum(lengths), self._stacks)
        try:
            yield
        finally:
            self.call = previous


def _stack(blocks: Sequence[Block | None]) -> Stack:
    given = [(s, block) for s, block in enumerate(blocks) if block is not None]
    parts: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for s, block in given:
        a_t = block.a_t()
        for index, span, b_t in block.members:
            parts.setdefault(index, []).append((s, a_t[:, span], b_t * block.scale))
    ranks = [max(len(b_t) for _, _, b_t in each) for each in parts.values()]
    some = given[0][1].a_t()
    stacked_a_t = some.new_zeros(len(blocks), len(some), sum(ranks))
    members: list[tuple[int, slice, torch.Tensor]] = []
    start = 0
    for (index, each), rank in zip(parts.items(), ranks, strict=True):
        stacked_b_t = some.new_zeros(len(blocks), rank, each[0][2].shape[1])
        for s, a_t, b_t in each:
            stacked_a_t[s, :, start : start + a_t.shape[1]] = a_t
            stacked_b_t[s, : len(b_t)] = b_t
        members.append((index, slice(start, start + rank), stacked_b_t))
        start += rank
    return Stack(stacked_a_t, members)


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
