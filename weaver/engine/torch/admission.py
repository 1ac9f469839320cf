"""Which sample jobs may run: `in_turn` orders them, `Admission` gives them rows and cache.

A place is a row and cache for the longest sample that it may hold. A job gets its first place with
its prompt and keeps at least one until its last sample begins, so every admitted job can end and
nothing waits in a circle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # so that engines without torch can take turns as well
    from weaver.engine.torch.sample_jobs import Prompt, RunningJob

T = TypeVar("T")


class Admission:
    """Shares out rows and the cache's bytes. A job that exceeds them by itself runs alone.

    With `in_waves` a job gets all places that it will ever have at once, and as many as it would
    get alone, so that its batches do not depend on other jobs.
    """

    def __init__(
        self,
        jobs: Mapping[str, RunningJob],
        *,
        max_rows: int,
        limit_bytes: Callable[[RunningJob], int],
        in_waves: bool,
    ) -> None:
        """`jobs`: all that have not ended, as the sampler adds and drops them.

        `limit_bytes`: what all jobs may hold together, as one of them asks.
        """
        self._jobs = jobs
        self._max_rows = max_rows
        self._limit_bytes = limit_bytes
        self._in_waves = in_waves

    @property
    def rows(self) -> int:
        return sum(job.places for job in self._jobs.values())

    @property
    def held_bytes(self) -> int:
        """What is kept of the cache for admitted jobs; a prompt counts once."""
        places = sum(job.places * job.row_bytes for job in self._jobs.values())
        return places + sum(prompt.size_bytes for prompt in self._prompts())

    def claim(self) -> None:
        """Gives places to jobs in turn, up to the first that must wait for some."""
        rows, held, prompts = self.rows, self.held_bytes, self._prompts()
        jobs = in_turn(self._jobs.values(), lambda j: j.job.tenant, held=lambda j: j.places)
        for job in jobs:
            wanted = job.pending + job.running - job.places
            if job.admitted and (wanted <= 0 or self._in_waves):
                continue
            prompt = 0 if job.admitted or job.prompt in prompts else job.prompt.size_bytes
            limit = self._limit_bytes(job)
            count = min(wanted, self._max_rows - rows, (limit - prompt - held) // job.row_bytes)
            count = max(0, count)
            if not job.admitted:
                alone = min(self._max_rows, (limit - job.prompt.size_bytes) // job.row_bytes)
                least = min(wanted, max(alone, 1)) if self._in_waves else min(wanted, 1)
                if held == 0:
                    count = max(count, least)
                elif count < least or prompt + held > limit:
                    return
                job.admitted = True
                prompts.add(job.prompt)
            job.places += count
            rows += count
            held += prompt + count * job.row_bytes
            if count < wanted and not self._in_waves:
                return

    def _prompts(self) -> set[Prompt]:
        jobs = self._jobs.values()
        return {job.prompt for job in jobs if job.admitted and job.holds_prompt}


def in_turn(
    items: Iterable[T], tenant: Callable[[T], str], *, held: Callable[[T], int] = lambda item: 0
) -> list[T]:
    """One item of each tenant after the other, that of the tenant who holds least first.

    Each tenant's items stay in their order, whatever others have.
    """
    order = [(item, tenant(item)) for item in items]
    counts: Counter[str] = Counter()
    holds: Counter[str] = Counter()
    places = []
    for item, name in order:
        places.append(counts[name])
        counts[name] += 1
        holds[name] += held(item)
    if len(counts) < 2:
        return [item for item, _ in order]
    ranks = sorted(range(len(order)), key=lambda i: (places[i], holds[order[i][1]]))
    return [order[i][0] for i in ranks]
