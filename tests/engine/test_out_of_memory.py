"""A pass that finds no memory: it is repeated in halves, or its jobs fail and nothing is lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.conftest import datum, gradient_of, job, new_run, result_of, sequences
from weaver.engine.torch import objective
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import EngineError
from weaver.server.activity import Activity
from weaver.server.http.telemetry import ServerMetrics
from weaver.server.registry import Registry
from weaver.types import ForwardBackwardResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver.engine.base import GradientJob
    from weaver.engine.torch.model_store import ModelStore

ERRORS: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
]
PLACES: dict[str, tuple[Any, str]] = {
    "forward": (LoadedModel, "hidden_states"),
    "head": (objective, "target_scores"),
    "backward": (LoadedModel, "hidden_states"),
    "gradients": (torch.autograd, "grad"),
}


def failing(
    monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, *, calls: Sequence[int]
) -> list[int]:
    """Lets these calls there fail, counted from 0; answers how many there were, at last."""
    holder, name = PLACES[place]
    real: Callable[..., Any] = getattr(holder, name)
    count = [0]

    def fail(*_: object) -> None:
        raise error

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        fails = count[0] - 1 in calls
        if fails and place != "backward":
            fail()
        output = real(*args, **kwargs)
        if fails:
            output.register_hook(fail)
        return output

    monkeypatch.setattr(holder, name, call)
    return count


def jobs(trainer: TorchTrainer) -> list[GradientJob]:
    """Of two tenants, over three passes of 64 tokens, with what every kind of metric needs."""
    work = []
    for seed, name in enumerate(("one", "two")):
        new_run(trainer, name, seed=seed)
        data = [
            datum(
                tokens,
                logprobs=[-3.0 - 0.1 * seed] * (len(tokens) - 1),
                advantages=[1.0, -0.5] * (len(tokens) // 2) + [0.2] * (len(tokens) % 2 - 1),
            )
            for tokens in sequences(31, 21, 21, 11, seed=seed)
        ]
        work.append(job(name, data, "ppo"))
    return work


def trainer_of(store: ModelStore, **how: Any) -> TorchTrainer:
    return TorchTrainer(store, tokens_per_pass=64, **how)


def results(trainer: TorchTrainer, work: Sequence[GradientJob]) -> list[ForwardBackwardResult]:
    done = trainer.forward_backward(work)
    assert all(isinstance(one, ForwardBackwardResult) for one in done), done
    return [one for one in done if isinstance(one, ForwardBackwardResult)]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "cublas"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_pass_without_memory_is_repeated_and_nothing_is_added_twice(
    store: ModelStore,
    place: str,
    error: Exception,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    well = trainer_of(store, deterministic=deterministic)
    right = results(well, jobs(well))
    short = trainer_of(store, deterministic=deterministic)
    work = jobs(short)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        count = failing(patch, place, error, calls=[1])
        done = results(short, work)
    assert count[0] > 2 and short.repeated_passes == 1
    assert "not enough memory on cpu for a pass of" in caplog.text
    for one, two in zip(right, done, strict=True):
        assert two.metrics == pytest.approx(dict(one.metrics), rel=1e-6, abs=1e-6)
        for ours, theirs in zip(one.loss_fn_outputs, two.loss_fn_outputs, strict=True):
            assert theirs["logprobs"].tolist() == pytest.approx(ours["logprobs"].tolist(), abs=1e-6)
    for run_id in ("one", "two"):
        expected = torch.cat([g.flatten() for g in gradient_of(well, run_id).values()])
        gradient = torch.cat([g.flatten() for g in gradient_of(short, run_id).values()])
        assert float((gradient - expected).norm()) <= 1e-6 * float(expected.norm())
        assert not deterministic or torch.equal(gradient, expected)


def test_what_is_repeated_is_halved_and_recomputed(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, real = trainer_of(store), LoadedModel.hidden_states
    sizes: list[tuple[int, int]] = []
    store.base("qwen3")

    def call(self: LoadedModel, batch: Any, *, recompute: int = 0) -> torch.Tensor:
        sizes.append((sum(batch.lengths), recompute))
        if len(sizes) == 1:
            raise ERRORS[0]
        return real(self, batch, recompute=recompute)

    monkeypatch.setattr(LoadedModel, "hidden_states", call)
    results(trainer, jobs(trainer))
    first, *others = sizes
    assert first == (50, 0)
    assert {again for _, again in others} == {2}
    assert {tokens for tokens, _ in others} <= {30, *range(26)}  # the longest rides alone
    assert sum(tokens for tokens, _ in others) == 2 * (30 + 20 + 20 + 10)


def test_a_pass_that_finds_none_again_fails_its_jobs_alone(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(store)
    big, small = jobs(trainer)
    result_of(trainer, big)
    before = {name: g.clone() for name, g in gradient_of(trainer, "one").items()}
    with monkeypatch.context() as patch:
        failing(patch, "head", ERRORS[1], calls=[0, 1])
        failed, done = trainer.forward_backward([big, small])
    assert isinstance(failed, EngineError) and isinstance(done, ForwardBackwardResult)
    assert "not enough memory on cpu" in failed.message and "WEAVER_TOKENS_PER_PASS" in str(failed)
    assert all(torch.equal(g, before[name]) for name, g in gradient_of(trainer, "one").items())
    alone = trainer_of(store)
    result_of(alone, jobs(alone)[1])
    for name, gradient in gradient_of(alone, "two").items():
        torch.testing.assert_close(gradient_of(trainer, "two")[name], gradient)
    result_of(trainer, big)
    assert trainer.repeated_passes == 1


def test_the_next_call_begins_afresh(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(store)
    work = jobs(trainer)
    for _ in range(2):
        with monkeypatch.context() as patch:
            failing(patch, "forward", ERRORS[0], calls=[0])
            results(trainer, work)
    assert trainer.repeated_passes == 2


def test_another_error_is_not_taken_for_one(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(store)
    work = jobs(trainer)
    with monkeypatch.context() as patch:
        failing(patch, "head", RuntimeError("shapes differ"), calls=[0])
        with pytest.raises(RuntimeError, match="shapes differ"):
            trainer.forward_backward(work)
    assert trainer.repeated_passes == 0


def test_metrics_show_how_many_passes_were_repeated() -> None:
    engine = TorchEngine()
    engine._trainer.repeated_passes = 3
    shown = ServerMetrics(Activity(Registry()), engine).render().decode()
    assert "weaver_engine_repeated_passes_total 3.0" in shown
