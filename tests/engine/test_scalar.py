"""The scalar head: its loss against numpy, its files against transformers and PEFT."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from tests.engine.cluster.ranks import RankedTrainer
from tests.engine.conftest import (
    LORA,
    datum,
    gradient_of,
    job,
    new_run,
    of_the_cpu,
    randomise,
    reference_model,
    result_of,
    sequences,
)
from tests.optional import peft
from weaver.checks import check_datums
from weaver.engine.base import GradientJob
from weaver.engine.torch.checkpoints import read_snapshot
from weaver.engine.torch.importing import import_weights
from weaver.engine.torch.lora import SCORE_WEIGHT
from weaver.engine.torch.merging import merge_adapter
from weaver.engine.torch.scalar import check_scalar
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import CheckpointMismatchError, NonFiniteError, UnsupportedError
from weaver.losses import BradleyTerry, Tokens
from weaver.types import AdamParams, Datum, ForwardBackwardResult, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from weaver.engine.torch.model_store import ModelStore

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SCALAR = LORA.model_copy(update={"head": "scalar"})
CENTRED = {"centre": 0.05}


def pairs(*lengths: int, seed: int = 0, **inputs: object) -> list[Datum]:
    """Sides of random tokens, the preferred first; `inputs` are each pair's."""
    sides = sequences(*lengths, seed=seed)
    return [
        Datum(model_input=s, loss_fn_inputs={} if i % 2 else inputs) for i, s in enumerate(sides)
    ]


def scalar_job(
    run_id: str,
    datums: Sequence[Datum],
    loss_fn: str = "bradley_terry",
    *,
    config: dict[str, Any] | None = None,
    backward: bool = True,
) -> GradientJob:
    filled = check_datums(datums, loss_fn, config=config, head="scalar")
    return GradientJob(
        run_id=run_id, datums=datums, loss_fn=loss_fn, loss_fn_config=filled, backward=backward
    )


def scores_of(result: ForwardBackwardResult) -> np.ndarray[Any, Any]:
    return np.array([one["scores"].to_numpy().item() for one in result.loss_fn_outputs], np.float64)


def expected(
    scores: np.ndarray[Any, Any], margin: float, weights: Sequence[float], centre: float
) -> tuple[float, np.ndarray[Any, Any]]:
    """The loss, a mean over pairs, and its gradient by each score; numpy alone."""
    chosen, rejected = scores[::2], scores[1::2]
    w = np.array(weights) / np.sum(weights)
    apart, total = chosen - rejected - margin, chosen + rejected
    loss = np.sum(w * (np.log1p(np.exp(-apart)) + centre * total**2))
    slope, pull = -w / (1 + np.exp(apart)), w * 2 * centre * total
    gradient = np.empty_like(scores)
    gradient[::2], gradient[1::2] = slope + pull, pull - slope
    return float(loss), gradient


@pytest.mark.parametrize("config", [{}, CENTRED])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_loss_and_gradient_are_those_of_numpy_and_transformers(
    trainer: TorchTrainer, model_folder: Any, architecture: str, config: dict[str, Any]
) -> None:
    run_id = new_run(trainer, architecture=architecture, config=SCALAR)
    datums = [*pairs(9, 4, 7, 12), *pairs(5, 6, seed=2, weights=[3.0])]
    datums[0] = datums[2].model_copy(update={"model_input": datums[0].model_input})
    result = result_of(trainer, scalar_job(run_id, datums, config=config))
    base = reference_model(model_folder(architecture)).base_model
    run = trainer._run(run_id)
    assert run.adapter is not None
    head = run.named_parameters()[SCORE_WEIGHT].detach().cpu()
    leaves = {n: p.detach().cpu().requires_grad_() for n, p in run.named_parameters().items()}
    model = _with_lora(base, leaves, run.adapter.scale)
    hidden = [model(torch.tensor([d.model_input.to_ints()])) for d in datums]
    scores = torch.stack([(leaves[SCORE_WEIGHT] @ h[0, -1]).squeeze() for h in hidden])
    np.testing.assert_allclose(scores_of(result), scores.detach().numpy(), atol=2e-5)
    weights = [1.0, 1.0, 3.0]
    value, slopes = expected(scores_of(result), 0.0, weights, config.get("centre", 0.0))
    assert result.metrics["loss"] == pytest.approx(value, rel=1e-9)
    assert result.metrics["weight_sum"] == 5
    scores.backward(torch.tensor(slopes, dtype=scores.dtype))
    for name, gradient in gradient_of(trainer, run_id).items():
        wanted = leaves[name].grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)
    assert head.dtype == torch.float32


def _with_lora(base: Any, leaves: dict[str, torch.Tensor], scale: float) -> Any:
    """transformers' model without a head, LoRA added by hooks: [1, T] -> [1, T, H]."""
    for path, layer in base.named_modules():
        stem = f"base_model.model.model.{path}"
        if f"{stem}.lora_A.weight" in leaves:

            def add(_: Any, given: Any, out: Any, stem: str = stem) -> Any:
                a, b = leaves[f"{stem}.lora_A.weight"], leaves[f"{stem}.lora_B.weight"]
                return out + scale * (given[0] @ a.T @ b.T)

            layer.register_forward_hook(add)
    return lambda tokens: base(tokens).last_hidden_state


def test_the_formula_is_that_of_torch_with_margins_and_at_any_distance() -> None:
    scores = torch.tensor([0.0, 0.0, 2.0, -1.0, -900.0, 900.0], dtype=torch.float64)
    margins = torch.tensor([0.5, 0, 0.5, 0, 0, 0], dtype=torch.float64)
    lp = scores.clone().requires_grad_()
    tokens = Tokens(lp=lp, inputs={"margin": margins}, counted=lp == lp, datum=torch.arange(6))
    value = BradleyTerry(centre=0.01).per_token(tokens).value[::2]
    chosen, rejected = scores[::2], scores[1::2]
    wanted = -torch.nn.functional.logsigmoid(chosen - rejected - margins[::2])
    torch.testing.assert_close(value, wanted + 0.01 * (chosen + rejected) ** 2)
    value.sum().backward()
    assert lp.grad is not None
    assert lp.grad[4] == pytest.approx(-1.0)
    assert lp.grad[0] == pytest.approx(-1 / (1 + math.exp(-0.5)))


def test_pairs_stay_together_however_passes_are_split(store: ModelStore) -> None:
    datums = pairs(9, 4, 17, 30, 12, 3, 3, 12)
    whole, split = TorchTrainer(store), TorchTrainer(store, tokens_per_pass=16)
    results = [
        result_of(one, scalar_job(new_run(one, config=SCALAR), datums, config=CENTRED))
        for one in (whole, split)
    ]
    assert dict(results[1].metrics) == pytest.approx(dict(results[0].metrics), rel=1e-5)
    np.testing.assert_allclose(scores_of(results[1]), scores_of(results[0]), atol=1e-5)
    for name, gradient in gradient_of(split, "run").items():
        torch.testing.assert_close(gradient, gradient_of(whole, "run")[name], rtol=1e-3, atol=1e-6)
    assert results[0].metrics["num_tokens"] == 90
    assert 0 <= results[0].metrics["accuracy"] <= 1


@of_the_cpu
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_compute_what_one_process_does(store: ModelStore, size: int) -> None:
    datums = pairs(9, 4, 17, 30, 12, 3, weights=[2.0])
    one, many = TorchTrainer(store), RankedTrainer(store, size=size)
    results = [
        result_of(it, scalar_job(new_run(it, config=SCALAR), datums, config=CENTRED))  # type: ignore[arg-type]
        for it in (one, many)
    ]
    assert dict(results[1].metrics) == pytest.approx(dict(results[0].metrics), rel=1e-6)
    theirs = gradient_of(many, "run")  # type: ignore[arg-type]
    for name, gradient in gradient_of(one, "run").items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)


def test_runs_with_and_without_the_head_share_a_call(trainer: TorchTrainer) -> None:
    rewards, tokens = new_run(trainer, "rewards", config=SCALAR), new_run(trainer, "tokens")
    text = [datum(sequences(8)[0])]
    alone = [
        result_of(trainer, scalar_job(rewards, pairs(5, 6))),
        result_of(trainer, job(tokens, text)),
    ]
    both = trainer.forward_backward([job(tokens, text), scalar_job(rewards, pairs(5, 6))])
    for result, before in zip(both, reversed(alone), strict=True):
        assert isinstance(result, ForwardBackwardResult)
        assert dict(result.metrics) == pytest.approx(dict(before.metrics), rel=1e-6)


def test_equal_scores_are_half_right_and_the_first_step_has_a_gradient(
    trainer: TorchTrainer,
) -> None:
    run_id = new_run(trainer, config=SCALAR)
    trainer._run(run_id).named_parameters()[SCORE_WEIGHT].data.zero_()
    result = result_of(trainer, scalar_job(run_id, pairs(5, 6)))
    assert result.metrics["loss"] == pytest.approx(math.log(2))
    assert result.metrics["accuracy"] == 0.5
    assert float(gradient_of(trainer, run_id)[SCORE_WEIGHT].abs().max()) > 0


def test_a_score_that_is_not_finite_adds_nothing(trainer: TorchTrainer) -> None:
    run_id = new_run(trainer, config=SCALAR)
    trainer._run(run_id).named_parameters()[SCORE_WEIGHT].data.fill_(3e38)
    [refused] = trainer.forward_backward([scalar_job(run_id, pairs(5, 6))])
    assert isinstance(refused, NonFiniteError)
    assert refused.field in ("datums[0]", "datums[1]")
    assert trainer._run(run_id).gradient is None
    trainer._run(run_id).named_parameters()[SCORE_WEIGHT].data.fill_(math.nan)
    [refused] = trainer.forward_backward([scalar_job(run_id, pairs(5, 6))])
    assert isinstance(refused, NonFiniteError)
    with pytest.raises(NonFiniteError, match="score"):
        trainer.save(run_id, include_optimizer=False)


def saved(trainer: TorchTrainer, folder: Path, architecture: str) -> np.ndarray[Any, Any]:
    """A run after two steps, in a folder; the scores of `pairs(9, 4, 7, 12)`."""
    mlp = architecture != "qwen3_moe"
    config = SCALAR.model_copy(update={"train_mlp": mlp})
    run_id = new_run(trainer, "saved", architecture, config=config)
    for _ in range(2):
        result_of(trainer, scalar_job(run_id, pairs(9, 4, 7, 12)))
        trainer.optim_step(run_id, AdamParams(learning_rate=1e-2))
    folder.mkdir()
    trainer.save(run_id, include_optimizer=True)(folder)
    return scores_of(result_of(trainer, scalar_job(run_id, pairs(9, 4, 7, 12), backward=False)))


@torch.no_grad()
def classified(model: Any) -> list[float]:
    return [
        model.eval()(torch.tensor([d.model_input.to_ints()])).logits.item()
        for d in pairs(9, 4, 7, 12)
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3_moe", "gemma2", "mistral"])
def test_transformers_and_peft_give_the_same_scores_as_it_is_and_merged(
    trainer: TorchTrainer, model_folder: Any, tmp_path: Path, architecture: str
) -> None:
    scores = saved(trainer, tmp_path / "saved", architecture)
    auto: Any = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(model_folder(architecture), num_labels=1)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    np.testing.assert_allclose(classified(adapted), scores, atol=1e-5)
    (tmp_path / "merged").mkdir()
    merge_adapter(
        trainer._store.catalog.facts(architecture), tmp_path / "saved", tmp_path / "merged"
    )
    merged, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert merged.config.num_labels == 1
    np.testing.assert_allclose(classified(merged), scores, atol=1e-5)


def test_what_peft_saves_is_read(store: ModelStore, model_folder: Any, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(model_folder("llama"), num_labels=1)
    settings = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    facts = store.catalog.facts("llama")
    snapshot = read_snapshot(tmp_path / "peft", facts=facts, quantize="none")
    assert snapshot.lora_config is not None and snapshot.lora_config.head == "scalar"
    (tmp_path / "imported").mkdir()
    made = import_weights(
        store.catalog, tmp_path / "peft", tmp_path / "imported", base_model="llama", quantize="none"
    )
    trainer = TorchTrainer(store)
    trainer.create_run("run", "llama", training_mode="lora", lora_config=made.lora_config, seed=0)
    trainer.load("run", tmp_path / "imported", include_optimizer=False)
    job = scalar_job("run", pairs(9, 4, 7, 12), backward=False)
    np.testing.assert_allclose(scores_of(result_of(trainer, job)), classified(adapted), atol=1e-5)


def test_a_classifier_of_several_labels_is_refused(
    store: ModelStore, model_folder: Any, tmp_path: Path
) -> None:
    auto: Any = transformers.AutoModelForSequenceClassification
    base = auto.from_pretrained(model_folder("llama"), num_labels=3)
    settings = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["q_proj"]}
    peft.get_peft_model(base, peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="one number"):
        read_snapshot(tmp_path, facts=store.catalog.facts("llama"), quantize="none")


def test_a_saved_state_goes_on_exactly_and_only_in_a_run_with_the_head(
    store: ModelStore, tmp_path: Path
) -> None:
    trainer, other = TorchTrainer(store), TorchTrainer(store)
    saved(trainer, tmp_path / "saved", "qwen3")
    new_run(other, "saved", config=SCALAR, seed=9)
    other.load("saved", tmp_path / "saved", include_optimizer=True)
    for one in (trainer, other):
        one.clear_gradients("saved")
        result_of(one, scalar_job("saved", pairs(5, 6, seed=4)))
        one.optim_step("saved", AdamParams(learning_rate=1e-2))
    ours, theirs = (one._run("saved").named_parameters() for one in (trainer, other))
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
    plain = new_run(other, "plain")
    with pytest.raises(CheckpointMismatchError, match="head"):
        other.load(plain, tmp_path / "saved", include_optimizer=False)


def test_the_seed_makes_the_head(trainer: TorchTrainer) -> None:
    heads = []
    for run_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = LoraConfig(rank=2, head="scalar")
        trainer.create_run(run_id, "qwen3", training_mode="lora", lora_config=config, seed=seed)
        heads.append(trainer._run(run_id).named_parameters()[SCORE_WEIGHT].detach().clone())
        assert not any("lm_head" in name for name in trainer._run(run_id).named_parameters())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_architecture_without_classification_is_refused_by_name(store: ModelStore) -> None:
    facts = replace(store.catalog.facts("qwen3"), config=transformers.GPTNeoXJapaneseConfig())
    with pytest.raises(UnsupportedError, match="Qwen3ForCausalLM"):
        check_scalar(facts)


def test_randomised_runs_differ_from_the_base(trainer: TorchTrainer) -> None:
    """The tests above compare adapters that change the scores."""
    run_id = new_run(trainer, config=SCALAR)
    before = scores_of(result_of(trainer, scalar_job(run_id, pairs(9, 4), backward=False)))
    randomise(trainer, run_id, seed=6)
    after = scores_of(result_of(trainer, scalar_job(run_id, pairs(9, 4), backward=False)))
    assert np.abs(before - after).min() > 1e-4
