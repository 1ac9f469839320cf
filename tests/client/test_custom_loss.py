"""`forward_backward_custom`: the gradient of any function, its errors, its place in the order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import torch

from tests.client.helpers import DATUMS, STEP, fake_client
from weaver import Datum
from weaver.errors import (
    GradientsDiscardedError,
    InvalidDatumError,
    InvalidRequestError,
    NonFiniteError,
    OperationCancelledError,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


def mean_nll(
    datums: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Cross entropy with weights, as the engine has it."""
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in datums]
    total = sum(w.sum() for w in weights)
    loss = -sum((w * lp).sum() for w, lp in zip(weights, logprobs, strict=True)) / total
    return loss, {"tokens": total, "nats": loss * total}


def weighted(tokens: list[int], weights: list[float]) -> Datum:
    return Datum(
        model_input=tokens[:-1],
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


BATCH = [weighted([72, 101, 108, 108], [0.0, 1.0, 2.0]), weighted([1, 2, 3], [0.5, 0.25])]


async def test_it_equals_the_built_in_loss(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        built_in, custom = await client.create_model("fake"), await client.create_model("fake")
        for _ in range(3):
            one, other = (
                built_in.forward_backward(BATCH),
                custom.forward_backward_custom(BATCH, mean_nll),
            )
            step, its_step = built_in.optim_step(STEP), custom.optim_step(STEP)
            assert (await other).metrics["loss"] == pytest.approx((await one).metrics["loss"])
            assert (await other).metrics["tokens"] == 3.75
            nats = (await one).metrics["loss"] * 3.75
            assert (await other).metrics["nats"] == pytest.approx(nats)
            assert (await other).loss_fn_outputs == (await one).loss_fn_outputs
            assert (await its_step).metrics["grad_norm"] == pytest.approx(
                (await step).metrics["grad_norm"], rel=1e-6
            )


async def test_it_may_be_of_several_targets_at_a_position(tmp_path: Path) -> None:
    several = Datum(
        model_input=[72, 101],
        loss_fn_inputs={
            "target_tokens": [[101, 108], [108, 97]],
            "weights": [[0.0, 1.0], [0.5, 0.25]],
        },
    )
    async with fake_client(tmp_path) as client:
        built_in, custom = await client.create_model("fake"), await client.create_model("fake")
        one = await built_in.forward_backward([several])
        other = await custom.forward_backward_custom([several], mean_nll)
        assert other.metrics["loss"] == pytest.approx(one.metrics["loss"])
        assert other.loss_fn_outputs[0]["logprobs"].shape == (2, 2)
        norms = [(await each.optim_step(STEP)).metrics["grad_norm"] for each in (built_in, custom)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


async def test_datums_may_carry_whatever_the_function_reads(tmp_path: Path) -> None:
    def loss(
        datums: list[Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        assert logprobs[0].dtype == torch.float32 and logprobs[0].requires_grad
        return (datums[0].loss_fn_inputs["mine"].to_torch() * logprobs[0]).sum(), {}

    inputs = {"target_tokens": [2, 3], "mine": [1.0, 0.0]}
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        result = await trainer.forward_backward_custom(
            [Datum(model_input=[1, 2], loss_fn_inputs=inputs)], loss
        )
        assert result.metrics["loss"] == pytest.approx(result.loss_fn_outputs[0]["logprobs"][0])


async def test_later_calls_queue_behind_it(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(
        datums: list[Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        release.wait(10)
        return mean_nll(datums, logprobs)

    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        loss = trainer.forward_backward_custom(BATCH, slow)
        step = trainer.optim_step(STEP)
        with anyio.move_on_after(0.05):
            await step
        assert not step.done()
        release.set()
        assert (await step).metrics["step"] == 1 and loss.done()


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda d, lp: 1 / 0, ZeroDivisionError, "division"),
        (lambda d, lp: lp[0].sum(), InvalidRequestError, r"Return \(loss, metrics\)"),
        (lambda d, lp: (lp[0].sum(), [1]), InvalidRequestError, r"Return \(loss, metrics\)"),
        (lambda d, lp: (lp[0], {}), InvalidRequestError, "scalar"),
        (lambda d, lp: (lp[0].detach().sum(), {}), InvalidRequestError, "scalar"),
        (lambda d, lp: (lp[0].sum() * float("nan"), {}), NonFiniteError, "nan"),
        (lambda d, lp: ((lp[0] * 0).sqrt().sum(), {}), NonFiniteError, "gradient"),
    ],
)
async def test_errors_of_the_function_come_out_and_block_nothing(
    tmp_path: Path, loss_fn: object, error: type[Exception], message: str
) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        failed = trainer.forward_backward_custom(DATUMS, loss_fn)  # type: ignore[arg-type]
        step = trainer.optim_step(STEP)
        with pytest.raises(error, match=message):
            await failed
        with pytest.raises(GradientsDiscardedError):
            await step
        trainer.forward_backward(DATUMS)
        assert (await trainer.optim_step(STEP)).metrics["step"] == 1


async def test_what_is_not_a_batch_or_a_function_is_refused_at_the_call(tmp_path: Path) -> None:
    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        bad = Datum(model_input=[1, 2], loss_fn_inputs={"weights": [1.0, 1.0]})
        for datums in ([], [bad], bad, [None], None):
            with pytest.raises(InvalidDatumError):
                trainer.forward_backward_custom(datums, mean_nll)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="function"):
            trainer.forward_backward_custom(DATUMS, "cross_entropy")  # type: ignore[arg-type]
        trainer.forward_backward(DATUMS)
        assert (await trainer.optim_step(STEP)).metrics["step"] == 1


async def test_it_can_be_cancelled_while_the_function_runs(tmp_path: Path) -> None:
    begun, release = threading.Event(), threading.Event()

    def slow(
        datums: list[Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        begun.set()
        release.wait(10)
        return mean_nll(datums, logprobs)

    async with fake_client(tmp_path) as client:
        trainer = await client.create_model("fake")
        loss, behind = trainer.forward_backward_custom(BATCH, slow), trainer.forward(DATUMS)
        await anyio.to_thread.run_sync(begun.wait)
        assert loss.cancel()
        await behind
        release.set()
        with pytest.raises(OperationCancelledError):
            await loss
