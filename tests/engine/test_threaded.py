"""`ThreadedEngine` by itself, and an engine of two devices behind the service."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import FORWARD, GRADIENT, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_service import Recorder
from weaver.engine.base import SampleJob, WeightsRef
from weaver.errors import ClosedError, NotFoundError
from weaver.protocol import GradientsDone, Sample, Sampled
from weaver.server.service import LocalService
from weaver.types import ModelInput, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.base import SampleProgress

pytestmark = pytest.mark.anyio
BASE = WeightsRef(base_model="fake")


def job(weights_id: str, *, tokens: int = 4) -> SampleJob:
    params = SamplingParams(max_tokens=tokens, seed=0)
    return SampleJob(job_id="j", weights_id=weights_id, prompt=[1], params=params, num_samples=1)


async def end_of(engine: FakeEngine, job: SampleJob) -> SampleProgress:
    told: list[SampleProgress] = []
    ended = anyio.Event()

    def tell(progress: SampleProgress) -> None:
        told.append(progress)
        if progress.result is not None or progress.error is not None:
            ended.set()

    engine.sample(job, tell)
    await ended.wait()
    return told[-1]


class Gate:
    """Holds each call of a name in its thread until it is let go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held, self.open = threading.Event(), threading.Event()

    def __call__(self, name: str, argument: object) -> None:
        if name == self.name:
            self.held.set()
            assert self.open.wait(30)

    async def until_held(self) -> None:
        await anyio.to_thread.run_sync(self.held.wait, 30)


class TwoDevices(FakeEngine):
    """Trains each run on a device of its own, and samples on another."""

    def __init__(self, hook: Gate) -> None:
        super().__init__(hook=hook)
        self._other = FakeEngine()
        for name in ("publish", "release", "sample"):
            setattr(self, name, getattr(self._other, name))

    def lane(self, run_id: str, base_model: str) -> str:
        return run_id


async def test_training_and_sampling_overlap_where_an_engine_has_two_devices(home: Path) -> None:
    gate = Gate("forward_backward")
    with anyio.fail_after(30):
        async with LocalService(TwoDevices(gate), home=home) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            held = await caller.start(GRADIENT, run)
            await gate.until_held()
            params = SamplingParams(max_tokens=4, seed=0)
            prompt = ModelInput.from_ints([1])
            sample = Sample(sampler_id="base:fake", prompt=prompt, params=params)
            await caller.do(sample, Sampled)
            gate.open.set()
            assert isinstance(await caller.result(held), GradientsDone)


async def test_on_one_device_a_sample_waits_for_the_call_that_runs(home: Path) -> None:
    gate = Gate("forward_backward")
    with anyio.fail_after(30):
        async with LocalService(FakeEngine(hook=gate), home=home) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            held = await caller.start(GRADIENT, run)
            await gate.until_held()
            params = SamplingParams(max_tokens=4, seed=0)
            prompt = ModelInput.from_ints([1])
            sample = Sample(sampler_id="base:fake", prompt=prompt, params=params)
            sampled = await caller.start(sample)
            await anyio.sleep(0.1)
            assert not await service.collect(caller.session_id, after=1, timeout_s=0)
            gate.open.set()
            assert isinstance(await caller.result(sampled), Sampled)
            assert isinstance(await caller.result(held), GradientsDone)


async def test_a_job_that_nobody_waits_for_is_dropped() -> None:
    engine = FakeEngine()
    assert await engine.publish("w", BASE) == 0
    told: list[SampleProgress] = []
    drop = engine.sample(job("w", tokens=10**6), told.append)
    await anyio.sleep(0.01)
    drop()
    drop()
    del told[:]
    await engine.release("w")
    assert not engine.sampler.busy and not engine.sampler.weights_ids
    assert not told


async def test_samples_that_are_asked_for_at_once_begin_at_the_same_step(home: Path) -> None:
    record = Recorder()
    params = SamplingParams(max_tokens=2, seed=0)
    sample = Sample(sampler_id="base:fake", prompt=ModelInput.from_ints([1]), params=params)
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        for count in (1, 500, 500):
            begin = len(record.calls)
            for submission_id in await caller.send(*(caller.stamp(sample) for _ in range(count))):
                await caller.result(submission_id)
            names = [name for name, _ in record.calls[begin:] if name in ("add", "step")]
            assert names[:count] == ["add"] * count
            assert names[count:].count("step") == len(names) - count


async def test_a_snapshot_is_published_once_and_only_the_newest() -> None:
    engine = FakeEngine()
    await engine.create_run("r", "fake", training_mode="lora", lora_config=None, seed=0)
    old, new = await engine.snapshot("r"), await engine.snapshot("r")
    with pytest.raises(NotFoundError):
        await engine.publish("old", old)
    assert await engine.publish("new", new) == 0
    with pytest.raises(NotFoundError):
        await engine.publish("again", new)


async def test_a_step_that_fails_fails_its_jobs_and_the_engine_goes_on() -> None:
    def fail(name: str, argument: object) -> None:
        if name == "step":
            raise ZeroDivisionError("by a defect")

    engine = FakeEngine(hook=fail)
    await engine.publish("w", BASE)
    assert "by a defect" in str((await end_of(engine, job("w"))).error)
    engine.hook = lambda name, argument: None
    assert (await end_of(engine, job("w"))).result is not None


async def test_a_cancelled_call_is_dropped_unless_it_has_begun() -> None:
    gate = Gate("create_run")
    engine = FakeEngine(hook=gate)
    create = partial(engine.create_run, training_mode="lora", lora_config=None, seed=0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(create, "begun", "fake")
        await gate.until_held()
        tasks.start_soon(create, "waiting", "fake")
        await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    gate.open.set()
    await engine.clear_gradients("begun")
    with pytest.raises(KeyError):
        await engine.clear_gradients("waiting")


async def test_a_closed_engine_refuses_by_name() -> None:
    engine = FakeEngine()
    await engine.publish("w", BASE)
    engine.close()
    with pytest.raises(ClosedError):
        await engine.publish("v", BASE)
    with pytest.raises(ClosedError):
        engine.sample(job("w"), print)


async def test_lanes_of_an_engine_do_not_wait_for_each_other(home: Path) -> None:
    gate = Gate("gradient")

    class Lanes(TwoDevices):
        async def forward_backward(self, jobs):  # type: ignore[no-untyped-def]
            train = partial(self.trainer._forward_backward, jobs[0])
            return [await anyio.to_thread.run_sync(train)]

    with anyio.fail_after(30):
        async with LocalService(Lanes(gate), home=home, deterministic=True) as service:
            caller = await Caller.open(service)
            one, other = await caller.create(), await caller.create()
            held = await caller.start(GRADIENT, one)
            await gate.until_held()
            gate.name = ""
            await caller.do(FORWARD, GradientsDone, run_id=other)
            gate.open.set()
            assert isinstance(await caller.result(held), GradientsDone)
