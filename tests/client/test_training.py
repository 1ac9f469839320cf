"""The training client on the local service and the fake engine."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.client.helpers import DATUMS, STEP, fake_client
from weaver import AdamParams, LoraConfig, types
from weaver.errors import (
    CheckpointNotFoundError,
    GradientsDiscardedError,
    InvalidNameError,
    InvalidParamsError,
    NameTakenError,
    OperationCancelledError,
    RunNotFoundError,
    UnknownModelError,
    WeaverError,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


async def test_pipelined_training_reduces_the_loss(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake", {"rank": 4}, user_metadata={"owner": "me"})
        losses, steps = [], []
        for _ in range(20):
            losses.append(trainer.forward_backward(DATUMS))
            steps.append(trainer.optim_step(AdamParams(**STEP)))
        first, last = await losses[0], await losses[-1]
        assert last.metrics["loss"] < 0.5 * first.metrics["loss"]
        assert [(await step).metrics["step"] for step in steps] == list(range(1, 21))
        assert first["result"]["metrics"]["loss"] == first.metrics["loss"]
        assert first.loss_fn_outputs[0]["logprobs"].shape == (3,)
        run = await trainer.get_info()
        assert (run.step, run.lora_config, run.user_metadata) == (
            20,
            LoraConfig(rank=4),
            {"owner": "me"},
        )


async def test_a_run_is_known_by_its_name(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake", name="words")
        second = await client.create_model("fake", name="words")
        assert (trainer.name, second.name) == ("words", "words-2")
        assert repr(second) == f"<AsyncTrainingClient: words-2 ({second.model_id}) of fake>"
        assert (await client.attach("words-2")).model_id == second.model_id
        renamed = await client.rename_training_run("words-2", "letters")
        assert (renamed.run_id, renamed.name) == (second.model_id, "letters")
        assert (await client.get_training_run("letters")).run_id == second.model_id
        state = await trainer.save_state("s")
        again = await client.create_model(from_checkpoint=state, name="again")
        assert (await again.get_info()).name == "again"
        for name in ("", "a\nb", "x" * 129, "run-0123456789ab", "weaver://words"):
            with pytest.raises(InvalidNameError) as caught:
                client.create_model("fake", name=name)
            assert caught.value.field == "name"
            with pytest.raises(InvalidNameError):
                await client.rename_training_run("words", name)
        with pytest.raises(RunNotFoundError, match="words-2"):
            await client.attach("words-2")
        assert len(await client.list_training_runs()) == 3


async def test_forward_keeps_no_gradient(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        before = await trainer.forward(DATUMS)
        with pytest.raises(WeaverError) as caught:
            await trainer.optim_step(STEP)
        assert caught.value.code == "no_gradients"
        assert (await trainer.forward(DATUMS)) == before


async def test_full_fine_tuning_takes_no_adapter(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_training_client("fake", training_mode="full_ft")
        assert (await trainer.get_info()).training_mode == "full_ft"
        with pytest.raises(InvalidParamsError, match="lora_config"):
            client.create_model("fake", {"rank": 1}, training_mode="full_ft")


async def test_two_attachments_share_one_order(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        one = await client.create_model("fake")
        other = await client.attach(one.model_id)
        assert (other.model_id, other.base_model, other.model_info) == (
            one.model_id,
            one.base_model,
            one.model_info,
        )
        handles = []
        for i in range(6):
            (one, other)[i % 2].forward_backward(DATUMS)
            handles.append((other, one)[i % 2].optim_step(STEP))
        assert [(await handle).metrics["step"] for handle in handles] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(RunNotFoundError):
            await client.attach("nothing")


async def test_save_and_load(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        trainer.forward_backward(DATUMS)
        trainer.optim_step(STEP)
        saved = await trainer.save_state("here", ttl_seconds=100)
        assert (saved.name, saved.step, saved.ttl_seconds) == ("here", 1, 100)
        reference = await trainer.forward(DATUMS)
        trainer.forward_backward(DATUMS)
        trainer.optim_step(STEP)
        assert (await trainer.forward(DATUMS)) != reference
        assert (await trainer.load_state(saved)).path == saved.path
        assert (await trainer.forward(DATUMS)) == reference
        await trainer.load_state_with_optimizer(saved.path)
        assert (await trainer.forward(DATUMS)) == reference
        with pytest.raises(NameTakenError):
            await trainer.save_state("here")
        again = await trainer.save_state("here", overwrite=True, include_optimizer=False)
        assert again.path == saved.path
        with pytest.raises(CheckpointNotFoundError):
            await trainer.load_state(f"weaver://{trainer.model_id}/weights/other")
        sampler = await trainer.save_weights_for_sampler("policy")
        assert [c.path for c in await trainer.list_checkpoints()] == [again.path, sampler.path]
        assert (await client.set_checkpoint_ttl(sampler, 7)).ttl_seconds == 7
        await client.delete_checkpoint(again)
        assert [c.path for c in await client.list_checkpoints()] == [sampler.path]


async def test_a_failed_pass_fails_the_step_behind_it(tmp_path: Path) -> None:
    def hook(name: str, argument: object) -> None:
        if name == "gradient" and armed:
            armed.clear()
            raise types.InvalidRequestError("no")

    armed: list[int] = []
    async with fake_client(tmp_path, hook=hook) as client:
        trainer = await client.create_model("fake")
        await trainer.forward_backward(DATUMS)
        armed.append(1)
        failed, step = trainer.forward_backward(DATUMS), trainer.optim_step(STEP)
        with pytest.raises(types.InvalidRequestError, match="no"):
            await failed
        with pytest.raises(GradientsDiscardedError):
            await step
        await trainer.forward_backward(DATUMS)
        assert (await trainer.optim_step(STEP)).metrics["step"] == 1


async def test_a_cancelled_pass_fails_the_step_behind_it(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        trainer.forward_backward(DATUMS)
        cancelled, step = trainer.forward_backward(DATUMS), trainer.optim_step(STEP)
        assert cancelled.cancel()
        with pytest.raises(OperationCancelledError):
            await cancelled
        with pytest.raises(GradientsDiscardedError):
            await step


async def test_a_queued_step_is_cancelled_at_the_service(tmp_path: Path) -> None:
    release = threading.Event()

    def hook(name: str, argument: object) -> None:
        if name == "gradient":
            release.wait(10)

    async with fake_client(tmp_path, hook=hook) as client:
        trainer = await client.create_model("fake")
        loss, step, other = (
            trainer.forward_backward(DATUMS),
            trainer.optim_step(STEP),
            trainer.optim_step(STEP),
        )
        with anyio.move_on_after(0.05):
            await loss
        step.cancel()
        with pytest.raises(OperationCancelledError):
            await step
        assert loss.status == "running"
        release.set()
        assert (await other).metrics["step"] == 1


async def test_metrics_are_kept_with_the_run(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        await trainer.log_metrics({"reward": 0.5, "length": 3}, step=3)
        await trainer.log_metrics({"reward": 1.0})
        points = await trainer.read_metrics()
        assert [(p.name, p.value, p.step) for p in points] == [
            ("reward", 0.5, 3),
            ("length", 3.0, 3),
            ("reward", 1.0, None),
        ]
        assert [p.value for p in await trainer.read_metrics("reward")] == [0.5, 1.0]


async def test_runs_and_models_are_listed(tmp_path: Path) -> None:
    async with fake_client(tmp_path, models=("fake", "other")) as client:
        trainer = await client.create_model("other")
        assert [m.name for m in await client.list_supported_models()] == ["fake", "other"]
        assert [r.run_id for r in await client.list_training_runs()] == [trainer.model_id]
        assert (await client.get_training_run(trainer.model_id)).base_model == "other"
        with pytest.raises(UnknownModelError, match="fake"):
            await client.create_model("fakee")


async def test_the_tokenizer_comes_from_the_service(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        tokenizer = await trainer.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
        assert await trainer.get_tokenizer() is tokenizer
