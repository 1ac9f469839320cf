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
    from weaver.engine.torch.sample_jobs import RunningJob

T = TypeVar("T")


class Admission:
    """Shares out the budget. A job that exceeds it by itself runs alone.

    With `in_waves` a job gets all places that it will ever have at once, and as many as it would
    get alone, so that its batches do not depend on other jobs.
    """

    def __init__(
        self, jobs: Mapping[str, RunningJob], *, max_rows: int, kv_tokens: int, in_waves: bool
    ) -> None:
        """`jobs`: all that have not ended, as the sampler adds and drops them."""
        self._jobs = jobs
        self._max_rows = max_rows
        self._kv_tokens = kv_tokens
        self._in_waves = in_waves

    @property
    def rows(self) -> int:
        return sum(job.places for job in self._jobs.values())

    @property
    def tokens(self) -> int:
        return sum(job.held_tokens for job in self._jobs.values() if job.admitted)

    def claim(self) -> None:
        """Gives places to jobs in turn, up to the first that must wait for some."""
        rows, tokens = self.rows, self.tokens
        jobs = in_turn(self._jobs.values(), lambda j: j.job.tenant, held=lambda j: j.places)
        for job in jobs:
            wanted = job.pending + job.running - job.places
            if job.admitted and (wanted <= 0 or self._in_waves):
                continue
            prompt = 0 if job.admitted else len(job.prompt)
            count = min(wanted, self._fitting(job, self._max_rows - rows, prompt + tokens))
            if not job.admitted:
                alone = self._fitting(job, self._max_rows, prompt)
                least = min(wanted, max(alone, 1)) if self._in_waves else min(wanted, 1)
                if tokens == 0:
                    count = max(count, least)
                elif count < least or prompt + tokens > self._kv_tokens:
                    return
                job.admitted = True
            job.places += count
            rows += count
            tokens += prompt + count * job.row_tokens
            if count < wanted and not self._in_waves:
                return

    def _fitting(self, job: RunningJob, rows: int, used_tokens: int) -> int:
        """Places of the job for which there is room."""
        return max(0, min(rows, (self._kv_tokens - used_tokens) // job.row_tokens))


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
