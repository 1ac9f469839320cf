"""`RankedTrainer`: a `TorchTrainer` in each of several threads, which are the ranks of a group.

They speak over gloo, as processes do. It stands in a `TorchTrainer`'s place: what a test reads or
changes is that of the first rank, and the others are given the same before each call.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from weaver.engine.cluster.merge import Ranks
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = timedelta(seconds=20)


def groups(size: int) -> list[Any]:
    """Process groups of one another, by rank."""
    store, made = distributed.HashStore(), [None] * size

    def make(rank: int) -> None:
        made[rank] = distributed.ProcessGroupGloo(store, rank, size, TIMEOUT)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


class RankedTrainer:
    def __init__(self, store: ModelStore, *, size: int = 2, **options: Any) -> None:
        stores = [store, *(_like(store) for _ in range(size - 1))]
        self.trainers = [
            TorchTrainer(stores[rank], team=Ranks(group, rank=rank, size=size), **options)
            for rank, group in enumerate(groups(size))
        ]
        self._threads = ThreadPoolExecutor(size, initializer=lambda: torch.set_num_threads(1))

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.trainers[0], name)) or name in ("_run", "step", "plan"):
            return getattr(self.trainers[0], name)
        return lambda *args, **options: self.each(
            lambda trainer: getattr(trainer, name)(*args, **options)
        )[0]

    def each(self, work: Callable[[TorchTrainer], Any]) -> list[Any]:
        """What the call answers in each rank."""
        self._share()
        calls = [self._threads.submit(work, trainer) for trainer in self.trainers]
        return [call.result(timeout=60) for call in calls]

    def create_run(self, *args: Any, **options: Any) -> None:
        """One rank after the other: transformers loads one model at a time in a process."""
        for trainer in self.trainers:
            trainer.create_run(*args, **options)

    @torch.no_grad()
    def _share(self) -> None:
        first, *others = self.trainers
        for trainer in others:
            for run_id, theirs in trainer._runs.items():
                ours = first._runs[run_id]
                for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
                    its.copy_(mine)
                gradient = ours.gradient
                theirs.gradient = None if gradient is None else [g.clone() for g in gradient]


def _like(store: ModelStore) -> ModelStore:
    return ModelStore(store.catalog, device=store.device, dtype=store.dtype, threads=1)
