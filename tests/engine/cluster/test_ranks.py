"""What the trainer promises, promised by two ranks; and ranks against one process."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine import test_trainer as suite
from tests.engine.cluster.ranks import RankedTrainer
from tests.engine.conftest import job, new_run, of_the_cpu
from weaver.engine.cluster.merge import deal
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import NonFiniteError
from weaver.losses import LOSSES
from weaver.types import AdamParams, ForwardBackwardResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver.engine.torch.model_store import ModelStore

pytestmark = of_the_cpu
ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture(autouse=True)
def in_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "TorchTrainer", RankedTrainer)


@pytest.fixture
def trainer(store: ModelStore) -> RankedTrainer:
    return RankedTrainer(store)


def in_ranks(test: Callable[..., None]) -> Callable[..., None]:
    @pytest.mark.slow
    @wraps(test)
    def run(*args: Any, **given: Any) -> None:
        test(*args, **given)

    return run


globals().update(
    {name: in_ranks(test) for name, test in vars(suite).items() if name.startswith("test_")}
)


def data_of(loss_fn: str, *lengths: int, seed: int = 0) -> Any:
    if loss_fn == "surrogate":
        made = suite.sequences(*lengths, seed=seed)
        return [suite.datum(s, surrogate_weights=[0.3] * (len(s) - 1)) for s in made]
    make = suite.datums if loss_fn == "cross_entropy" else suite.ratio_datums
    return make(*lengths, seed=seed)


def assert_same_gradient(ours: Any, theirs: Any, run_id: str) -> None:
    """1e-6 relative, of all of it."""
    mine, its = suite.flat_gradient(ours, run_id), suite.flat_gradient(theirs, run_id)
    assert float((mine - its).norm()) <= 1e-6 * float(its.norm())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_fn", sorted(n for n, one in LOSSES.items() if None in one.heads))
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_loss_reduction_and_metric_of_merged_tenants_is_that_of_one_process(
    store: ModelStore, loss_fn: str, reduction: str, size: int
) -> None:
    results: list[list[ForwardBackwardResult]] = []
    trainers: list[Any] = [TorchTrainer(store), RankedTrainer(store, size=size)]
    for trainer in trainers:
        data = data_of(loss_fn, 9, 4, 17, 30, 12)
        a, b = new_run(trainer, "a"), new_run(trainer, "b", seed=1)
        jobs = [
            job(a, data, loss_fn, config={"reduction": reduction}),
            job(b, data_of("ppo", 21, 6, seed=3), "ppo"),
        ]
        results.append(trainer.forward_backward(jobs))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert dict(ours.metrics) == pytest.approx(dict(theirs.metrics), rel=1e-6, abs=1e-9)
        torch.testing.assert_close(suite.logprobs_of(ours), suite.logprobs_of(theirs))
    for run_id in ("a", "b"):
        assert_same_gradient(trainers[1], trainers[0], run_id)


def test_ranks_stay_equal_bit_for_bit_over_steps(trainer: RankedTrainer) -> None:
    run_id = new_run(trainer)  # type: ignore[arg-type]
    for seed in range(3):
        trainer.forward_backward([job(run_id, data_of("ppo", 9, 14, 5, seed=seed), "ppo")])
        steps = trainer.each(lambda one: one.optim_step(run_id, ADAM))
        assert dict(steps[0].metrics) == dict(steps[1].metrics)
        first, second = (one._runs[run_id].parameters() for one in trainer.trainers)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("lengths", [(9,), (9, 12, 5)])
def test_a_datum_that_is_not_finite_harms_its_own_job_alone_and_keeps_no_rank_waiting(
    store: ModelStore, lengths: tuple[int, ...]
) -> None:
    trainer: Any = RankedTrainer(store)
    bad, good = new_run(trainer, "bad"), new_run(trainer, "good")
    data = suite.ratio_datums(*lengths)
    at = lengths.index(max(lengths))
    tokens = suite.sequences(*lengths)[at]
    ones = [1.0] * (len(tokens) - 1)
    data[at] = suite.datum(tokens, logprobs=[-2000.0 * w for w in ones], advantages=ones)
    others = data_of("cross_entropy", 20, 21)
    refused, done = trainer.forward_backward(
        [job(bad, data, "importance_sampling"), job(good, others)]
    )
    assert isinstance(refused, NonFiniteError)
    assert refused.field == f"datums[{at}]"
    assert isinstance(done, ForwardBackwardResult)
    assert trainer._run(bad).gradient is None
    alone = TorchTrainer(store)
    new_run(alone, "good")
    suite.result_of(alone, job("good", others))
    assert_same_gradient(trainer, alone, "good")


def test_a_rank_without_datums_waits_for_the_others(store: ModelStore) -> None:
    one, many = TorchTrainer(store), RankedTrainer(store, size=3)
    data = data_of("cross_entropy", 12)
    for trainer in (one, many):
        suite.result_of(trainer, job(new_run(trainer), data))  # type: ignore[arg-type]
    assert_same_gradient(many, one, "run")


def test_datums_are_dealt_by_tokens() -> None:
    lengths = [[100, 1, 50, 49], [7], [7]]
    loads = [
        sum(sizes[i] for sizes, datums in zip(lengths, mine, strict=True) for i in datums)
        for mine in deal(lengths, ranks=2, merge=True)
    ]
    assert loads == [107, 107]


def test_what_a_rank_has_of_a_job_does_not_depend_on_others_where_jobs_are_not_merged() -> None:
    alone = deal([[7, 9]], ranks=2, merge=False)
    among = deal([[100], [7, 9]], ranks=2, merge=False)
    assert [mine[0] for mine in alone] == [mine[1] for mine in among]
