"""`DecodeSteps`: a token for each row by a CUDA graph, from buffers whose place never changes.

**Not yet run on a GPU.** `LoadedModel.next_logits` asks it on CUDA, for rows in pages that all have
one adapter, or none. A step is for a power of two of rows and of pages; rows that stand for none
write to the scratch page. It is recorded once, compared with itself as it runs unrecorded, and then
replayed: a step of a small batch costs what the device needs, not what Python does. What cannot be
recorded, such as a model that asks the device in between, is said once and computed as before.

Axes: B rows, W pages of the longest, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from weaver.engine.torch.catalog import refusing
from weaver.engine.torch.lora import Adapter, pairs_of
from weaver.engine.torch.packing import PackedBatch
from weaver.engine.torch.pages import SCRATCH, PageCache, Paged, PagedPass, Tables
from weaver.errors import UnsupportedError

logger = logging.getLogger(__name__)

MOST_ROWS = 256
"""Larger batches keep the device busy without it."""
WARM_UPS = 2
"""Runs before recording, in which libraries take the memory that they keep."""
SAME = 0.01
"""How far a replay may be from the unrecorded step, relative to its norm: kernels may add up in
another order."""
Compute = Callable[[], torch.Tensor]


class Model(Protocol):
    """What it needs of `LoadedModel`."""

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor: ...


class CudaGraphs:
    """Records on the current device. One pool of memory for all: no two replay at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """The replay of `compute`, whose result is the same tensor each time."""
        for _ in range(WARM_UPS):
            compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class DecodeSteps:
    """Those of one model, over the cache that was used last."""

    def __init__(self, record: Callable[[Compute], Compute]) -> None:
        """`record` makes of a computation one that repeats it: `CudaGraphs`."""
        self._record = record
        self._fails = False
        self._cache: PageCache | None = None
        self._grown = 0
        self._slots: dict[object, _Slot] = {}
        self._steps: dict[object, _Step] = {}

    def hidden(
        self,
        model: Model,
        cache: PageCache,
        rows: Sequence[Paged],
        tokens: Sequence[int],
        adapters: Sequence[Adapter | None],
    ) -> torch.Tensor | None:
        """[B, H] behind one more token of each row, until the next call; None where it cannot."""
        adapter = adapters[0]
        if self._fails or len(rows) > MOST_ROWS or any(a is not adapter for a in adapters):
            return None
        cache.make_room(rows)
        if self._cache is not cache or self._grown != cache.pool.grown:  # recorded steps know both
            self._cache, self._grown = cache, cache.pool.grown
            self._steps.clear()
        slot = self._slot(adapter)
        size = _power(len(rows)), _power(max(len(row.pages) for row in rows))
        if (*size, slot) not in self._steps:
            self._steps[*size, slot] = _Step(cache, *size, slot.adapter if slot else None)
        step = self._steps[*size, slot]
        step.fill(tokens, rows)
        if step.run is None and not self._recorded(step, model):
            return None
        assert step.run is not None
        hidden = step.run()[: len(rows)]
        for row in rows:
            row.length += 1
        return hidden

    def _recorded(self, step: _Step, model: Model) -> bool:
        try:
            with refusing("it fails", hint=""):
                run = self._record(lambda: step.compute(model))
                right, replayed = step.compute(model), run()
                error = float((replayed - right).norm() / right.norm())
        except UnsupportedError as failure:
            fault = failure.message
        except torch.OutOfMemoryError as failure:
            fault = str(failure)
        else:
            fault = "" if error <= SAME else f"a replay differs by {error:.1g}"
        if fault:
            logger.warning("decoding goes on without CUDA graphs: %s", fault)
            self._fails = True
            self._steps.clear()
            return False
        step.run = run
        return True

    def _slot(self, adapter: Adapter | None) -> _Slot | None:
        """That with the values of this adapter; one for all adapters of the same shapes."""
        if adapter is None:
            return None
        pairs = adapter.pairs.items()
        shapes = tuple((path, pair.a.shape, pair.b.shape, pair.a.dtype) for path, pair in pairs)
        if (adapter.scale, shapes) not in self._slots:
            self._slots[adapter.scale, shapes] = _Slot(adapter)
        slot = self._slots[adapter.scale, shapes]
        slot.take(adapter)
        return slot


class _Slot:
    """Where the values of adapters of the same shapes take turns."""

    def __init__(self, adapter: Adapter) -> None:
        own = {name: torch.empty_like(tensor) for name, tensor in adapter.tensors().items()}
        some = next(iter(own.values()))
        pairs = pairs_of(own, device=some.device, dtype=some.dtype)
        self.adapter = Adapter(pairs, adapter.scale)
        self._holds: Adapter | None = None

    def take(self, adapter: Adapter) -> None:
        """Copies its values here, unless they are here."""
        if self._holds is not adapter:
            here, there = self.adapter.tensors(), adapter.tensors()
            for name, tensor in here.items():
                tensor.copy_(there[name])
            self._holds = adapter


class _Step:
    def __init__(self, cache: PageCache, rows: int, width: int, adapter: Adapter | None) -> None:
        self._cache, self._adapter = cache, adapter
        device = cache.pool.shape.device
        self._inputs = torch.zeros(rows, 4 + width, dtype=torch.int64, device=device)
        """Of each row its token, position, slot and tokens, then its pages: one copy a step."""
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.run: Compute | None = None

    def fill(self, tokens: Sequence[int], rows: Sequence[Paged]) -> None:
        """What `compute` is to add to these rows, which have room for it."""
        count, columns = self._inputs.shape
        page = self._cache.pool.page
        lines = []
        for token, row in zip(tokens, rows, strict=True):
            at = row.length
            slot = row.pages[at // page] * page + at % page
            line = [token, at, slot, at + 1, *row.pages]
            lines.append(line + row.pages[-1:] * (columns - len(line)))
        nobody = [0, 0, SCRATCH * page, 1] + [SCRATCH] * (columns - 4)
        lines += [nobody] * (count - len(lines))
        self._inputs.copy_(torch.tensor(lines))

    def compute(self, model: Model) -> torch.Tensor:
        """[rows, H]; of the device alone, and the same however often it runs."""
        tokens, positions, slots, used = self._inputs[:, :4].t().contiguous()
        pages = self._inputs[:, 4:].int()
        tables = Tables(slots, pages, used.int(), self._starts, 1)
        count = len(self._inputs)
        batch = PackedBatch(
            input_ids=tokens,
            position_ids=positions,
            lengths=(1,) * count,
            adapters=(self._adapter,) * count,
            cache=PagedPass(self._cache.pool, self._cache.attention, tables, (), ()),
        )
        return model.hidden_states(batch)


def _power(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()
