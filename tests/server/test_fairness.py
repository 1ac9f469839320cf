"""Who waits for whom on the engine: counted in its calls, each of which takes a second here."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.caller import FORWARD
from tests.contracts.caller import Caller as Client
from tests.fake_engine import FakeEngine
from tests.server.test_service import Recorder
from weaver.engine import threaded
from weaver.engine.torch.admission import in_turn
from weaver.protocol import Sample
from weaver.server import executor
from weaver.server.keys import Caller
from weaver.server.service import LocalService
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.server.view import View

pytestmark = pytest.mark.anyio
HI = ModelInput.from_ints(list(b"hi"))
ENGINE_CALLS = ("forward_backward", "step")


def sample(tokens: int) -> Sample:
    params = SamplingParams(max_tokens=tokens, seed=0)
    return Sample(sampler_id="base:fake", prompt=HI, params=params)


async def open_as(service: View, project: str) -> Client:
    info = await service.seen_by(Caller(project)).open_session()
    return Client(service, info.session_id)


def steps_beside(record: Recorder, begin: int, name: str, count: int) -> int:
    """How many calls of the other kind there were up to the last of `count` calls of a kind."""
    calls = [called for called, _ in record.calls[begin:] if called in ENGINE_CALLS]
    last = [i for i, called in enumerate(calls) if called == name][count - 1]
    return last + 1 - count


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Of an engine whose calls take a second of a clock that nothing else moves."""
    record = Recorder()

    def calls() -> float:
        return float(sum(name in ENGINE_CALLS for name, _ in record.calls))

    clock = SimpleNamespace(perf_counter=calls, monotonic=time.monotonic)
    monkeypatch.setattr(threaded, "time", clock)
    monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=calls))
    monkeypatch.setattr(
        threaded, "PATIENCE_S", 1.0
    )  # for calls that take no time on a busy machine
    return record


async def test_a_flood_of_samples_and_another_projects_steps_alternate(
    home: Path, record: Recorder
) -> None:
    async with LocalService(FakeEngine(hook=record, slots=4), home=home) as service:
        flood, other = await open_as(service, "a"), await open_as(service, "b")
        run = await other.create()
        record.hold = "step"
        ids = await flood.send(*(flood.stamp(sample(4000)) for _ in range(1000)))
        await record.until_held()
        begin = len(record.calls)
        passes = await other.send(*(other.stamp(FORWARD, run) for _ in range(10)))
        record.hold = None
        record.go_on.set()
        await other.result(passes[-1])
        assert steps_beside(record, begin, "forward_backward", 10) in range(8, 12)
        await service.cancel(flood.session_id, ids)


async def test_many_passes_and_another_projects_sample_alternate(
    home: Path, record: Recorder
) -> None:
    async with LocalService(FakeEngine(hook=record), home=home, deterministic=True) as service:
        crowd, other = await open_as(service, "a"), await open_as(service, "b")
        run = await crowd.create()
        await other.result(await other.start(sample(1)))  # its weights are ready
        record.hold = "forward_backward"
        await crowd.send(*(crowd.stamp(FORWARD, run) for _ in range(300)))
        await record.until_held()
        begin = len(record.calls)
        mine = await other.start(sample(10))
        record.hold = None
        record.go_on.set()
        await other.result(mine)
        assert steps_beside(record, begin, "step", 10) in range(8, 12)


async def test_many_runs_of_a_project_and_one_of_another_alternate(
    home: Path, record: Recorder
) -> None:
    async with LocalService(FakeEngine(hook=record), home=home, deterministic=True) as service:
        crowd, other = await open_as(service, "a"), await open_as(service, "b")
        runs = [await crowd.create() for _ in range(20)]
        lone = await other.create()
        record.hold = "forward_backward"
        first = await crowd.start(FORWARD, runs[0])
        await record.until_held()
        ids = await crowd.send(*(crowd.stamp(FORWARD, run) for run in runs for _ in range(2)))
        mine = await other.send(*(other.stamp(FORWARD, lone) for _ in range(5)))
        record.go_on.set()
        for client, one in (
            (crowd, first),
            *((crowd, i) for i in ids),
            *((other, i) for i in mine),
        ):
            await client.result(one)
    order = [batch == [lone] for batch in record.batches[1:]]
    assert order[:10] == [True, False] * 5


async def test_a_sample_does_not_wait_for_a_thousand_of_another_project(home: Path) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record, slots=4), home=home) as service:
        flood, other = await open_as(service, "a"), await open_as(service, "b")
        record.hold = "step"
        ids = await flood.send(*(flood.stamp(sample(50)) for _ in range(1000)))
        await record.until_held()
        mine = await other.start(sample(8))
        record.go_on.set()
        await other.result(mine)
        finished = await service.collect(flood.session_id, after=0, timeout_s=0)
        assert len(finished) < 100
        await service.cancel(flood.session_id, ids)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=30))
def test_items_of_tenants_come_in_turn(items: list[tuple[str, int]]) -> None:
    numbered = [(tenant, held, i) for i, (tenant, held) in enumerate(items)]
    order = in_turn(numbered, lambda one: one[0], held=lambda one: one[1])
    assert sorted(order, key=lambda one: one[2]) == numbered
    tenants = {tenant for tenant, _ in items}
    totals = {name: sum(held for tenant, held in items if tenant == name) for name in tenants}
    assert {one[0] for one in order[: len(tenants)]} == tenants
    firsts = [totals[one[0]] for one in order[: len(tenants)]]
    assert firsts == sorted(firsts)
    for name in tenants:
        own = [one[2] for one in order if one[0] == name]
        assert own == sorted(own)
