"""A small day: nothing lost, nothing doubled, nobody starved, and the same again with its seed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.simulate import clock
from tests.simulate.contention import contention, jain
from tests.simulate.costs import Costs, Shared
from tests.simulate.figures import Figures, figures_of
from tests.simulate.groups import MODEL
from tests.simulate.page import page
from tests.simulate.tenants import Load
from tests.simulate.workers import Drawn, Pool, Site
from tests.simulate.world import Case, simulate
from weaver.engine.base import SampleJob, SampleProgress, WeightsRef
from weaver.engine.cluster.weights import Shelf
from weaver.types import SamplingParams

LOAD = Load(tenants=40, hours=0.5, jobs_a_day=16, size=0.1, begins_at=14)
SMALL = Case(load=LOAD, groups=3, samplers=12, joining=3, sampler_deaths=12, group_deaths=6)
TINY = replace(SMALL, load=replace(LOAD, hours=0.1, jobs_a_day=30))


@pytest.fixture(scope="module")
def told() -> Figures:
    return figures_of(simulate(SMALL))


def test_nothing_is_lost_or_doubled_when_samplers_and_groups_end(told: Figures) -> None:
    assert told.workers_lost >= 3 and told.groups_lost >= 1
    assert told.repeated_samples > 0 and told.replayed > 0
    assert told.answered == told.operations > 500
    assert (told.doubled, told.wrong, told.unfinished, told.failed) == (0, 0, 0, {})


def test_what_is_refused_for_want_of_room_is_not_applied() -> None:
    told = figures_of(simulate(replace(SMALL, load=replace(LOAD, hours=1.0), pending_bytes=10**5)))
    assert told.failed.keys() == {"quota_exceeded", "gradients_discarded"}
    assert (told.answered, told.doubled, told.wrong) == (told.operations, 0, 0)


def test_no_tenant_starves(told: Figures) -> None:
    for kind, (_, *quantiles) in told.waits.items():
        assert quantiles[-1] < 900, kind
    assert min(told.served) > 0.02
    assert told.fairness > 0.6


async def _rounds(home: Path) -> list[int]:
    """Sixteen prompts, three times, at eight samplers."""
    costs, drawn = Costs(), Drawn()
    async with anyio.create_task_group() as group:
        sites = [Site(0.0, costs, drawn, Shared(costs)) for _ in range(8)]
        workers = {f"sampler-{i}": site.open for i, site in enumerate(sites)}
        pool = Pool(workers, group, shelf=Shelf(home), max_rank=64)
        await pool.publish("base", WeightsRef(base_model=MODEL.name))
        for turn in range(3):
            told: list[SampleProgress] = []
            for i in range(16):
                params = SamplingParams(max_tokens=4, seed=i)
                job = SampleJob(
                    job_id=f"{turn}-{i}",
                    weights_id="base",
                    prompt=[i],
                    params=params,
                    num_samples=1,
                )
                pool.sample(job, told.append)
            await anyio.sleep(60)
            assert len(told) == 16 and all(one.result for one in told)
        group.cancel_scope.cancel()
    assert drawn.cached_tokens == drawn.prompt_tokens * 2 / 3
    return pool.first_choices


def test_the_same_weights_and_beginning_go_to_the_same_worker(tmp_path: Path) -> None:
    assert clock.run(partial(_rounds, tmp_path), seed=0) == [32, 32]


def test_a_seed_gives_the_same_day_again() -> None:
    one, again = (figures_of(simulate(TINY)) for _ in range(2))
    assert one.operations > 50
    assert replace(again, real_s=0, cpu_s=0) == replace(one, real_s=0, cpu_s=0)
    assert LOAD.arrivals(seed=1) != LOAD.arrivals(seed=0)


def test_tenants_that_wait_get_the_same_time_whatever_they_ask_for() -> None:
    sizes = {f"{2**i}": (1, 2**i) for i in range(6)}
    assert jain(contention(sizes, seconds=300).values()) > 0.98
    runs = {"many": (8, 16)} | {f"one {i}": (1, 16) for i in range(3)}
    assert jain(contention(runs, seconds=300).values()) > 0.98


def test_the_page_is_made_of_what_was_found(told: Figures) -> None:
    found = dict.fromkeys(("day", "x1", "x2", "x4", "hashed"), told)
    text = page(SMALL, found, [{"a": 1.0}, {"b": 1.0}])
    assert f"{told.operations:,}" in text and "## The walls" in text


# --- the clock --------------------------------------------------------------------------------


def test_deadlines_go_with_the_clock() -> None:
    async def main() -> list[float]:
        times = []
        with anyio.move_on_after(3600):
            await anyio.sleep_forever()
        times.append(anyio.current_time())
        with pytest.raises(TimeoutError), anyio.fail_after(0.5):
            await anyio.Event().wait()
        times.append(anyio.current_time())
        await asyncio.wait_for(asyncio.sleep(10), timeout=60)
        times.append(anyio.current_time())
        return times

    assert clock.run(main, seed=0) == pytest.approx([3600, 3600.5, 3610.5])


def test_what_blocks_takes_the_time_that_it_owes_and_has_a_thread_meanwhile() -> None:
    async def main() -> float:
        def work() -> None:
            clock.owe(partial(anyio.sleep, 2.0))

        async with anyio.create_task_group() as group:
            for _ in range(clock.THREADS + 1):
                group.start_soon(anyio.to_thread.run_sync, work)
        return anyio.current_time()

    assert clock.run(main, seed=0) == pytest.approx(4.0)


def test_a_wait_for_what_never_comes_is_found() -> None:
    async def main() -> None:
        await anyio.Event().wait()

    with pytest.raises(clock.StuckError):
        clock.run(main, seed=0)
