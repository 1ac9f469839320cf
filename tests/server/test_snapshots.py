"""When a run is snapshotted, and what goes on meanwhile."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_durability import ALWAYS, embedded, server, train, until
from weaver.server.recovery import UNSAVED_BYTES
from weaver.server.settings import Durability

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.server.view import View

pytestmark = pytest.mark.anyio


def kept(service: View, run: str) -> list[int]:
    """The steps of its snapshots."""
    return [one.step for one in service.parts.live.list(run)]


async def kept_is(service: View, run: str, step: int) -> bool:
    return kept(service, run) == [step] and not service.parts.registry.runs[run].committing.locked()


async def unlocked(service: View, run: str) -> bool:
    return service.parts.registry.runs[run].lock is None


@pytest.mark.parametrize(
    ("cost_s", "computed_s", "due"),
    [(1.0, 21.0, True), (1.0, 19.0, False), (1e3, 299.0, False), (1e3, 301.0, True)],
)
async def test_a_snapshot_waits_until_the_run_has_computed_what_it_costs(
    home: Path, cost_s: float, computed_s: float, due: bool
) -> None:
    async with server(home, durability=Durability()) as service:
        caller = await Caller.open(service)
        run = service.parts.registry.runs[await caller.create()]
        recovery = service.parts.executor._recovery
        await train(caller, run.run_id, steps=1)
        run.snapshot_at, run.snapshot_cost_s, run.computed_s = -math.inf, cost_s, computed_s
        assert recovery.due(run, at_once=False) is due
        run.unsaved_bytes = UNSAVED_BYTES + 1
        assert recovery.due(run, at_once=False)


async def test_snapshots_are_written_beside_the_engine_and_one_at_a_time(home: Path) -> None:
    write, often = threading.Event(), Durability(snapshot_every_s=1e-9)

    def hook(name: str, argument: object) -> None:
        if name == "write":
            write.wait(10)

    async with server(home, engine=FakeEngine(hook=hook), durability=often) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(3)]
        for run in runs:
            await train(caller, run, steps=2)  # while nothing can be written
        assert [kept(service, run) for run in runs] == [[], [], []]
        write.set()
        await until(lambda: kept_is(service, runs[0], 1))
        assert [kept(service, run) for run in runs[1:]] == [[], []]
        for run in runs[1:]:
            await train(caller, run, steps=1)
            await until(lambda run=run: kept_is(service, run, 3))


async def test_a_run_stays_locked_until_its_snapshot_is_written(home: Path) -> None:
    write = threading.Event()

    def hook(name: str, argument: object) -> None:
        if name == "write":
            write.wait(10)

    engine = FakeEngine(hook=hook)
    async with server(home, engine=engine, durability=ALWAYS, store=embedded) as one:
        caller = await Caller.open(one)
        run = await caller.create()
        await train(caller, run, steps=1)
        await one.stop_run(run)
        async with server(home, store=embedded) as two:
            other = await Caller.open(two)
            assert await other.refused(STEP, run_id=run) == "conflict"
            write.set()
            await until(lambda: unlocked(one, run))
            assert kept(one, run) == [1]
            await train(other, run, steps=1)
