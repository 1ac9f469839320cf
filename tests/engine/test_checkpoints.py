"""Checkpoints: exact resume, PEFT's format both ways, and refusals that change nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engine.conftest import (
    LORA,
    VOCAB,
    datum,
    job,
    lora_config,
    new_run,
    reference_model,
    result_of,
    sequences,
)
from tests.optional import peft
from weaver.engine.torch.checkpoints import read_snapshot, read_state
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    StorageError,
    UnsupportedError,
)
from weaver.types import AdamParams, LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.model_store import ModelStore
    from weaver.types import TrainingMode

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]


def train(trainer: TorchTrainer, run_id: str, steps: int) -> None:
    for i in range(steps):
        result_of(trainer, job(run_id, [datum(s) for s in sequences(9, 4, 17, seed=i)]))
        trainer.optim_step(run_id, ADAM)


def weights(trainer: TorchTrainer, run_id: str) -> dict[str, torch.Tensor]:
    return dict(trainer.snapshot(run_id).tensors)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def saved(trainer: TorchTrainer, run_id: str, folder: Path, *, include_optimizer: bool) -> Path:
    folder.mkdir()
    trainer.save(run_id, include_optimizer=include_optimizer)(folder)
    return folder


@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_a_resumed_run_is_exactly_equal(
    store: ModelStore, tmp_path: Path, training_mode: TrainingMode
) -> None:
    first = TorchTrainer(store)
    run_id = new_run(first, training_mode=training_mode)
    train(first, run_id, 3)
    folder = saved(first, run_id, tmp_path / "state", include_optimizer=True)
    second = TorchTrainer(store)
    new_run(second, training_mode=training_mode, seed=99)
    train(second, run_id, 1)
    second.load(run_id, folder, include_optimizer=True)
    assert second.step(run_id) == 3
    assert_equal(weights(second, run_id), weights(first, run_id))
    train(first, run_id, 3)
    train(second, run_id, 3)
    assert_equal(weights(second, run_id), weights(first, run_id))


def test_loading_weights_alone_resets_the_optimizer_and_the_gradient(
    trainer: TorchTrainer, tmp_path: Path
) -> None:
    run_id = new_run(trainer)
    train(trainer, run_id, 2)
    folder = saved(trainer, run_id, tmp_path / "state", include_optimizer=True)
    expected = weights(trainer, run_id)
    train(trainer, run_id, 1)
    result_of(trainer, job(run_id, [datum([3, 4, 5])]))
    trainer.load(run_id, folder, include_optimizer=False)
    assert_equal(weights(trainer, run_id), expected)
    assert trainer._run(run_id).gradient is None
    assert not trainer._run(run_id).optimizer.state


def test_a_run_saved_before_its_first_step_resumes(trainer: TorchTrainer, tmp_path: Path) -> None:
    run_id = new_run(trainer)
    folder = saved(trainer, run_id, tmp_path / "state", include_optimizer=True)
    train(trainer, run_id, 2)
    expected = weights(trainer, run_id)
    trainer.load(run_id, folder, include_optimizer=True)
    assert trainer.step(run_id) == 0
    train(trainer, run_id, 2)
    assert_equal(weights(trainer, run_id), expected)


def test_peft_loads_our_adapter(
    architecture: str,
    trainer: TorchTrainer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_id = new_run(trainer, architecture=architecture)
    folder = saved(trainer, run_id, tmp_path / "adapter", include_optimizer=False)
    model = peft.PeftModel.from_pretrained(reference_model(model_folder(architecture)), folder)
    assert_same_logprobs(trainer, run_id, model)


def assert_same_logprobs(trainer: TorchTrainer, run_id: str, model: Any) -> None:
    tokens = sequences(14)[0]
    result = result_of(trainer, job(run_id, [datum(tokens)], backward=False))
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], -1)
    expected = log_p[range(13), tokens[1:]]
    torch.testing.assert_close(
        result.loss_fn_outputs[0]["logprobs"].to_torch(), expected, atol=5e-5, rtol=0
    )


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_the_adapter_that_peft_wrote(
    architecture: str,
    use_rslora: bool,
    store: ModelStore,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    config = lora_config(architecture)
    facts = store.catalog.facts(architecture)
    roles = {"attn": config.train_attn, "mlp": config.train_mlp, "unembed": True}
    model = peft.get_peft_model(
        reference_model(model_folder(architecture)),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=use_rslora,
            target_modules=sorted(
                {t.path.split(".")[-1] for t in facts.targets.values() if roles[t.role]}
            ),
            task_type="CAUSAL_LM",
        ),
    )
    with torch.random.fork_rng():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    snapshot = read_snapshot(tmp_path, facts=facts, quantize="none")
    assert snapshot.lora_config is not None
    assert snapshot.version == 0
    trainer = TorchTrainer(store)
    run_id = new_run(trainer, architecture=architecture, config=snapshot.lora_config)
    run = trainer._run(run_id)
    for name, parameter in run.named_parameters().items():
        parameter.data.copy_(snapshot.tensors[name])
    assert_same_logprobs(trainer, run_id, model.eval())


def test_transformers_loads_our_fully_tuned_model(trainer: TorchTrainer, tmp_path: Path) -> None:
    run_id = new_run(trainer, architecture="qwen2", training_mode="full_ft")
    train(trainer, run_id, 2)
    folder = saved(trainer, run_id, tmp_path / "model", include_optimizer=False)
    assert "weaver_packed" not in (folder / "config.json").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert_same_logprobs(trainer, run_id, model.eval())
    facts = trainer._run(run_id).facts
    assert_equal(
        dict(read_snapshot(folder, facts=facts, quantize="none").tensors), weights(trainer, run_id)
    )


def test_the_state_says_what_the_folder_holds(trainer: TorchTrainer, tmp_path: Path) -> None:
    run_id = new_run(trainer)
    train(trainer, run_id, 2)
    state = read_state(saved(trainer, run_id, tmp_path / "x", include_optimizer=False))
    assert (state.base_model, state.training_mode, state.step) == ("qwen3", "lora", 2)
    assert state.lora_config == LORA
    assert state.vocab_size == VOCAB


def test_what_does_not_fit_is_refused_before_anything_changed(
    store: ModelStore, trainer: TorchTrainer, tmp_path: Path
) -> None:
    run_id = new_run(trainer)
    train(trainer, run_id, 1)
    other = TorchTrainer(store)
    others: dict[str, dict[str, Any]] = {
        "rank": {"config": LORA.model_copy(update={"rank": 5})},
        "alpha": {"config": LORA.model_copy(update={"alpha": 1.0})},
        "layers": {"config": LORA.model_copy(update={"train_mlp": False})},
        "model": {"architecture": "llama"},
        "mode": {"training_mode": "full_ft"},
    }
    before = weights(trainer, run_id)
    for name, arguments in others.items():
        new_run(other, name, **arguments)
        folder = saved(other, name, tmp_path / name, include_optimizer=True)
        with pytest.raises(CheckpointMismatchError):
            trainer.load(run_id, folder, include_optimizer=True)
    bare = saved(trainer, run_id, tmp_path / "bare", include_optimizer=False)
    with pytest.raises(CheckpointMismatchError, match="without optimizer"):
        trainer.load(run_id, bare, include_optimizer=True)
    assert_equal(weights(trainer, run_id), before)
    assert trainer.step(run_id) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write_nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path)


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def write_garbage(path: Path) -> None:
    path.write_text("{")


def delete(path: Path) -> None:
    path.unlink()


def empty_object(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("adapter_model.safetensors", d) for d in (truncate, write_nan, drop_one, delete)),
        *(("optimizer.safetensors", d) for d in (truncate, write_nan, drop_one)),
        *(("weaver_state.json", d) for d in (write_garbage, empty_object, delete)),
        *(("adapter_config.json", d) for d in (write_garbage, empty_object)),
    ],
)
def test_damage_is_refused_before_anything_changed(
    trainer: TorchTrainer, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    run_id = new_run(trainer)
    train(trainer, run_id, 1)
    folder = saved(trainer, run_id, tmp_path / "state", include_optimizer=True)
    train(trainer, run_id, 1)
    before = weights(trainer, run_id)
    damage(folder / file)
    with pytest.raises(CheckpointCorruptError):
        trainer.load(run_id, folder, include_optimizer=True)
    assert_equal(weights(trainer, run_id), before)
    assert trainer.step(run_id) == 2
    train(trainer, run_id, 1)


def test_a_damaged_whole_model_is_corrupt(trainer: TorchTrainer, tmp_path: Path) -> None:
    run_id = new_run(trainer, training_mode="full_ft")
    folder = saved(trainer, run_id, tmp_path / "state", include_optimizer=True)
    truncate(folder / "model.safetensors")
    with pytest.raises(CheckpointCorruptError):
        trainer.load(run_id, folder, include_optimizer=False)


def test_variants_of_lora_are_refused_by_name(trainer: TorchTrainer, tmp_path: Path) -> None:
    run_id = new_run(trainer)
    folder = saved(trainer, run_id, tmp_path / "state", include_optimizer=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(UnsupportedError, match="use_dora"):
        read_snapshot(folder, facts=trainer._run(run_id).facts, quantize="none")


def test_a_folder_that_cannot_be_written_is_a_storage_error(
    trainer: TorchTrainer, tmp_path: Path
) -> None:
    run_id = new_run(trainer, config=LoraConfig(rank=2))
    with pytest.raises(StorageError):
        trainer.save(run_id, include_optimizer=True)(tmp_path / "missing")
