"""What the trainer promises: micro-batches, tenants, exact equality, steps, failures by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.conftest import (
    datum,
    gradient_of,
    job,
    lora_config,
    new_run,
    result_of,
    sequences,
)
from weaver.engine.torch.models import LoadedModel
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import (
    InvalidParamsError,
    NoGradientsError,
    NonFiniteError,
    RunNotFoundError,
    UnsupportedError,
)
from weaver.types import AdamParams, ForwardBackwardResult, LoraConfig

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.engine.base import GradientJob
    from weaver.engine.torch.model_store import ModelStore
    from weaver.types import Datum, TrainingMode

ADAM = AdamParams(learning_rate=1e-2)
RATIO = ("importance_sampling", "ppo", "cispo", "gspo", "dro")


def datums(*lengths: int, seed: int = 0) -> list[Datum]:
    """Cross-entropy data with some masked tokens."""
    return [
        datum(s, weights=[float(i % 3 > 0) for i in range(len(s) - 1)])
        for s in sequences(*lengths, seed=seed)
    ]


def ratio_datums(*lengths: int, seed: int = 0) -> list[Datum]:
    return [
        datum(
            s,
            logprobs=[-4.0 - 0.1 * (i % 5) for i in range(len(s) - 1)],
            advantages=[(-1.0) ** i for i in range(len(s) - 1)],
            weights=[float(i > 1) for i in range(len(s) - 1)],
        )
        for s in sequences(*lengths, seed=seed)
    ]


def flat_gradient(trainer: TorchTrainer, run_id: str) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient_of(trainer, run_id).values()])


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def logprobs_of(result: ForwardBackwardResult) -> torch.Tensor:
    return torch.cat([output["logprobs"].to_torch() for output in result.loss_fn_outputs])


@pytest.mark.parametrize("loss_fn", ["cross_entropy", *RATIO])
@pytest.mark.parametrize("budget", [1, 30])
def test_any_split_into_passes_gives_the_same_gradient(
    store: ModelStore, loss_fn: str, budget: int
) -> None:
    make = datums if loss_fn == "cross_entropy" else ratio_datums
    data = make(9, 4, 17, 4, 12)
    results, gradients = [], []
    for tokens in (budget, 10_000):
        trainer = TorchTrainer(store, tokens_per_pass=tokens)
        run_id = new_run(trainer)
        results.append(result_of(trainer, job(run_id, data, loss_fn)))
        gradients.append(flat_gradient(trainer, run_id))
    assert_close(*gradients)
    torch.testing.assert_close(logprobs_of(results[0]), logprobs_of(results[1]))
    assert dict(results[0].metrics) == pytest.approx(dict(results[1].metrics), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_oss"])
def test_a_dtype_that_others_set_for_the_process_changes_nothing(
    store: ModelStore, architecture: str
) -> None:
    """As transformers does while it builds a model, in whatever thread."""
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer, before = TorchTrainer(store), torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            run_id = new_run(trainer, architecture=architecture)
            data = ratio_datums(9, 4, 17)
            results = []
            for _ in range(2):
                results.append(
                    result_of(trainer, job(run_id, data, "ppo", config={"temperature": 0.7}))
                )
                trainer.optim_step(run_id, ADAM)
        finally:
            torch.set_default_dtype(before)
        runs.append([logprobs_of(one) for one in results])
    assert all(map(torch.equal, *runs))


def test_calls_with_a_common_denominator_accumulate_to_one_call(trainer: TorchTrainer) -> None:
    data = datums(9, 4, 17, 4, 12)
    one, many = new_run(trainer, "one"), new_run(trainer, "many")
    result_of(trainer, job(one, data, config={"denominator": 7.0}))
    for d in data:
        result_of(trainer, job(many, [d], config={"denominator": 7.0}))
    assert_close(flat_gradient(trainer, many), flat_gradient(trainer, one))


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "gemma3"])
def test_a_tenant_among_others_gets_what_it_gets_alone(
    store: ModelStore, architecture: str
) -> None:
    configs = [
        lora_config(architecture),
        LoraConfig(rank=7, alpha=3.0, train_mlp=False, train_unembed=False),
        LoraConfig(rank=2, train_mlp=False, train_attn=False),
    ]
    data = [datums(9, 4, 17, seed=1), ratio_datums(17, 5, seed=2), datums(4, 21, seed=3)]
    names = ["cross_entropy", "ppo", "cross_entropy"]
    together = TorchTrainer(store)
    jobs = []
    for i, config in enumerate(configs):
        run_id = new_run(together, f"run-{i}", architecture, config=config, seed=i)
        options = {"temperature": 1.0 + i / 4}
        jobs.append(job(run_id, data[i], names[i], config=options))
    merged = together.forward_backward(jobs)
    for i, config in enumerate(configs):
        alone = TorchTrainer(store)
        run_id = new_run(alone, f"run-{i}", architecture, config=config, seed=i)
        result = result_of(alone, jobs[i])
        beside = merged[i]
        assert isinstance(beside, ForwardBackwardResult)
        torch.testing.assert_close(logprobs_of(beside), logprobs_of(result), atol=2e-5, rtol=0)
        assert beside.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
        assert_close(flat_gradient(together, run_id), flat_gradient(alone, run_id))


def test_deterministic_mode_is_exactly_equal_alone_or_among_others(store: ModelStore) -> None:
    def final(others: int) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = TorchTrainer(store, deterministic=True)
        run_id = new_run(trainer)
        jobs = [job(run_id, datums(9, 4, 17))]
        for i in range(others):
            other = new_run(trainer, f"other-{i}", seed=i)
            jobs.insert(i % 2, job(other, ratio_datums(5 + i, 30, seed=i), "ppo"))
        for _ in range(3):
            results = trainer.forward_backward(jobs)
            trainer.optim_step(run_id, ADAM)
        mine = results[[j.run_id for j in jobs].index(run_id)]
        assert isinstance(mine, ForwardBackwardResult)
        return logprobs_of(mine), weights(trainer, run_id)

    for alone, beside in zip(final(0), final(3), strict=True):
        assert torch.equal(alone, beside)


def weights(trainer: TorchTrainer, run_id: str) -> torch.Tensor:
    return torch.cat([t.flatten() for t in trainer.snapshot(run_id).tensors.values()])


@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_the_same_seed_is_exactly_equal_whatever_the_global_generator(
    store: ModelStore, training_mode: TrainingMode
) -> None:
    def final(global_seed: int, seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        trainer = TorchTrainer(store)
        trainer.create_run(
            "run", "qwen3", training_mode=training_mode, lora_config=LoraConfig(rank=4), seed=seed
        )
        for _ in range(3):
            result_of(trainer, job("run", datums(9, 4, 17)))
            trainer.optim_step("run", ADAM)
        return weights(trainer, "run")

    assert torch.equal(final(1, 0), final(2, 0))
    assert torch.equal(final(1, 0), final(1, 5)) == (training_mode == "full_ft")


def test_initial_values_are_those_of_peft(trainer: TorchTrainer) -> None:
    trainer.create_run(
        "run", "qwen3", training_mode="lora", lora_config=LoraConfig(rank=16), seed=0
    )
    for name, tensor in trainer.snapshot("run").tensors.items():
        if "lora_B" in name:
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert 0.9 * bound < tensor.abs().max() <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.15)


@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_training_lowers_the_loss(trainer: TorchTrainer, training_mode: TrainingMode) -> None:
    run_id = new_run(trainer, training_mode=training_mode)
    first, *_, last = (
        _step(trainer, job(run_id, datums(9, 9, 12)), AdamParams(learning_rate=2e-2))
        for _ in range(12)
    )
    assert last < first / 2


def _step(trainer: TorchTrainer, work: GradientJob, params: AdamParams) -> float:
    loss = result_of(trainer, work).metrics["loss"]
    trainer.optim_step(work.run_id, params)
    return loss


def test_full_fine_tuning_leaves_the_shared_model_alone(
    store: ModelStore, trainer: TorchTrainer
) -> None:
    probe = new_run(trainer, "probe")
    before = logprobs_of(result_of(trainer, job(probe, datums(9), backward=False)))
    full = new_run(trainer, "full", training_mode="full_ft")
    _step(trainer, job(full, datums(9)), ADAM)
    after = logprobs_of(result_of(trainer, job(probe, datums(9), backward=False)))
    assert torch.equal(before, after)
    assert isinstance(store.base("qwen3"), LoadedModel)


def test_steps_match_adamw_by_hand(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    params = AdamParams(
        learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2, grad_clip_norm=0.01
    )
    expected = {n: t.cpu().double() for n, t in trainer.snapshot(run_id).tensors.items()}
    first = {n: torch.zeros_like(t) for n, t in expected.items()}
    second = {n: torch.zeros_like(t) for n, t in expected.items()}
    for step in (1, 2, 3):
        result_of(trainer, job(run_id, datums(9, 12)))
        gradient = {n: g.double() for n, g in gradient_of(trainer, run_id).items()}
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
        metrics = trainer.optim_step(run_id, params).metrics
        assert dict(metrics) == pytest.approx(
            {"grad_norm": norm, "learning_rate": 0.1, "step": step}, rel=1e-5
        )
        for name, g in gradient.items():
            g = g * min(1.0, 0.01 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            update = (first[name] / (1 - 0.8**step)) / (
                (second[name] / (1 - 0.9**step)).sqrt() + 1e-6
            )
            expected[name] = expected[name] * (1 - 0.1 * 0.2) - 0.1 * update
    for name, tensor in trainer.snapshot(run_id).tensors.items():
        torch.testing.assert_close(tensor.cpu().double(), expected[name], atol=2e-5, rtol=2e-4)
    assert trainer.step(run_id) == 3


def test_learning_rate_zero_changes_nothing(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    before = weights(trainer, run_id)
    _step(trainer, job(run_id, datums(9)), AdamParams(learning_rate=0, weight_decay=0.5))
    assert torch.equal(weights(trainer, run_id), before)


def test_a_step_without_gradient_is_refused(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    with pytest.raises(NoGradientsError):
        trainer.optim_step(run_id, ADAM)
    result_of(trainer, job(run_id, datums(9), backward=False))
    with pytest.raises(NoGradientsError):
        trainer.optim_step(run_id, ADAM)
    result_of(trainer, job(run_id, datums(9)))
    trainer.clear_gradients(run_id)
    with pytest.raises(NoGradientsError):
        trainer.optim_step(run_id, ADAM)


def test_no_weight_at_all_has_a_gradient_of_exactly_zero(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    zero = datum([3, 4, 5, 6], weights=[0.0, 0.0, 0.0])
    assert result_of(trainer, job(run_id, [zero])).metrics["loss"] == 0
    assert not flat_gradient(trainer, run_id).any()


def test_forward_answers_as_forward_backward_without_a_gradient(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    forward = result_of(trainer, job(run_id, datums(9, 4), backward=False))
    both = result_of(trainer, job(run_id, datums(9, 4)))
    torch.testing.assert_close(logprobs_of(forward), logprobs_of(both), atol=1e-6, rtol=0)


def test_a_job_that_is_not_finite_names_its_datum_and_harms_nobody(trainer: TorchTrainer) -> None:
    sick, well = new_run(trainer, "sick"), new_run(trainer, "well", seed=1)
    (good, bad) = ratio_datums(9, 4)
    huge = datum([5, 6, 7], logprobs=[-1e6, -1.0], advantages=[1.0, 1.0])
    result_of(trainer, job(sick, [good], "ppo"))
    before = flat_gradient(trainer, sick).clone()
    results = trainer.forward_backward(
        [job(sick, [good, bad, huge], "importance_sampling"), job(well, [good], "ppo")]
    )
    assert isinstance(results[0], NonFiniteError)
    assert results[0].field == "datums[2]"
    assert isinstance(results[1], ForwardBackwardResult)
    assert torch.equal(flat_gradient(trainer, sick), before)
    assert flat_gradient(trainer, well).isfinite().all()


@pytest.mark.parametrize("loss_fn", RATIO)
def test_a_ratio_that_overflows_is_refused_even_where_it_would_be_clipped(
    trainer: TorchTrainer, loss_fn: str
) -> None:
    run_id = new_run(trainer)
    broken = datum([5, 6, 7], logprobs=[-1e6, -1e6], advantages=[1.0, 1.0])
    (result,) = trainer.forward_backward([job(run_id, [broken], loss_fn)])
    assert isinstance(result, NonFiniteError)
    assert result.field == "datums[0]"


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_a_metric_that_is_not_finite_is_refused(trainer: TorchTrainer, value: float) -> None:
    """Of finite weights: one of the values makes a logit -inf, which has a finite loss."""
    run_id = new_run(trainer, training_mode="full_ft")
    parameters = trainer._run(run_id).named_parameters()
    parameters["lm_head.weight"].data[9, 0] = value
    parameters["model.norm.weight"].data.mul_(1000)
    one = datum([5, 6], logprobs=[-1.0], advantages=[1.0])
    (result,) = trainer.forward_backward([job(run_id, [one], "ppo", backward=False)])
    assert isinstance(result, NonFiniteError)


@pytest.mark.parametrize("weight", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head"])
@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_one_broken_weight_is_found_and_mended(
    trainer: TorchTrainer, weight: str, training_mode: TrainingMode, tmp_path: Path
) -> None:
    run_id = new_run(trainer, training_mode=training_mode)
    expected = result_of(trainer, job(run_id, datums(9, 4), backward=False))
    parameters = trainer._run(run_id).named_parameters()
    value = next(p for name, p in parameters.items() if weight in name).data.view(-1)[:1]
    healthy = value.clone()
    value.fill_(float("nan"))
    for lengths, backward in (((9, 4), True), ((9, 4), False), ((20,), True)):
        (result,) = trainer.forward_backward([job(run_id, datums(*lengths), backward=backward)])
        assert isinstance(result, NonFiniteError)
        assert weight in result.message
    with pytest.raises(NonFiniteError, match=weight):
        trainer.save(run_id, include_optimizer=False)(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoGradientsError):
        trainer.optim_step(run_id, ADAM)
    value.copy_(healthy)
    assert result_of(trainer, job(run_id, datums(9, 4), backward=False)) == expected


@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_broken_weights_fail_by_name_beside_a_healthy_tenant(
    store: ModelStore, training_mode: TrainingMode
) -> None:
    trainer = TorchTrainer(store)
    sick, well = new_run(trainer, "sick", training_mode=training_mode), new_run(trainer, "well")
    next(iter(trainer._run(sick).parameters())).data.fill_(float("nan"))
    results = trainer.forward_backward([job(sick, datums(9, 4)), job(well, datums(9, 4))])
    assert isinstance(results[0], NonFiniteError)
    assert trainer._run(sick).gradient is None
    alone = TorchTrainer(store)
    new_run(alone, "well")
    result_of(alone, job("well", datums(9, 4)))
    assert_close(flat_gradient(trainer, well), flat_gradient(alone, "well"))


def test_a_gradient_that_is_not_finite_takes_no_step(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    result_of(trainer, job(run_id, datums(9)))
    before = weights(trainer, run_id)
    gradient = trainer._run(run_id).gradient
    assert gradient is not None
    gradient[0][0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        trainer.optim_step(run_id, ADAM)
    assert torch.equal(weights(trainer, run_id), before)
    assert trainer.step(run_id) == 0
    with pytest.raises(NoGradientsError):
        trainer.optim_step(run_id, ADAM)


def test_entropy_and_its_gradient_match_autograd(trainer: TorchTrainer, store: ModelStore) -> None:
    """The general head path, with and without a trained head, against the frozen one."""
    config = LoraConfig(rank=4, train_unembed=False)
    frozen, with_entropy = (new_run(trainer, name, config=config) for name in ("a", "b"))
    data = ratio_datums(9, 14)
    plain = result_of(trainer, job(frozen, data, "importance_sampling"))
    tiny = result_of(
        trainer, job(with_entropy, data, "importance_sampling", config={"entropy_coef": 1e-12})
    )
    assert tiny.metrics["entropy"] == pytest.approx(plain.metrics["entropy"], rel=1e-5)
    assert_close(flat_gradient(trainer, with_entropy), flat_gradient(trainer, frozen))


def test_bad_adapters_are_refused_by_name(trainer: TorchTrainer) -> None:
    def create(architecture: str, **config: Any) -> None:
        trainer.create_run(
            "bad",
            architecture,
            training_mode="lora",
            lora_config=LoraConfig(**config),
            seed=0,
        )

    with pytest.raises(UnsupportedError, match="train_mlp=False"):
        create("qwen3_moe", rank=4)
    with pytest.raises(InvalidParamsError, match="Use at most 32"):
        create("qwen3", rank=33)
    with pytest.raises(InvalidParamsError, match="trains nothing"):
        create("qwen3", train_attn=False, train_mlp=False, train_unembed=False)
    with pytest.raises(RunNotFoundError):
        trainer.step("bad")


def test_a_deleted_run_is_gone(trainer: TorchTrainer) -> None:
    trainer.delete_run(new_run(trainer))
    trainer.delete_run("run")
    with pytest.raises(RunNotFoundError):
        trainer.snapshot("run")


def test_a_snapshot_never_changes(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer)
    snapshot = trainer.snapshot(run_id)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    _step(trainer, job(run_id, datums(9)), ADAM)
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot.tensors.items())
    assert (snapshot.version, trainer.snapshot(run_id).version) == (0, 1)
