"""Runs that begin from a checkpoint, embedded and on a server, sync and async."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.client.helpers import DATUMS, STEP, fake_client
from tests.client.test_sync import embedded_fake
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from tests.server.test_imports import ROW, adapter, written
from weaver import ServiceClient
from weaver.errors import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    InvalidNameError,
    InvalidParamsError,
    InvalidRequestError,
    StorageError,
    WeaverError,
)
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from weaver import TrainingClient
    from weaver.types import CheckpointInfo


@pytest.fixture(params=["embedded", "on a server"])
def client(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ServiceClient]:
    if request.param == "embedded":
        with embedded_fake(monkeypatch), ServiceClient(home=tmp_path / "home") as client:
            yield client
        return
    settings = ServerSettings(home=tmp_path / "home", port=0, auth=False)
    with serving(FakeEngine(), settings) as server, ServiceClient(server.address) as client:
        yield client


def trained(client: ServiceClient, **options: Any) -> TrainingClient:
    trainer = client.create_model("fake", {"rank": 8}, **options)
    for _ in range(3):
        step(trainer)
    return trainer


def step(trainer: TrainingClient) -> int:
    trainer.forward_backward(DATUMS)
    return int(trainer.optim_step(STEP, wait=True).metrics["step"])


def logprobs(trainer: TrainingClient) -> np.ndarray[Any, Any]:
    outputs = trainer.forward(DATUMS, wait=True).loss_fn_outputs
    return np.asarray(outputs[0]["logprobs"].to_numpy())


def test_a_run_goes_on_from_a_state_alone(client: ServiceClient) -> None:
    first = trained(client)
    state = first.save_state("here")
    wanted = logprobs(first)
    again = client.create_training_client_from_state(state.path, user_metadata={"a": 1})
    same = client.create_model(from_checkpoint=state)
    exact = client.create_training_client_from_state_with_optimizer(state)
    for trainer in (again, same, exact):
        assert trainer.model_id != first.model_id and trainer.base_model == "fake"
        np.testing.assert_array_equal(logprobs(trainer), wanted)
        run = trainer.get_info()
        assert run.step == 3 and run.lora_config is not None and run.lora_config.rank == 8
    assert again.get_info().user_metadata == {"a": 1}
    for trainer in (first, again, exact):
        for expected in (4, 5):
            assert step(trainer) == expected
    np.testing.assert_array_equal(logprobs(exact), logprobs(first))
    assert np.abs(logprobs(again) - logprobs(first)).max() > 1e-4  # its moments began anew


def test_full_fine_tuning_is_in_the_checkpoint_too(client: ServiceClient) -> None:
    trainer = client.create_model("fake", training_mode="full_ft")
    step(trainer)
    begun = client.create_model(from_checkpoint=trainer.save_state("here"))
    assert begun.get_info().training_mode == "full_ft"
    np.testing.assert_array_equal(logprobs(begun), logprobs(trainer))


def test_what_cannot_begin_leaves_no_run(client: ServiceClient, tmp_path: Path) -> None:
    trainer = trained(client)
    path = trainer.save_weights_for_sampler("weights").path
    gone = path.replace("/weights", "/other")
    refused: list[tuple[type[WeaverError], Callable[[], object]]] = [
        (CheckpointMismatchError, lambda: begin_with_optimizer(client, path)),
        (CheckpointMismatchError, lambda: client.create_model("other", from_checkpoint=path)),
        (CheckpointNotFoundError, lambda: client.create_training_client_from_state(gone)),
        (CheckpointNotFoundError, lambda: client.create_model(from_checkpoint=str(tmp_path))),
        (InvalidNameError, lambda: client.create_model(from_checkpoint="weaver://x")),
        (InvalidNameError, lambda: client.create_model(from_checkpoint="")),
        (InvalidParamsError, lambda: client.create_model(None, {"rank": 2}, from_checkpoint=path)),
        (InvalidRequestError, lambda: client.create_model()),
        (InvalidRequestError, lambda: client.create_model("fake", include_optimizer=True)),
    ]
    for error, call in refused:
        with pytest.raises(error) as raised:
            call()
        assert raised.value.field and raised.value.hint
    assert [run.run_id for run in client.list_training_runs()] == [trainer.model_id]


def begin_with_optimizer(client: ServiceClient, path: str) -> object:
    return client.create_training_client_from_state_with_optimizer(path)


def test_an_adapter_from_elsewhere_begins_a_run(client: ServiceClient, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", adapter())
    imported = client.import_checkpoint(folder, ttl_seconds=3600)
    assert imported.ttl_seconds == 3600 and imported.name == "imported"
    trainer = client.create_training_client_from_state(imported)
    row = client.export_checkpoint(trainer.save_state("a"), tmp_path / "out") / "weight.npy"
    np.testing.assert_array_equal(np.load(row), ROW)
    assert step(trainer) == 1
    assert client.create_sampling_client(imported.path).compute_logprobs("ab")[0] is None
    with pytest.raises(InvalidRequestError, match=r"has no config\.json"):
        client.import_checkpoint(tmp_path)
    with pytest.raises(InvalidNameError):
        client.import_checkpoint(folder, name="a/b")
    if os.geteuid():
        (folder / "adapter_config.json").chmod(0)
        with pytest.raises(StorageError, match="cannot be read"):
            client.import_checkpoint(folder)


def test_many_checkpoints_are_deleted_at_once(client: ServiceClient) -> None:
    first, second = trained(client), client.create_model("fake")
    kept = {name: first.save_state(name) for name in ("step-1", "step-2", "best")}
    kept["other"] = second.save_state("step-1-of-other")
    kept["s"] = first.save_weights_for_sampler("s")

    def paths(found: list[CheckpointInfo]) -> set[str]:
        return {info.path for info in found}

    def chosen(*names: str) -> set[str]:
        return {kept[name].path for name in names}

    def dry(*args: Any, **options: Any) -> set[str]:
        return paths(client.delete_checkpoints(*args, dry_run=True, **options))

    assert dry(pattern="step-*") == chosen("step-1", "step-2", "other")
    assert dry(first.model_id, pattern="step-*") == chosen("step-1", "step-2")
    assert dry(pattern="weaver://*/sampler/*") == chosen("s")
    assert dry(older_than_s=3600) == dry(pattern="nothing-*") == set()
    assert dry(older_than_s=0) == dry(pattern="*") == chosen(*kept)
    wrong: list[dict[str, Any]] = [{}, {"older_than_s": -1}, {"older_than_s": "week"}]
    for options in wrong:
        with pytest.raises(InvalidRequestError):
            client.delete_checkpoints(**options)
    gone = client.delete_checkpoints(first.model_id, pattern="step-*")
    assert paths(gone) == chosen("step-1", "step-2")
    assert paths(client.list_checkpoints()) == chosen("best", "other", "s")
    assert client.delete_checkpoints(first.model_id, pattern="step-*") == []


@pytest.mark.anyio
async def test_the_async_client_does_the_same(tmp_path: Path) -> None:
    async with fake_client(tmp_path / "home") as client:
        trainer = await client.create_model("fake")
        state = await trainer.save_state("a")
        begun = await client.create_training_client_from_state_with_optimizer(state.folder or "")
        assert (await begun.get_info()).step == 0  # of the folder that save_state wrote
        handle = client.create_model(from_checkpoint=state)
        await handle
        assert state.path in handle.label
        imported = await client.import_checkpoint(written(tmp_path / "adapter", adapter()))
        assert (await client.delete_checkpoints(pattern="imp*")) == [imported]
