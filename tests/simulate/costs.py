"""`Costs`: what is assumed of devices and ways between them, and the queues that follow from it.

The page names each, and where it comes from.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import anyio

UNIT = 1024
"""Tokens of the modelled installation for which one token of the simulation stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of Qwen3-8B in bfloat16, with LoRA on all layers, unless said otherwise."""

    ranks: int = 1
    """GPUs of a trainer group."""
    trained_per_s: float = 12_000.0
    """Tokens that one GPU trains in a second."""
    call_s: float = 0.005
    """Of any call of a group through Ray."""
    reduce_bytes_per_s: float = 2e9
    """Of gradients that ranks sum through main memory."""
    group_start_s: float = 90.0
    """Until a lost group's ranks have loaded the model again."""
    rank_bytes: float = 10.9e6
    """Of an adapter in float32, for each of its rank; its optimizer has twice that."""
    copy_bytes_per_s: float = 10e9
    """From a GPU to main memory."""
    worker_rows: int = 40
    """That a sampler draws at once."""
    step_s: float = 0.0060
    row_step_s: float = 0.000016
    """A step of a sampler, and each row of it more."""
    read_per_s: float = 20_000.0
    """Tokens of prompts that a sampler reads in a second."""
    worker_start_s: float = 60.0
    add_lora_s: float = 0.05
    held_adapters: int = 64
    """That a sampler keeps in main memory."""
    prefixes: int = 256
    """Prompts whose keys and values a sampler keeps."""
    shared_streams: int = 4
    stream_bytes_per_s: float = 0.75e9
    """Of the shared folder: so many at a time, each so fast."""
    operation_s: float = 0.00285
    """The server's processor time for an operation."""
    token_s: float = 0.67e-6
    """And for each token of it that is sent, until it is acknowledged."""
    token_bytes: float = 6.87
    """On the wire and in the journal."""

    def adapter_bytes(self, rank: int) -> float:
        return self.rank_bytes * rank

    def pass_s(self, tokens: float, gradient_bytes: float) -> float:
        """Of a group, and the sum of its ranks' gradients where there are several."""
        computed_s = tokens / (self.trained_per_s * self.ranks)
        summed_s = gradient_bytes / self.reduce_bytes_per_s if self.ranks > 1 else 0.0
        return self.call_s + computed_s + summed_s

    def rows_step_s(self, rows: int) -> float:
        return self.step_s + self.row_step_s * rows


class Streams:
    """Something that serves a few at a time, in the order in which they come."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.busy_s = 0.0
        self.waited_s = 0.0
        self.by_hour: dict[int, float] = {}
        self._free = [0.0] * count

    async def take(self, seconds: float) -> None:
        now = anyio.current_time()
        begin = max(now, heapq.heappop(self._free))
        heapq.heappush(self._free, begin + seconds)
        self.busy_s += seconds
        self.waited_s += begin - now
        add(self.by_hour, begin, seconds)
        await anyio.sleep(begin + seconds - now)


def add(by_hour: dict[int, float], at: float, amount: float) -> None:
    hour = int(at // 3600)
    by_hour[hour] = by_hour.get(hour, 0.0) + amount


class Shared(Streams):
    """The shared folder."""

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs.shared_streams)
        self.bytes = {"read": 0.0, "written": 0.0}
        self._rate = costs.stream_bytes_per_s

    async def move(self, size_bytes: float, way: str) -> None:
        self.bytes[way] += size_bytes
        await self.take(size_bytes / self._rate)
