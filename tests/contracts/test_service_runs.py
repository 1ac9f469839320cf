"""The contract of `Service`: models, runs, metrics, checkpoints."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.contracts.caller import FORWARD, GRADIENT, STEP, Caller
from tests.fake_engine import FakeEngine
from weaver.client.exports import export_to
from weaver.errors import (
    CheckpointNotFoundError,
    InvalidNameError,
    NotFoundError,
    RunNotFoundError,
    StorageError,
    UnknownModelError,
)
from weaver.protocol import (
    CheckpointLoaded,
    CheckpointSaved,
    CreateModel,
    ForwardBackward,
    GradientsDone,
    LoadCheckpoint,
    ModelCreated,
    OpenSampler,
    SaveCheckpoint,
    StepDone,
    Submission,
)
from weaver.types import LoraConfig, MetricPoint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.contracts.conftest import ServiceOpener
    from weaver.protocol import Operation, Service

pytestmark = pytest.mark.anyio


async def train(caller: Caller, run: str, steps: int = 1) -> None:
    for _ in range(steps):
        await caller.do(GRADIENT, GradientsDone, run_id=run)
        await caller.do(STEP, StepDone, run_id=run)


async def loss(caller: Caller, run: str) -> float:
    return (await caller.do(FORWARD, GradientsDone, run_id=run)).output.metrics["loss"]


async def test_models(service: Service) -> None:
    assert [model.name for model in await service.list_models()] == ["fake", "other"]
    assert (await service.get_model("other")).context_length == 64
    assert "tokenizer.json" in await service.tokenizer_files("fake")
    with pytest.raises(UnknownModelError, match=r"Did you mean 'fake'\?"):
        await service.get_model("fakee")


async def test_a_run_describes_itself(caller: Caller, service: Service) -> None:
    operation = CreateModel(
        base_model="fake", lora_config=LoraConfig(rank=4), user_metadata={"who": "me"}
    )
    created = await caller.do(operation, ModelCreated)
    full = await caller.do(CreateModel(base_model="fake", training_mode="full_ft"), ModelCreated)
    assert [run.run_id for run in await service.list_runs()] == [
        created.run.run_id,
        full.run.run_id,
    ]
    await train(caller, created.run.run_id)
    run = await service.get_run(created.run.run_id)
    assert run.step == 1 and run.status == "idle" and run.user_metadata == {"who": "me"}
    assert run.lora_config == LoraConfig(rank=4) and full.run.lora_config is None
    assert run.last_request_at > run.created_at
    with pytest.raises(RunNotFoundError):
        await service.get_run("run-0")


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (CreateModel(base_model="fakee"), "unknown_model"),
        (
            CreateModel(base_model="fake", training_mode="full_ft", lora_config=LoraConfig()),
            "invalid_params",
        ),
        (GRADIENT, "invalid_request"),
    ],
)
async def test_operations_without_a_run_are_refused_by_name(
    caller: Caller, operation: Operation, code: str
) -> None:
    assert await caller.refused(operation) == code


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (ForwardBackward(datums=(), loss_fn="cross_entropy"), "invalid_datum"),
        (ForwardBackward(datums=GRADIENT.datums, loss_fn="crossentropy"), "unknown_loss"),
        (
            ForwardBackward(datums=GRADIENT.datums, loss_fn="ppo", loss_fn_config={"clip": 1}),
            "invalid_loss_config",
        ),
        (ForwardBackward(datums=GRADIENT.datums, loss_fn="ppo"), "invalid_datum"),
        (SaveCheckpoint(purpose="state", name="../x"), "invalid_name"),
        (SaveCheckpoint(purpose="state", name=".x"), "invalid_name"),
        (SaveCheckpoint(purpose="state", name="x" * 129), "invalid_name"),
        (LoadCheckpoint(path="weaver://a/b/c"), "invalid_name"),
        (LoadCheckpoint(path="weaver://a/weights/.."), "invalid_name"),
        (LoadCheckpoint(path="weaver://a/weights/c"), "checkpoint_not_found"),
        (LoadCheckpoint(path="/nowhere"), "checkpoint_not_found"),
        (CreateModel(base_model="fake"), "invalid_request"),
    ],
)
async def test_bad_operations_of_a_run_leave_it_as_it_was(
    caller: Caller, operation: Operation, code: str
) -> None:
    run = await caller.create()
    await train(caller, run)
    before = await loss(caller, run)
    assert await caller.refused(operation, run_id=run) == code
    assert await loss(caller, run) == before


async def test_an_unknown_run_is_refused(caller: Caller) -> None:
    outcome = await caller.outcome(
        (await caller.send(Submission(id="x", operation=STEP, run_id="run-0", seq=1)))[0]
    )
    assert outcome.error is not None and outcome.error.code == "run_not_found"


async def test_metrics(caller: Caller, service: Service) -> None:
    run = await caller.create()
    await service.log_metrics(run, [MetricPoint(name="reward", value=0.5, step=1)])
    await service.log_metrics(run, [MetricPoint(name="other", value=1.0)])
    (point,) = await service.read_metrics(run, name="reward")
    assert (point.value, point.step) == (0.5, 1) and point.occurred_at is not None
    assert len(await service.read_metrics(run)) == 2
    with pytest.raises(RunNotFoundError):
        await service.log_metrics("run-0", [])


async def test_a_state_comes_back_with_its_optimizer(caller: Caller) -> None:
    run = await caller.create()
    await train(caller, run, steps=2)
    path = await caller.save(run, name="two")
    assert path == f"weaver://{run}/weights/two"
    await train(caller, run)
    after_three = await loss(caller, run)
    load = LoadCheckpoint(path=path, include_optimizer=True)
    loaded = await caller.do(load, CheckpointLoaded, run_id=run)
    assert loaded.checkpoint.step == 2
    await train(caller, run)
    assert await loss(caller, run) == after_three
    await caller.do(LoadCheckpoint(path=path), CheckpointLoaded, run_id=run)
    await train(caller, run)
    assert await loss(caller, run) != after_three  # Adam began anew


async def test_loading_clears_a_batch_that_lacks_a_part(caller: Caller) -> None:
    run = await caller.create()
    path = await caller.save(run)
    await caller.refused(ForwardBackward(datums=(), loss_fn="cross_entropy"), run_id=run)
    await caller.do(LoadCheckpoint(path=path), CheckpointLoaded, run_id=run)
    await train(caller, run)


async def test_a_name_is_taken_once_unless_overwritten(caller: Caller, service: Service) -> None:
    run = await caller.create()
    path = await caller.save(run, name="x")
    operation = SaveCheckpoint(purpose="state", name="x")
    assert await caller.refused(operation, run_id=run) == "name_taken"
    await train(caller, run)
    again = operation.model_copy(update={"overwrite": True})
    await caller.do(again, CheckpointSaved, run_id=run)
    assert (await service.get_checkpoint(path)).step == 1
    assert len(await service.list_checkpoints()) == 1


async def test_checkpoints_are_listed_and_deleted(caller: Caller, service: Service) -> None:
    run, other = await caller.create(), await caller.create()
    await caller.save(run, name="a")
    await caller.save(run, "sampler", name="a")
    await caller.save(run, "sampler")  # without a name it is no checkpoint
    unnamed = await caller.save(other)
    listed = await service.list_checkpoints(run)
    assert [(c.name, c.kind) for c in listed] == [("a", "weights_and_optimizer"), ("a", "sampler")]
    assert all(c.size_bytes > 0 and c.run_id == run for c in listed)
    assert len(await service.list_checkpoints()) == 3
    await service.delete_checkpoint(unnamed)
    for call in (service.delete_checkpoint, service.get_checkpoint):
        with pytest.raises(CheckpointNotFoundError):
            await call(unnamed)
    with pytest.raises(InvalidNameError):
        await service.get_checkpoint("weaver://../weights/x")
    assert await caller.refused(LoadCheckpoint(path=unnamed), run_id=other) == (
        "checkpoint_not_found"
    )


async def test_a_lifetime_can_be_set_and_lifted(caller: Caller, service: Service) -> None:
    run = await caller.create()
    operation = SaveCheckpoint(purpose="state", name="x", ttl_seconds=60)
    saved = (await caller.do(operation, CheckpointSaved, run_id=run)).checkpoint
    assert saved.expires_at is not None
    assert (saved.expires_at - saved.created_at).total_seconds() == 60
    lifted = await service.set_checkpoint_ttl(saved.path, None)
    assert lifted.expires_at is None and lifted.ttl_seconds is None
    assert await service.get_checkpoint(saved.path) == lifted


@pytest.mark.parametrize(
    "other",
    [
        {"base_model": "other"},
        {"base_model": "fake", "training_mode": "full_ft"},
        {"base_model": "fake", "lora_config": LoraConfig(rank=4)},
    ],
)
async def test_a_checkpoint_of_another_architecture_is_refused(
    caller: Caller, other: dict[str, Any]
) -> None:
    path = await caller.save(await caller.create())
    run = (await caller.do(CreateModel(**other), ModelCreated)).run.run_id
    assert await caller.refused(LoadCheckpoint(path=path), run_id=run) == "checkpoint_mismatch"


async def test_an_optimizer_that_was_not_saved_cannot_be_loaded(caller: Caller) -> None:
    run = await caller.create()
    operation = SaveCheckpoint(purpose="state", include_optimizer=False)
    saved = (await caller.do(operation, CheckpointSaved, run_id=run)).checkpoint
    assert saved.kind == "weights"
    load = LoadCheckpoint(path=saved.path, include_optimizer=True)
    assert await caller.refused(load, run_id=run) == "checkpoint_mismatch"


async def test_a_later_service_finds_what_an_earlier_one_saved(
    open_service: ServiceOpener, home: Path
) -> None:
    async with open_service(FakeEngine(), home) as first:
        caller = await Caller.open(first)
        run = await caller.create()
        await train(caller, run, steps=3)
        path, before = await caller.save(run, name="x"), await loss(caller, run)
    async with open_service(FakeEngine(), home) as second:
        caller = await Caller.open(second)
        run = await caller.create()
        load = LoadCheckpoint(path=path, include_optimizer=True)
        assert (await caller.do(load, CheckpointLoaded, run_id=run)).checkpoint.step == 3
        assert await loss(caller, run) == before
        assert [c.path for c in await second.list_checkpoints()] == [path]


async def test_a_run_that_was_stopped_lost_what_waited_and_comes_back(
    caller: Caller, service: Service
) -> None:
    run = await caller.create()
    await train(caller, run)
    before = await loss(caller, run)
    gap = caller.stamp(GRADIENT, run)  # never sent: what follows waits for it
    waiting = await caller.start(STEP, run)
    assert (await service.stop_run(run)).status == "stopped"
    stopped = await caller.outcome(waiting)
    assert stopped.error is not None and stopped.error.code == "cancelled"
    assert [r.status for r in await service.list_runs()] == ["stopped"]
    await caller.send(gap.model_copy(update={"operation": None}))
    assert await loss(caller, run) == before
    assert (await service.get_run(run)).status == "idle"
    with pytest.raises(RunNotFoundError):
        await service.stop_run("run-0")


@pytest.mark.parametrize("checkpoints", [False, True])
async def test_a_run_that_was_deleted_is_as_if_it_had_never_been(
    caller: Caller, service: Service, engine: FakeEngine, checkpoints: bool
) -> None:
    run, other = await caller.create(), await caller.create()
    await train(caller, run)
    await service.log_metrics(run, [MetricPoint(name="loss", value=1.0)])
    path, sampler = await caller.save(run), await caller.save(run, "sampler", name="s")
    kept = await caller.save(other)
    await service.delete_run(run, checkpoints=checkpoints)
    assert [r.run_id for r in await service.list_runs()] == [other]
    with pytest.raises(KeyError):
        engine.trainer.step(run)
    for call in (service.get_run, service.stop_run, service.delete_run, service.read_metrics):
        with pytest.raises(RunNotFoundError, match="no run is called"):
            await call(run)
    assert await caller.refused(STEP, run_id=run) == "run_not_found"
    left = [c.path for c in await service.list_checkpoints()]
    assert left == ([kept] if checkpoints else [path, sampler, kept])
    refused = {"checkpoint_not_found"} if checkpoints else {None}
    for operation in (LoadCheckpoint(path=path), OpenSampler(model_path=sampler)):
        run_id = other if isinstance(operation, LoadCheckpoint) else None
        outcome = await caller.outcome(await caller.start(operation, run_id))
        assert (outcome.error and outcome.error.code) in refused


async def test_sessions_are_listed_until_they_end(caller: Caller, service: Service) -> None:
    about = {"who": "me", "$": [1, None, {"x": "é"}]}
    other = Caller(service, (await service.open_session(user_metadata=about)).session_id)
    run = await caller.create()
    await caller.save(run, "sampler")
    listed = {s.session_id: s for s in await service.list_sessions()}
    assert listed.keys() == {caller.session_id, other.session_id}
    assert listed[caller.session_id].unnamed_samplers == 1
    assert listed[caller.session_id].pending == listed[other.session_id].unnamed_samplers == 0
    assert listed[other.session_id].user_metadata == about
    assert listed[caller.session_id].user_metadata == {}
    await service.close_session(other.session_id)
    assert [s.session_id for s in await service.list_sessions()] == [caller.session_id]


async def test_a_checkpoint_is_exported_as_it_is_or_merged(
    caller: Caller, service: Service, engine: FakeEngine, tmp_path: Path
) -> None:
    merges = []
    engine.hook = lambda name, folder: merges.append(folder) if name == "merge_adapter" else None
    run = await caller.create()
    await train(caller, run)
    path = await caller.save(run, name="one")
    adapter, model = tmp_path / "adapter", tmp_path / "a" / "model"
    await export_to(service, path, adapter, merge=False)
    assert {f.name for f in adapter.iterdir()} == {"weight.npy", "state.json", "optimizer.npy"}
    for _ in range(2):
        await export_to(service, path, model, merge=True)
        merged = np.load(model / "model.npy")
        np.testing.assert_array_equal(merged, np.load(adapter / "weight.npy"))
        shutil.rmtree(model)
    assert len(merges) == 1  # it is kept
    await train(caller, run)
    again = SaveCheckpoint(purpose="state", name="one", overwrite=True)
    await caller.do(again, CheckpointSaved, run_id=run)
    await export_to(service, path, model, merge=True)
    assert len(merges) == 2 and (np.load(model / "model.npy") != merged).any()
    with pytest.raises(StorageError, match="exists already"):
        await export_to(service, path, model, merge=True)
    with pytest.raises(NotFoundError, match="has no file"):
        await service.read_exported(path, "manifest.json")
    await service.delete_checkpoint(path)
    for merge in (False, True):
        with pytest.raises(CheckpointNotFoundError):
            await service.export_checkpoint(path, merge=merge)
        with pytest.raises(CheckpointNotFoundError):
            await service.read_exported(path, "model.npy", merge=merge)


async def test_a_large_file_comes_in_pieces(
    caller: Caller, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver.server.exports.CHUNK_BYTES", 1000)
    path = await caller.save(await caller.create())
    [weight] = [f for f in (await service.export_checkpoint(path)).files if f.name == "weight.npy"]
    assert weight.size_bytes > 2000
    assert len(await service.read_exported(path, "weight.npy", offset=1000)) == 1000
    assert await service.read_exported(path, "weight.npy", offset=weight.size_bytes) == b""
    await export_to(service, path, tmp_path / "whole", merge=False)
    assert (tmp_path / "whole" / "weight.npy").stat().st_size == weight.size_bytes
