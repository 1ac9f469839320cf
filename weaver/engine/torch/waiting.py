"""`WaitingJobs`: sample jobs whose base model is not in memory, and has no room there yet.

`TorchSampler` puts them off here, and begins them in their order once it can be loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from weaver.engine.base import SampleJob
from weaver.engine.torch.model_room import WAIT_S, ModelRoom
from weaver.engine.torch.models import PublishedWeights


@dataclass(slots=True, eq=False)
class _Job:
    job: SampleJob
    weights: PublishedWeights
    since: float = field(default_factory=time.monotonic)


class WaitingJobs:
    def __init__(self, room: ModelRoom) -> None:
        self._room = room
        self._jobs: dict[str, dict[str, _Job]] = {}
        """By base model and id, those that came first first."""
        room.waiters.append(self._wanted)

    def __len__(self) -> int:
        return sum(map(len, list(self._jobs.values())))

    def put_off(self, job: SampleJob, weights: PublishedWeights) -> bool:
        """Whether a job has to wait, which it does from now on."""
        name = weights.facts.info.name
        if weights.own is not None:
            return False
        name = self._room.shared(name)
        if name not in self._jobs and not self._delay_s(name, time.monotonic()):
            return False
        self._jobs.setdefault(name, {})[job.job_id] = _Job(job, weights)
        return True

    def due(self) -> Iterator[tuple[SampleJob, PublishedWeights]]:
        """Takes out one after the other that can begin, or has waited for too long."""
        for name in list(self._jobs):
            while jobs := self._jobs.get(name):
                first = next(iter(jobs.values()))
                if self._delay_s(name, first.since):
                    break
                self.drop(first.job.job_id)
                yield first.job, first.weights

    def drop(self, job_id: str) -> None:
        """Unknown ids are ignored."""
        for name, jobs in self._jobs.items():
            if job_id in jobs:
                del jobs[job_id]
                if not jobs:
                    del self._jobs[name]
                return

    def clear(self) -> None:
        self._jobs.clear()

    @property
    def delay_s(self) -> float | None:
        """Until one may begin, as far as is known; None where none waits."""
        firsts = [(name, next(iter(jobs.values()))) for name, jobs in self._jobs.items()]
        return min((self._delay_s(name, first.since) for name, first in firsts), default=None)

    def _delay_s(self, name: str, since: float) -> float:
        if self._room.holds_back(name) and time.monotonic() - since < WAIT_S:
            return float("inf")
        return self._room.delay_s(name, since=since)

    def _wanted(self) -> list[tuple[str, float]]:
        return [(name, next(iter(jobs.values())).since) for name, jobs in self._jobs.items()]
