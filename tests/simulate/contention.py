"""`contention`: who gets a group's time when all want it at once, whatever the sizes of their jobs.

Fairness between waiting tenants is Jain's index (Jain, Chiu and Hawe, DEC-TR-301, 1984) of what
each had of it: 1 where all had the same, 1/n where one had everything.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from tests.simulate import clock
from tests.simulate.client import Account, Client
from tests.simulate.costs import UNIT, Costs, Shared, Streams
from tests.simulate.groups import Groups
from tests.simulate.tenants import Job, Steps
from weaver.server.journal import Journal
from weaver.server.keys import Caller
from weaver.server.service import LocalService

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def jain(shares: Iterable[float]) -> float:
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def contention(
    tenants: Mapping[str, tuple[int, int]], *, seconds: float, seed: int = 0
) -> Mapping[str, float]:
    """Seconds that each tenant has had of one group, all of them asking all the time.

    Args:
        tenants: by name, their runs and the thousands of tokens of each of their batches.
    """
    took_s: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        clock.run(partial(_contend, tenants, took_s, Path(home), seconds), seed=seed)
    return took_s


async def _contend(
    tenants: Mapping[str, tuple[int, int]], took_s: Counter[str], home: Path, seconds: float
) -> None:
    costs, server = Costs(), Streams(1)
    groups = Groups(1, costs, Shared(costs))
    service = LocalService(groups, home=home, store=Journal(), merge_tokens=8192 // UNIT)  # type: ignore[arg-type]
    async with service as view, anyio.create_task_group() as group:

        async def ask(tenant: str, number: int, units: int) -> None:
            mine = view.seen_by(Caller(tenant))
            session = await mine.open_session(key=f"{number:04d}-{tenant}")
            client = Client(mine, session.session_id, Account(), server, costs)
            group.start_soon(client.collect)
            job = Job(client, random.Random(number), Steps(), 1.0, seconds)
            run_id = await job.create()
            async with anyio.create_task_group() as pairs:  # two, so that one always waits
                for _ in range(2):
                    pairs.start_soon(partial(_repeat, job, run_id, units))

        number = 0
        for tenant, (runs, units) in tenants.items():
            for _ in range(runs):
                number += 1
                group.start_soon(ask, tenant, number, units)
        await anyio.sleep(seconds)
        for run_id, mine_s in groups.took_s.items():
            took_s[view.parts.registry.runs[run_id].project] += mine_s
        group.cancel_scope.cancel()


async def _repeat(job: Job, run_id: str, units: int) -> None:
    while True:
        await job.step(run_id, [units])
