"""What `LocalService` adds to the contract: merging, fairness, gaps, limits, closing, faults."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.contracts.caller import BAD_GRADIENT, FORWARD, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from tests.server.test_checkpoints import Clock
from weaver.engine.base import GradientJob
from weaver.errors import ClosedError, StorageError, WeaverError
from weaver.protocol import (
    CheckpointSaved,
    ForwardBackward,
    GradientsDone,
    Sample,
    Sampled,
    SaveCheckpoint,
    StepDone,
    Submission,
)
from weaver.server.journal import Journal
from weaver.server.service import LocalService
from weaver.server.settings import Limits
from weaver.types import AdamParams, Datum, ModelInput, OptimStepResult, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from weaver.protocol import Operation, Outcome

pytestmark = pytest.mark.anyio
HI = ModelInput.from_ints(list(b"hi"))
SHORT = Sample(sampler_id="base:fake", prompt=HI, params=SamplingParams(max_tokens=4))
LONG = Sample(sampler_id="base:fake", prompt=HI, params=SamplingParams(max_tokens=4000, seed=0))


class Recorder:
    """Remembers the engine's calls; can hold it in one of them, and fail others."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self.hold: str | None = None
        self.held, self.go_on = threading.Event(), threading.Event()
        self.fail: Callable[[str, object], None] = lambda name, argument: None

    def __call__(self, name: str, argument: object) -> None:
        self.calls.append((name, argument))
        if name == self.hold:
            self.held.set()
            assert self.go_on.wait(20)
        self.fail(name, argument)

    async def until_held(self) -> None:
        assert await anyio.to_thread.run_sync(self.held.wait, 20)

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)

    @property
    def batches(self) -> list[list[str]]:
        """The runs of each gradient pass."""
        return [
            [job.run_id for job in argument if isinstance(job, GradientJob)]
            for name, argument in self.calls
            if name == "forward_backward" and isinstance(argument, list)
        ]


async def test_a_resend_may_name_the_same_things_in_another_order(home: Path) -> None:
    def operation(turn: int) -> ForwardBackward:
        inputs = {"target_tokens": [1] * 20, "weights": [0.5] * 20}
        inputs = dict(list(inputs.items())[::turn])
        datum = Datum(model_input=[1] * 20, loss_fn_inputs=inputs)
        return ForwardBackward(datums=(datum,), loss_fn="cross_entropy")

    async with LocalService(FakeEngine(), home=home) as service:
        caller = await Caller.open(service)
        sent = caller.stamp(operation(1), await caller.create())
        for turn in (1, -1):
            again = sent.model_copy(update={"operation": operation(turn)})
            await service.submit(caller.session_id, [again])
        assert isinstance(await caller.result(sent.id), GradientsDone)


async def test_a_run_is_active_while_its_weights_sample(home: Path) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        run, other = await caller.create(), await caller.create()
        sampler = await caller.save(run, "sampler")
        record.hold = "step"
        sample = await caller.start(SHORT.model_copy(update={"sampler_id": sampler}))
        await record.until_held()
        assert (await service.get_run(run)).status == "active"
        assert {r.run_id: r.status for r in await service.list_runs()} == {
            run: "active",
            other: "idle",
        }
        record.hold = None
        record.go_on.set()
        await caller.result(sample)
        assert (await service.get_run(run)).status == "idle"


@pytest.mark.parametrize("deterministic", [False, True])
async def test_runs_share_a_pass_unless_results_must_not_depend_on_it(
    home: Path, deterministic: bool
) -> None:
    record = Recorder()
    engine = FakeEngine(models=("fake", "other"), hook=record)
    async with LocalService(engine, home=home, deterministic=deterministic) as service:
        caller = await Caller.open(service)
        runs = [await caller.create(model) for model in ("fake", "other", "fake", "fake")]
        record.hold = "forward_backward"
        first = await caller.start(FORWARD, runs[1])
        await record.until_held()
        ids = await caller.send(*(caller.stamp(GRADIENT, run) for run in runs))
        record.go_on.set()
        for submission_id in (first, *ids):
            await caller.result(submission_id)
    fakes = [runs[0], runs[2], runs[3]]
    alone = [[run] for run in (runs[1], *fakes)]
    wanted = alone if deterministic else [[runs[1]], fakes]
    assert sorted(record.batches[1:]) == sorted(wanted)


class Watched(FakeEngine):
    """Remembers the runs of each call for optimizer steps."""

    def __init__(self, hook: Callable[[str, object], None]) -> None:
        super().__init__(hook=hook)
        self.stepped: list[list[str]] = []

    async def optim_step(
        self, steps: Sequence[tuple[str, AdamParams]]
    ) -> Sequence[OptimStepResult | WeaverError]:
        self.stepped.append([run_id for run_id, _ in steps])
        return await super().optim_step(steps)


async def test_steps_of_runs_share_a_call_and_fail_by_themselves(home: Path) -> None:
    record = Recorder()
    engine = Watched(record)
    async with LocalService(engine, home=home) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(5)]
        empty, bad, *good = runs
        for run in good:
            await caller.do(GRADIENT, GradientsDone, run_id=run)
        assert await caller.refused(BAD_GRADIENT, run_id=bad)
        record.hold = "forward_backward"
        first = await caller.start(GRADIENT, good[0])
        await record.until_held()
        steps = [await caller.start(STEP, run) for run in runs]
        record.hold = None
        record.go_on.set()
        outcomes = [await caller.outcome(step) for step in steps]
        codes = [outcome.error and outcome.error.code for outcome in outcomes]
        assert codes == ["no_gradients", "gradients_discarded", None, None, None]
        assert [sorted(call) for call in engine.stepped] == [sorted([empty, *good])]
        assert await caller.result(first)
        assert [(await service.get_run(run)).step for run in runs] == [0, 0, 1, 1, 1]


async def test_a_merged_pass_with_a_defect_poisons_each_run_in_it(home: Path) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(3)]
        record.hold = "forward_backward"
        await caller.start(FORWARD, runs[0])
        await record.until_held()

        def fail(name: str, argument: object) -> None:
            if name == "forward_backward" and isinstance(argument, list) and len(argument) == 2:
                raise MemoryError("no memory")

        record.fail = fail
        ids = await caller.send(*(caller.stamp(GRADIENT, run) for run in runs[1:]))
        record.go_on.set()
        for submission_id in ids:
            error = (await caller.outcome(submission_id)).error
            assert error is not None and error.code == "engine_error"
        for run in runs[1:]:
            assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
            await caller.do(GRADIENT, GradientsDone, run_id=run)
            await caller.do(STEP, StepDone, run_id=run)


async def test_a_run_is_created_in_its_own_lane_of_the_engine(home: Path) -> None:
    engine, asked = FakeEngine(), list[tuple[str, str]]()

    def lane(run_id: str, base_model: str) -> str:
        asked.append((run_id, base_model))
        return run_id

    engine.lane = lane  # type: ignore[method-assign]
    async with LocalService(engine, home=home) as service:
        caller = await Caller.open(service)
        runs = [await caller.create() for _ in range(2)]
    assert asked == [(run, "fake") for run in runs]


async def test_a_missing_operation_is_given_up_by_name(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home, gap_timeout_s=0.05) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        missing = caller.stamp(GRADIENT, run)
        assert await caller.refused(STEP, run_id=run) == "operation_failed"
        late = await caller.outcome((await caller.send(missing))[0])
        assert late.error is not None and late.error.code == "conflict"
        assert await caller.refused(STEP, run_id=run) == "gradients_discarded"
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)
        assert (await service.get_run(run)).status == "idle"


async def test_the_error_of_a_gap_names_what_is_missing(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home, gap_timeout_s=0.05) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        stamped = [caller.stamp(GRADIENT, run) for _ in range(4)]
        await caller.send(stamped[0], stamped[3])
        error = (await caller.outcome(stamped[3].id)).error
        assert error is not None and "seq 4 waited for seq 2" in error.message


async def test_a_gap_that_is_filled_in_time_is_none(home: Path) -> None:
    async with LocalService(FakeEngine(), home=home, gap_timeout_s=0.2) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        first, second, third, fourth = [caller.stamp(GRADIENT, run) for _ in range(4)]
        await caller.send(second)
        await anyio.sleep(0.12)
        await caller.send(first, fourth)
        await anyio.sleep(0.12)  # past the first deadline, within that of the second gap
        await caller.send(third)
        for submission in (first, second, third, fourth):
            await caller.result(submission.id)


async def test_loaded_weights_are_bounded(home: Path) -> None:
    engine = FakeEngine(models=[f"m{i}" for i in range(6)])
    limits = Limits(unnamed_samplers=3)
    async with LocalService(engine, home=home, loaded_samplers=2, limits=limits) as service:
        caller = await Caller.open(service)
        for i in (0, 1, 2, 0, 3, 4, 0):
            await caller.do(SHORT.model_copy(update={"sampler_id": f"base:m{i}"}), Sampled)
        assert {id.split("#")[0] for id in engine.sampler.weights_ids} == {"base:m4", "base:m0"}
        run = await caller.create("m0")
        paths = [await caller.save(run, "sampler") for _ in range(5)]
        assert await caller.refused(SHORT.model_copy(update={"sampler_id": paths[1]})) == (
            "checkpoint_not_found"
        )
        for path in paths[2:]:
            await caller.do(SHORT.model_copy(update={"sampler_id": path}), Sampled)
        await service.close_session(caller.session_id)
        other = await Caller.open(service)
        await other.do(SHORT.model_copy(update={"sampler_id": "base:m0"}), Sampled)
        assert len(engine.sampler.weights_ids) <= 2


async def test_a_sampler_ends_with_the_life_of_its_checkpoint(home: Path) -> None:
    clock = Clock()
    async with LocalService(FakeEngine(), home=home, now=clock) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        save = SaveCheckpoint(purpose="sampler", name="x", ttl_seconds=60)
        path = (await caller.do(save, CheckpointSaved, run_id=run)).checkpoint.path
        sample = SHORT.model_copy(update={"sampler_id": path})
        await caller.do(sample, Sampled)
        clock.time += timedelta(seconds=59)
        await service.set_checkpoint_ttl(path, 60)
        clock.time += timedelta(seconds=59)
        await caller.do(sample, Sampled)
        clock.time += timedelta(seconds=1)
        assert await caller.refused(sample) == "checkpoint_not_found"


# --- faults -------------------------------------------------------------------------------------


async def test_a_full_disk_fails_one_save(home: Path) -> None:
    record = Recorder()
    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        run = await caller.create()

        def fail(name: str, argument: object) -> None:
            if name == "write":
                raise OSError(28, "No space left on device")

        record.fail = fail
        save = SaveCheckpoint(purpose="state", name="x")
        assert await caller.refused(save, run_id=run) == "storage_error"
        record.fail = lambda name, argument: None
        await caller.do(save, CheckpointSaved, run_id=run)


@pytest.mark.parametrize(
    "name", ["optim_step", "save", "write", "load_sampler", "encode", "add", "step"]
)
async def test_a_defect_of_the_engine_is_an_outcome(
    home: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = Recorder()

    def fail(called: str, argument: object) -> None:
        if called == name:
            raise ZeroDivisionError("a defect")

    async with LocalService(FakeEngine(hook=record), home=home) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        operation = SHORT.model_copy(update={"prompt": "hi"})
        operations: dict[str, Operation] = {
            "optim_step": STEP,
            "save": SaveCheckpoint(purpose="state"),
            "write": SaveCheckpoint(purpose="state"),
        }
        record.fail = fail
        with caplog.at_level(logging.ERROR):
            if name in operations:
                await caller.do(GRADIENT, GradientsDone, run_id=run)
                assert await caller.refused(operations[name], run_id=run) == "engine_error"
            else:
                assert await caller.refused(operation) == "engine_error"
        assert "ZeroDivisionError" in caplog.text
        record.fail = lambda name, argument: None
        await caller.do(operation, Sampled)
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)


class FailingStore(Journal):
    failing = False

    async def append(self, session_id: str, submissions: Sequence[Submission]) -> None:
        if self.failing:
            raise StorageError("the journal is full.")
        await super().append(session_id, submissions)


async def test_what_cannot_be_journaled_is_not_accepted(home: Path) -> None:
    store = FailingStore()
    async with LocalService(FakeEngine(), home=home, store=store) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        submission = caller.stamp(GRADIENT, run)
        store.failing = True
        with pytest.raises(StorageError):
            await caller.send(submission)
        store.failing = False
        await caller.result((await caller.send(submission))[0])


# --- closing ------------------------------------------------------------------------------------


async def test_closing_ends_every_wait(home: Path) -> None:
    errors: list[BaseException] = []
    engine = FakeEngine()

    async def wait(work: Callable[[], object]) -> None:
        try:
            await work()  # type: ignore[misc]
        except ClosedError as error:
            errors.append(error)

    async with LocalService(engine, home=home) as service:
        caller = await Caller.open(service)
        await caller.create()
        streamed = await caller.start(LONG.model_copy(update={"stream": True}))

        async def read() -> None:
            async for _ in service.stream(caller.session_id, streamed):
                pass

        async def collect() -> Sequence[Outcome]:
            return await service.collect(caller.session_id, after=caller.cursor, timeout_s=60)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, read)
            tasks.start_soon(wait, collect)
            await anyio.sleep(0.02)
            with anyio.fail_after(10):  # the readers would wait for a minute
                await service.aclose()
        assert len(errors) == 2
        await service.aclose()
        for call in (service.list_models, service.open_session, service.list_checkpoints):
            with pytest.raises(ClosedError):
                await call()
    assert not engine.sampler.busy and not engine.sampler.weights_ids


@pytest.mark.parametrize("name", ["forward_backward", "step"])
async def test_closing_does_not_wait_for_a_long_engine_call(home: Path, name: str) -> None:
    record = Recorder()
    with anyio.fail_after(30):  # the call is held until it is let go below
        async with LocalService(FakeEngine(hook=record), home=home) as service:
            caller = await Caller.open(service)
            run = await caller.create()
            record.hold = name
            if name == "step":
                await caller.start(SHORT)
            else:
                await caller.start(GRADIENT, run)
            await record.until_held()
    count = len(record.calls)
    record.go_on.set()
    await anyio.sleep(0.02)
    later = {called for called, _ in record.calls[count:]}
    assert later <= {"gradient", "cancel"}  # the end of the call, and of what it was made for


async def test_an_error_in_the_body_leaves_as_it_is(home: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with LocalService(FakeEngine(), home=home) as service:
            await (await Caller.open(service)).start(LONG)
            raise ZeroDivisionError


async def test_a_service_can_be_cancelled_while_it_opens(home: Path) -> None:
    for pauses in range(12):
        with anyio.fail_after(20), anyio.CancelScope() as scope:

            async def cancel(pauses: int = pauses, scope: anyio.CancelScope = scope) -> None:
                for _ in range(pauses):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                async with LocalService(FakeEngine(), home=home / str(pauses)):
                    await anyio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_cancelled_body_ends_the_service(home: Path) -> None:
    stepped = threading.Event()
    engine = FakeEngine(hook=lambda name, argument: stepped.set() if name == "step" else None)
    with anyio.CancelScope() as scope:
        async with LocalService(engine, home=home) as service:
            await (await Caller.open(service)).start(LONG)
            assert await anyio.to_thread.run_sync(stepped.wait, 20)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught and not engine.sampler.busy


async def test_expired_checkpoints_are_swept(home: Path) -> None:
    clock = Clock()
    async with LocalService(FakeEngine(), home=home, now=clock, sweep_every_s=0.01) as service:
        caller = await Caller.open(service)
        run = await caller.create()
        save = SaveCheckpoint(purpose="sampler", name="x", ttl_seconds=60)
        await caller.do(save, CheckpointSaved, run_id=run)
        clock.time += timedelta(seconds=60)
        await anyio.sleep(0.3)
        assert not (home / "runs" / run / "sampler" / "x").exists()
