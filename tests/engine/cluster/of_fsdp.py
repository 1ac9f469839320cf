"""What each of several processes runs together with the others; `test_fsdp.py` starts them."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch.distributed import fsdp

from tests.engine import test_trainer as suite
from tests.engine.cluster.spmd import this_rank
from tests.engine.cluster.test_ranks import data_of
from tests.engine.conftest import job, new_run
from tests.engine.test_scalar import SCALAR, pairs, scalar_job
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.device import _mapped_files
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.shards import Shards, is_divided, local
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import NonFiniteError, UnsupportedError
from weaver.losses import LOSSES
from weaver.types import AdamParams, ForwardBackwardResult, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable


ADAM = AdamParams(learning_rate=1e-2)


@pytest.fixture(autouse=True)
def divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "TorchTrainer", this_rank().trainer)


@pytest.fixture(scope="session")
def store(catalog: Catalog) -> ModelStore:
    return this_rank().store(catalog)


@pytest.fixture(scope="session")
def alone(catalog: Catalog) -> ModelStore:
    """Of one process."""
    return ModelStore(catalog, device=torch.device("cpu"), dtype=torch.float32, threads=1)


@pytest.fixture
def trainer(store: ModelStore) -> TorchTrainer:
    return this_rank().trainer(store)


def of_the_suite(test: Callable[..., None]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **given: Any) -> None:
        test(*args, **given)

    return run


globals().update(
    {
        name.replace("test_", "test_suite_"): of_the_suite(test)
        for name, test in vars(suite).items()
        if name.startswith("test_")
    }
)


def gradient_of(trainer: TorchTrainer, run_id: str) -> dict[str, torch.Tensor]:
    """All of it, whatever is divided."""
    run = trainer._run(run_id)
    assert run.gradient is not None
    mine = dict(zip(run.named_parameters(), run.gradient, strict=True))
    if run.parts is None:
        return mine
    every = this_rank().team.gather(mine)
    return {name: torch.cat([one[name] for one in every]) for name in mine}


def assert_same_gradient(ours: TorchTrainer, theirs: TorchTrainer, run_id: str) -> None:
    """1e-6 relative, of all of it."""
    mine, its = gradient_of(ours, run_id), gradient_of(theirs, run_id)
    assert mine.keys() == its.keys()
    error = sum(float((mine[name] - its[name]).double().square().sum()) for name in its)
    norm = sum(float(its[name].double().square().sum()) for name in its)
    assert error**0.5 <= 1e-6 * norm**0.5


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_fn", sorted(n for n, one in LOSSES.items() if None in one.heads))
def test_every_loss_is_that_of_one_process(
    store: ModelStore, alone: ModelStore, loss_fn: str, reduction: str, mode: Any
) -> None:
    results: list[list[ForwardBackwardResult]] = []
    trainers = [TorchTrainer(alone), this_rank().trainer(store, tokens_per_pass=40)]
    for trainer in trainers:
        a, b = new_run(trainer, "a", training_mode=mode), new_run(trainer, "b", seed=1)
        jobs = [
            job(a, data_of(loss_fn, 9, 4, 17, 30, 12), loss_fn, config={"reduction": reduction}),
            job(b, data_of("ppo", 21, 6, seed=3), "ppo"),
        ]
        results.append(trainer.forward_backward(jobs))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert dict(ours.metrics) == pytest.approx(dict(theirs.metrics), rel=1e-6, abs=1e-9)
        torch.testing.assert_close(suite.logprobs_of(ours), suite.logprobs_of(theirs))
    for run_id in ("a", "b"):
        assert_same_gradient(trainers[1], trainers[0], run_id)


def test_reward_models_are_those_of_one_process(store: ModelStore, alone: ModelStore) -> None:
    trainers = [TorchTrainer(alone), this_rank().trainer(store)]
    for trainer in trainers:
        new_run(trainer, config=SCALAR)
        suite.result_of(trainer, scalar_job("run", pairs(9, 5, 12, 7, 6, 8)))
    assert_same_gradient(trainers[1], trainers[0], "run")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", ["lora", "full_ft"])
def test_architectures_are_those_of_one_process(
    store: ModelStore, alone: ModelStore, architecture: str, mode: Any
) -> None:
    trainers = [TorchTrainer(alone), this_rank().trainer(store, recompute="all")]
    for trainer in trainers:
        new_run(trainer, "run", architecture, training_mode=mode)
        for seed in range(2):
            data = data_of("cross_entropy", 30, 12, 5, seed=seed)
            suite.result_of(trainer, job("run", data))
            if seed == 0:
                trainer.optim_step("run", AdamParams(learning_rate=1e-3, eps=1e-2))
    ours, theirs = (gradient_of(trainer, "run") for trainer in trainers)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "phi3"])
def test_ranks_hold_their_part_of_the_layers_alone(
    store: ModelStore, alone: ModelStore, architecture: str
) -> None:
    parameters = [p for layer in store.base(architecture)._layers for p in layer.parameters()]
    held = sum(local(p).nbytes for p in parameters)
    module = alone.own(architecture).module
    whole = sum(p.nbytes for p in module.model.layers.parameters())
    assert whole == sum(p.numel() * p.element_size() for p in parameters)
    assert held <= (1 / this_rank().size + 0.05) * whole


@pytest.mark.skipif(os.environ.get("SPMD_SIZE") != "3", reason="two ranks divide four experts")
def test_rows_that_ranks_cannot_divide_evenly_are_named(store: ModelStore) -> None:
    with pytest.raises(UnsupportedError, match="3 ranks would hold 46% of the layers' bytes"):
        store.base("qwen3_moe")


def test_no_more_than_one_layer_is_copied_while_a_model_is_read(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not divided yet lies in its files."""
    real, divide, seen = fsdp.fully_shard, Shards.divide, list[int]()

    def watched(self: Shards, module: Any, **given: Any) -> None:
        def copied(layer: torch.nn.Module) -> bool:
            here = [p.data_ptr() for p in layer.parameters() if not is_divided(p)]
            return any(not any(a <= one < b for a, b in _mapped_files()) for one in here)

        def note(layer: Any, **how: Any) -> None:
            seen.append(sum(map(copied, module.model.layers)))
            real(layer, **how)

        with monkeypatch.context() as patch:
            patch.setattr(fsdp, "fully_shard", note)
            divide(self, module, **given)

    monkeypatch.setattr(Shards, "divide", watched)
    this_rank().store(catalog).base("qwen3")
    assert seen == [1, 1]


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_another_dtype_are_read_as_by_one_process(
    model_folder: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype, mode: Any
) -> None:
    """Of bfloat16, computed with in each."""
    folder = Path(this_rank().team.gather(str(tmp_path))[0])
    if this_rank().number == 0:
        transformers.AutoModelForCausalLM.from_pretrained(
            model_folder("qwen3"), dtype=torch.bfloat16
        ).save_pretrained(folder)
    this_rank().team.gather(None)
    catalog = Catalog({"qwen3": folder}, allow_paths=False)
    one = ModelStore(catalog, device=torch.device("cpu"), dtype=dtype, threads=1)
    divided = this_rank().store(catalog, dtype=dtype)
    trainers = [TorchTrainer(one), this_rank().trainer(divided)]
    for trainer in trainers:
        new_run(trainer, training_mode=mode)
        suite.result_of(trainer, job("run", data_of("cross_entropy", 9, 14)))
    if dtype == torch.float32 or mode == "full_ft":
        assert_same_gradient(trainers[1], trainers[0], "run")
    ours, theirs = (gradient_of(trainer, "run") for trainer in trainers)
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 0.1 * float(gradient.norm())


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
@pytest.mark.parametrize("lengths", [(9,), (9, 12, 5)])
def test_a_datum_that_is_not_finite_keeps_no_rank_waiting(
    store: ModelStore, alone: ModelStore, lengths: tuple[int, ...], mode: Any
) -> None:
    trainer = this_rank().trainer(store)
    bad, good = new_run(trainer, "bad", training_mode=mode), new_run(trainer, "good")
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
    one = TorchTrainer(alone)
    new_run(one, "good")
    suite.result_of(one, job("good", others))
    assert_same_gradient(trainer, one, "good")
    suite.result_of(trainer, job(bad, data_of("cross_entropy", 7)))  # nothing is left of it
    new_run(one, "bad", training_mode=mode)
    suite.result_of(one, job("bad", data_of("cross_entropy", 7)))
    assert_same_gradient(trainer, one, "bad")


def test_adapters_of_other_layers_on_another_rank_keep_none_waiting(
    store: ModelStore, alone: ModelStore
) -> None:
    """One rank has datums of the head's adapter alone, the other those of all layers'."""
    trainers = [TorchTrainer(alone), this_rank().trainer(store)]
    head = LoraConfig(rank=2, train_mlp=False, train_attn=False)
    for trainer in trainers:
        new_run(trainer, "head", config=head)
        new_run(trainer, "all")
        jobs = [job(name, data_of("cross_entropy", 12)) for name in ("head", "all")]
        for result in trainer.forward_backward(jobs):
            assert isinstance(result, ForwardBackwardResult)
    for name in ("head", "all"):
        assert_same_gradient(trainers[1], trainers[0], name)


@pytest.mark.parametrize("mode", ["lora", "full_ft"])
def test_steps_are_those_of_one_process(store: ModelStore, alone: ModelStore, mode: Any) -> None:
    seen = []
    for trainer in (TorchTrainer(alone), this_rank().trainer(store)):
        new_run(trainer, training_mode=mode)
        seen.append([])
        for seed in range(3):
            data = data_of("cross_entropy", 30, 12, 5, seed=seed)
            done = suite.result_of(trainer, job("run", data))
            params = AdamParams(learning_rate=1e-3, eps=1e-2, grad_clip_norm=0.1)
            step = trainer.optim_step("run", params)
            forward = suite.result_of(trainer, job("run", data, backward=False))
            seen[-1] += [dict(one.metrics) for one in (done, step, forward)]
    for ours, theirs in zip(seen[1], seen[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def whole_weights(trainer: TorchTrainer, run_id: str) -> dict[str, torch.Tensor]:
    mine = {n: p.detach().clone() for n, p in trainer._run(run_id).named_parameters().items()}
    if trainer._run(run_id).parts is None:
        return mine
    every = this_rank().team.gather(mine)
    return {name: torch.cat([one[name] for one in every]) for name in mine}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "qwen3_moe"])
def test_a_checkpoint_is_that_of_one_process_and_goes_on_in_both(
    store: ModelStore, alone: ModelStore, tmp_path: Path, architecture: str
) -> None:
    """Written by all ranks, loaded by one process; and the other way."""
    data = [data_of("cross_entropy", 30, 12, 5, seed=seed) for seed in range(3)]
    params = AdamParams(learning_rate=1e-3, eps=1e-2)

    def step(trainer: TorchTrainer, seed: int) -> None:
        suite.result_of(trainer, job("run", data[seed]))
        trainer.optim_step("run", params)

    folder = Path(this_rank().team.gather(str(tmp_path))[0])
    ours = this_rank().trainer(store)
    new_run(ours, "run", architecture, training_mode="full_ft")
    step(ours, 0)
    write = ours.save("run", include_optimizer=True)
    step(ours, 1)  # of which what was saved knows nothing
    if this_rank().number == 0:
        write(folder)
    this_rank().team.gather(None)
    theirs = TorchTrainer(alone)
    new_run(theirs, "run", architecture, training_mode="full_ft")
    theirs.load("run", folder, include_optimizer=True)
    again = this_rank().trainer(store)
    new_run(again, "run", architecture, training_mode="full_ft")
    again.load("run", folder, include_optimizer=True)
    for trainer in (theirs, again):
        assert trainer.step("run") == 1
        step(trainer, 1)
    mine = whole_weights(ours, "run")
    for name, weight in whole_weights(again, "run").items():
        assert torch.equal(weight, mine[name])
    for name, weight in whole_weights(theirs, "run").items():
        torch.testing.assert_close(mine[name], weight, atol=1e-6, rtol=1e-5)
    if this_rank().number == 0:
        write_alone = theirs.save("run", include_optimizer=True)
        other = folder / "alone"
        other.mkdir()
        write_alone(other)
    this_rank().team.gather(None)
    again.load("run", folder / "alone", include_optimizer=True)
    step(again, 2)
    step(theirs, 2)
    mine = whole_weights(again, "run")
    for name, weight in whole_weights(theirs, "run").items():
        torch.testing.assert_close(mine[name], weight, atol=1e-6, rtol=1e-5)


def test_what_is_handed_on_by_another_number_of_ranks_is_loaded(
    store: ModelStore, alone: ModelStore
) -> None:
    """By those that ran before in this folder, if any did."""
    folder = this_rank().shards.folder / "handed"
    params = AdamParams(learning_rate=1e-3, eps=1e-2)

    def step(trainer: TorchTrainer, seed: int) -> None:
        suite.result_of(trainer, job("run", data_of("cross_entropy", 30, 12, 5, seed=seed)))
        trainer.optim_step("run", params)

    if not any(this_rank().team.gather(folder.exists())):
        first = this_rank().trainer(store)
        new_run(first, training_mode="full_ft")
        step(first, 0)
        write = first.save("run", include_optimizer=True)
        if this_rank().number == 0:
            folder.mkdir()
            write(folder)
        this_rank().team.gather(None)
    trainers = [TorchTrainer(alone), this_rank().trainer(store)]
    for trainer in trainers:
        new_run(trainer, training_mode="full_ft")
        trainer.load("run", folder, include_optimizer=True)
    theirs, ours = (whole_weights(trainer, "run") for trainer in trainers)
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())
    for trainer in trainers:
        step(trainer, 1)
    theirs, ours = (whole_weights(trainer, "run") for trainer in trainers)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5)
