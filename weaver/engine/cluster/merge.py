"""`Ranks`: the team of a trainer group, whose ranks hold the same base and the same adapters.

The trainer of each rank has one. Every rank is given all jobs, so that it knows denominators and
counts of the whole; it computes its own datums. Behind the passes the ranks tell each other what
came of them, always, so that a job that has failed in one keeps none of the others waiting; then
the gradient of each job that has failed in none is summed in one all-reduce.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from weaver.engine.torch.objective import Totals
from weaver.engine.torch.packing import Share, plan_passes
from weaver.engine.torch.team import Task
from weaver.errors import WeaverError
from weaver.tensors import TensorData


def deal(
    lengths: Sequence[Sequence[int]], *, ranks: int, merge: bool
) -> list[list[tuple[int, ...]]]:
    """The datums of each rank, by job, so that ranks have as many tokens. `lengths[job][datum]`.

    The longest goes first, to the rank that has the fewest. Without `merge` what a job's ranks
    have does not depend on other jobs.

    >>> deal([[3, 1, 2], [2]], ranks=2, merge=True)
    [[(0,), (0,)], [(1, 2), ()]]
    """
    loads = [0] * ranks
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for sizes in lengths:
        if not merge:
            loads = [0] * ranks
        mine: list[list[int]] = [[] for _ in range(ranks)]
        for datum in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[datum]
            mine[rank].append(datum)
        for rank, datums in enumerate(mine):
            dealt[rank].append(tuple(sorted(datums)))
    return dealt


@dataclass(frozen=True, slots=True)
class _Told:
    """What a rank has of a task."""

    error: WeaverError | None
    totals: Totals
    logprobs: dict[int, TensorData]


class Ranks:
    """`group` is a process group of torch, of which this process is `rank` of `size`.

    Where models are `divided`, every rank makes as many passes as the one that has most.
    """

    def __init__(self, group: Any, *, rank: int, size: int, divided: bool = False) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._divided = divided

    def plan(
        self, lengths: Sequence[Sequence[int]], *, budget: int, merge: bool
    ) -> list[tuple[Share, ...]]:
        dealt = deal(lengths, ranks=self._size, merge=merge)
        planned = [
            _passes_of(mine, lengths, budget=budget, merge=merge)
            for rank, mine in enumerate(dealt)
            if self._divided or rank == self._rank
        ]
        passes = planned[self._rank if self._divided else 0]
        return passes + [()] * (max(map(len, planned)) - len(passes))

    def settle(self, tasks: Sequence[Task]) -> None:
        told = self.gather([_Told(t.error, t.objective.totals, t.logprobs) for t in tasks])
        for task, *each in zip(tasks, *told, strict=True):
            task.error = next((one.error for one in each if one.error is not None), None)
            task.objective.totals = merged([one.totals for one in each])
            task.logprobs = {i: lp for one in each for i, lp in one.logprobs.items()}
            summed = task.run.parts is not None
            if task.job.backward and task.error is None and not summed:
                task.gradient = self._summed(task)

    def norm(self, gradient: Sequence[torch.Tensor], *, divided: bool) -> torch.Tensor:
        norm = get_total_norm(gradient)
        if not divided:
            return norm
        square = norm.double().square().cpu().reshape(1)
        self._group.allreduce([square]).wait()
        return square[0].sqrt().to(norm)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank."""
        mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._size)]
        self._group.allgather([sizes], [torch.tensor([len(mine)])]).wait()
        largest = max(int(size) for size in sizes)
        padded = torch.zeros(largest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        all_of = [torch.empty_like(padded) for _ in range(self._size)]
        self._group.allgather([all_of], [padded]).wait()
        return [
            pickle.loads(one[: int(size)].numpy().tobytes())
            for one, size in zip(all_of, sizes, strict=True)
        ]

    def _summed(self, task: Task) -> list[torch.Tensor]:
        """The gradient of a task over all ranks."""
        parameters: list[torch.Tensor] = task.run.parameters()
        parts = task.gradient or [torch.zeros_like(p) for p in parameters]
        flat = torch.cat([part.reshape(-1) for part in parts]).cpu()
        self._group.allreduce([flat]).wait()
        sizes = [p.numel() for p in parameters]
        pieces = torch.split(flat.to(parts[0].device), sizes)
        return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _passes_of(
    mine: Sequence[tuple[int, ...]],
    lengths: Sequence[Sequence[int]],
    *,
    budget: int,
    merge: bool,
) -> list[tuple[Share, ...]]:
    """Of the datums of one rank."""
    sizes = [[of[i] for i in datums] for of, datums in zip(lengths, mine, strict=True)]
    return [
        tuple(Share(s.job, tuple(mine[s.job][i] for i in s.datums)) for s in each)
        for each in plan_passes(sizes, budget=budget, merge=merge)
    ]


def merged(each: Sequence[Totals]) -> Totals:
    """What all have added up."""
    return Totals(
        loss=sum(one.loss for one in each),
        counted=sum(one.counted for one in each),
        sums={name: sum(one.sums[name] for one in each) for name in each[0].sums},
        ratio_bounds=(
            min(one.ratio_bounds[0] for one in each),
            max(one.ratio_bounds[1] for one in each),
        ),
    )
