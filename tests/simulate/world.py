"""`simulate`: a day of the real service on modelled devices, and what came of it."""

from __future__ import annotations

import random
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import anyio
import sqlalchemy as sa

from tests.simulate import clock
from tests.simulate.client import FIRST, Account, Client
from tests.simulate.costs import UNIT, Costs, Shared, Streams
from tests.simulate.groups import Groups
from tests.simulate.tenants import Job, Load, Steps
from tests.simulate.workers import Drawn, Pool, Site
from weaver.engine.cluster.pooled import PooledEngine
from weaver.engine.cluster.weights import Shelf
from weaver.protocol import ForwardBackward
from weaver.server import recovery
from weaver.server.database import open_database
from weaver.server.journal import Journal
from weaver.server.keys import Caller
from weaver.server.service import LocalService
from weaver.server.settings import SERVED

if TYPE_CHECKING:
    from weaver.protocol import Outcome
    from weaver.server.sessions import Ticket
    from weaver.server.view import View

SWEEP_S = 600.0
"""In place of a minute, to save real time: each reads the manifests of all checkpoints."""
BEAT_S = 60.0
"""In place of ten seconds, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    load: Load = field(default_factory=Load)
    costs: Costs = field(default_factory=Costs)
    groups: int = 16
    hashed: bool = False
    """Whether a hash alone gives runs to groups."""
    samplers: int = 64
    joining: int = 8
    """Of the samplers, some that come only after a third of the time."""
    sampler_deaths: int = 40
    group_deaths: int = 8
    pending_bytes: int = (SERVED.pending_bytes or 0) // UNIT
    """That a project may have, of the simulation's small arrays."""
    seed: int = 0


@dataclass(slots=True)
class Seen:
    """What came of a case. Seconds are virtual, unless they are named real."""

    case: Case
    account: Account = field(default_factory=Account)
    steps: Steps = field(default_factory=Steps)
    drawn: Drawn = field(default_factory=Drawn)
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind, of what waits for nothing of its own; samples wait for a worker."""
    tenants: dict[str, list[float]] = field(default_factory=dict)
    """By tenant, the seconds that its operations waited and were carried out."""
    jobs: int = 0
    unfinished: int = 0
    commits: int = 0
    journal_bytes: int = 0
    """Of the simulation's small arrays."""
    flushes: int = 0
    """Commits that waited for the disk: of snapshots."""
    trained_units: int = 0
    lasted_s: float = 0.0
    real_s: float = 0.0
    cpu_s: float = 0.0
    """Real, of all."""
    repeated_samples: int = 0
    same_worker: tuple[int, int] = (0, 0)
    groups: Groups = field(default=None)  # type: ignore[assignment]
    shared: Shared = field(default=None)  # type: ignore[assignment]
    server: Streams = field(default=None)  # type: ignore[assignment]

    def end(self, ticket: Ticket, outcome: Outcome) -> None:
        """An operation has its outcome."""
        kind, operation = ticket.submission.kind, ticket.submission.operation
        if isinstance(operation, ForwardBackward):
            self.trained_units += sum(datum.model_input.length for datum in operation.datums)
        if kind == "sample":
            self._add(ticket, 0.0)
        elif ticket.submission.note == FIRST:
            self.waits[kind].append(ticket.waited_s)
            self._add(ticket, ticket.waited_s)

    def _add(self, ticket: Ticket, waited_s: float) -> None:
        mine = self.tenants.setdefault(ticket.session.caller.project, [0.0, 0.0])
        mine[0] += waited_s
        mine[1] += time.monotonic() - ticket.queued_at


def simulate(case: Case) -> Seen:
    """Raises StuckError, or what has gone wrong in the service."""
    seen = Seen(case)
    begin, busy = time.perf_counter(), time.process_time()
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        folder = memory if memory.is_dir() else None
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        small = recovery.UNSAVED_BYTES // UNIT
        stack.enter_context(mock.patch.object(recovery, "UNSAVED_BYTES", small))
        stack.enter_context(mock.patch("weaver.engine.cluster.place.BEAT_S", BEAT_S))
        clock.run(partial(_day, case, seen, home), seed=case.seed)
    seen.real_s, seen.cpu_s = time.perf_counter() - begin, time.process_time() - busy
    return seen


async def _day(case: Case, seen: Seen, home: Path) -> None:
    seen.shared, seen.server = Shared(case.costs), Streams(1)
    seen.groups = Groups(case.groups, case.costs, seen.shared, hashed=case.hashed)
    seconds = 3600 * case.load.hours
    joins = [seconds / 3 if i < case.joining else 0.0 for i in range(case.samplers)]
    sites = [Site(at, case.costs, seen.drawn, seen.shared) for at in joins]
    database = open_database(home)
    _count(database, seen)
    limits = replace(
        SERVED,
        operation_tokens=2**22 // UNIT,
        pending_bytes=case.pending_bytes,
    )
    async with anyio.create_task_group() as devices:
        workers = {f"sampler-{i}": site.open for i, site in enumerate(sites)}
        pool = Pool(workers, devices, shelf=Shelf(home / "shelf"), max_rank=64)
        shelf, groups = Shelf(home / "shelf"), seen.groups
        engine = PooledEngine(groups, lambda _: pool, shelf=shelf, prepare=groups.list_models)  # type: ignore[arg-type]
        service = LocalService(
            engine,
            home=home,
            store=Journal(database),
            limits=limits,
            merge_tokens=8192 // UNIT,
            sweep_every_s=SWEEP_S,
        )
        async with service as view:
            view.parts.activity.on_end = seen.end
            async with anyio.create_task_group() as group:
                group.start_soon(partial(_kill, case, sites, groups, seconds))
                for number, (at, kind, tenant) in enumerate(case.load.arrivals(case.seed)):
                    await anyio.sleep(at - anyio.current_time())
                    seen.jobs += 1
                    seen.unfinished += 1
                    group.start_soon(partial(_job, view, seen, number, kind, f"tenant-{tenant}"))
        seen.lasted_s = anyio.current_time()
        for tenant, waited_s in pool.waits:
            seen.waits["sample"].append(waited_s)
            seen.tenants[tenant][0] += waited_s
        seen.repeated_samples = pool.counts["repeated_samples"]
        seen.same_worker = tuple(pool.first_choices)  # type: ignore[assignment]
        devices.cancel_scope.cancel()
    database.dispose()


async def _job(view: View, seen: Seen, number: int, kind: str, tenant: str) -> None:
    case = seen.case
    mine = view.seen_by(Caller(tenant))
    session = await mine.open_session(key=f"{number:012d}")
    client = Client(mine, session.session_id, seen.account, seen.server, case.costs)
    rng = random.Random(f"job {case.seed} {number}")
    ends_at = 3600 * case.load.hours
    async with anyio.create_task_group() as group:
        group.start_soon(client.collect)
        await Job(client, rng, seen.steps, case.load.size, ends_at).run(kind)
        group.cancel_scope.cancel()
    await mine.close_session(session.session_id)
    seen.unfinished -= 1


async def _kill(case: Case, sites: list[Site], groups: Groups, seconds: float) -> None:
    rng = random.Random(f"deaths {case.seed}")
    names = list(groups.groups)
    events: list[tuple[float, Any]] = [
        *((rng.uniform(0, seconds), rng.choice(sites).kill) for _ in range(case.sampler_deaths)),
        *(
            (rng.uniform(0, seconds), partial(groups.kill, rng.choice(names)))
            for _ in range(case.group_deaths)
        ),
    ]
    for at, happen in sorted(events, key=lambda event: event[0]):
        await anyio.sleep(at - anyio.current_time())
        happen()


def _count(database: sa.Engine, seen: Seen) -> None:
    """Commits, and the bytes that go into the journal."""

    def commit(_: object) -> None:
        seen.commits += 1

    def execute(_c: object, _cursor: object, text: str, rows: Any, *_: object) -> None:
        seen.flushes += text.startswith("UPDATE runs SET snapshot")
        many = rows if isinstance(rows, list) else [rows]
        seen.journal_bytes += sum(
            len(value) for row in many for value in row if isinstance(value, (bytes, str))
        )

    sa.event.listen(database, "commit", commit)
    sa.event.listen(database, "before_cursor_execute", execute)
