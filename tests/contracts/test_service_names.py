"""The contract of `Service`: what runs are called, and curves that go back with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.contracts.caller import GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from weaver.errors import InvalidNameError, RunNotFoundError
from weaver.protocol import (
    CheckpointLoaded,
    CreateModel,
    GradientsDone,
    LoadCheckpoint,
    ModelCreated,
    StepDone,
)
from weaver.types import MetricPoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.contracts.conftest import ServiceOpener
    from weaver.protocol import Service
    from weaver.types import TrainingRun

pytestmark = pytest.mark.anyio
BAD = [
    "",
    " ",
    "x" * 129,
    "a\nb",
    "a\x00b",
    " words",
    "words ",
    "run-0123456789ab",
    "weaver://a/b/c",
]


async def create(caller: Caller, name: str | None, *, told: object = None) -> TrainingRun:
    """`told` is the name in its metadata."""
    metadata = {} if told is None else {"name": told}
    operation = CreateModel(base_model="fake", name=name, user_metadata=metadata)
    return (await caller.do(operation, ModelCreated)).run


async def names(service: Service) -> list[str | None]:
    return [run.name for run in await service.list_runs()]


async def test_a_name_is_one_runs_alone(caller: Caller, service: Service) -> None:
    first = await create(caller, "words")
    await create(caller, "words")
    await create(caller, None)
    assert (await create(caller, "words")).name == "words-3"
    assert (await create(caller, "Wörter 100 %_")).name == "Wörter 100 %_"
    assert await names(service) == ["words", "words-2", None, "words-3", "Wörter 100 %_"]
    await service.delete_run(first.run_id)
    assert (await create(caller, "words")).name == "words"
    long = "x" * 128
    assert [(await create(caller, long)).name for _ in range(2)] == [long, f"{'x' * 126}-2"]


async def test_two_at_a_time_get_two_names(caller: Caller, service: Service) -> None:
    other = await Caller.open(service)
    operation = CreateModel(base_model="fake", name="words")
    started = [(one, await one.start(operation)) for one in (caller, other) for _ in range(3)]
    for one, submission in started:
        await one.result(submission)
    assert sorted(map(str, await names(service))) == ["words", *(f"words-{n}" for n in range(2, 7))]


async def test_a_run_may_be_called_otherwise(caller: Caller, service: Service) -> None:
    first, second = await create(caller, "words"), await create(caller, None)
    assert (await service.rename_run(second.run_id, "words")).name == "words-2"
    assert (await service.rename_run(second.run_id, "words")).name == "words-2"
    assert (await service.rename_run(first.run_id, "letters")).name == "letters"
    assert (await service.rename_run(second.run_id, "words")).name == "words"
    assert await names(service) == ["letters", "words"]
    with pytest.raises(RunNotFoundError):
        await service.rename_run("run-0", "x")


async def test_bad_names_are_refused(caller: Caller, service: Service) -> None:
    run = await create(caller, "words")
    for name in BAD:
        assert await caller.refused(CreateModel(base_model="fake", name=name)) == "invalid_name"
        with pytest.raises(InvalidNameError, match="name: is"):
            await service.rename_run(run.run_id, name)
    assert await names(service) == ["words"]


async def test_a_name_in_the_metadata_is_one(caller: Caller) -> None:
    """So clients of protocols without a field for it give one; whatever else is there is none."""
    assert (await create(caller, None, told=" two\nwords ")).name == "two words"
    assert (await create(caller, "mine", told="words")).name == "mine"
    for other in ("", "run-0123456789ab", "\x00", 7, ["words"]):
        assert (await create(caller, None, told=other)).name is None


async def test_names_are_there_after_a_restart(open_service: ServiceOpener, home: Path) -> None:
    async with open_service(FakeEngine(), home) as service:
        caller = await Caller.open(service)
        run = await create(caller, "words")
        await service.rename_run(run.run_id, "letters")
        await caller.do(GRADIENT, GradientsDone, run_id=run.run_id)
        await caller.do(STEP, StepDone, run_id=run.run_id)
    async with open_service(FakeEngine(), home) as service:
        if kept := await service.list_runs():  # one in memory keeps nothing
            assert [(run.name, run.step) for run in kept] == [("letters", 1)]
            assert (await create(await Caller.open(service), "letters")).name == "letters-2"


async def test_a_curve_goes_back_with_its_run(caller: Caller, service: Service) -> None:
    run = await caller.create()
    other = await caller.create()
    path = await caller.save(run)
    for step in (1, 2, 3):
        await service.log_metrics(run, [MetricPoint(name="reward", value=0.1, step=step)])
    await service.log_metrics(run, [MetricPoint(name="note", value=1.0)])
    await service.log_metrics(other, [MetricPoint(name="reward", value=0.1, step=3)])
    await caller.do(GRADIENT, GradientsDone, run_id=run)
    await caller.do(STEP, StepDone, run_id=run)
    await caller.do(LoadCheckpoint(path=path), CheckpointLoaded, run_id=run)
    await service.rewind_metrics(run, 1)
    left = [(point.name, point.step) for point in await service.read_metrics(run)]
    assert left == [("reward", 1), ("note", None)]
    assert len(await service.read_metrics(other)) == 1
    with pytest.raises(RunNotFoundError):
        await service.rewind_metrics("run-0", 1)
