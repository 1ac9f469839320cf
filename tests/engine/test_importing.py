"""Adapters of PEFT's and models of transformers' as the beginning of runs that answer alike."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engine.conftest import LORA, datum, job, reference_model, result_of, sequences
from tests.engine.test_adapters import OTHER_SETTINGS, PLAIN_SETTINGS, save_with_peft
from tests.optional import peft
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.importing import import_weights
from weaver.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    InvalidParamsError,
    UnknownModelError,
    UnsupportedError,
    WeaverError,
)
from weaver.types import AdamParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.base import ImportedWeights
    from weaver.engine.torch.trainer import TorchTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
]


def take(
    catalog: Catalog, source: Path, folder: Path, base_model: str | None = "qwen3"
) -> ImportedWeights:
    folder.mkdir()
    return import_weights(catalog, source, folder, base_model=base_model, quantize="none")


def begin(trainer: TorchTrainer, made: ImportedWeights, folder: Path) -> None:
    """A run that a client would create, and load into."""
    mode: Any = "lora" if made.lora_config else "full_ft"
    trainer.create_run(
        "run", made.base_model, training_mode=mode, lora_config=made.lora_config, seed=1
    )
    trainer.load("run", folder, include_optimizer=False)
    assert trainer.step("run") == 0


def logprobs(trainer: TorchTrainer, tokens: list[int]) -> torch.Tensor:
    result = result_of(trainer, job("run", [datum(tokens)], backward=False))
    values: torch.Tensor = result.loss_fn_outputs[0]["logprobs"].to_torch()
    return values


@torch.no_grad()
def expected(model: Any, tokens: list[int]) -> torch.Tensor:
    log_p = model.eval()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    chosen: torch.Tensor = log_p[range(len(tokens) - 1), tokens[1:]]
    return chosen


@pytest.mark.parametrize("kind", PLAIN_SETTINGS)
def test_a_run_begins_as_the_adapter_that_it_is_given(
    kind: str,
    catalog: Catalog,
    trainer: TorchTrainer,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base, [tokens] = model_folder("qwen3"), sequences(30)
    save_with_peft(base, tmp_path / "theirs", PLAIN_SETTINGS[kind])
    reference = peft.PeftModel.from_pretrained(reference_model(base), tmp_path / "theirs")
    made = take(catalog, tmp_path / "theirs", tmp_path / "ours")
    begin(trainer, made, tmp_path / "ours")
    torch.testing.assert_close(
        logprobs(trainer, tokens), expected(reference, tokens), atol=5e-5, rtol=0
    )
    result_of(trainer, job("run", [datum(tokens)]))
    trainer.optim_step("run", AdamParams(learning_rate=1e-3))
    moved = trainer.snapshot("run").tensors
    before = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert moved.keys() == before.keys()
    changed = [name for name in moved if not torch.equal(moved[name], before[name])]
    added = [n for n in changed if "k_proj.lora_B" in n]  # which no kind of these adapters has
    assert len(added) == 2


def test_the_base_is_found_by_what_an_adapter_names(
    catalog: Catalog, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    save_with_peft(model_folder("qwen3"), tmp_path / "theirs", {})
    config = tmp_path / "theirs" / "adapter_config.json"
    settings = json.loads(config.read_text())
    base = str(model_folder("qwen3"))
    config.write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    assert take(catalog, tmp_path / "theirs", tmp_path / "a", None).base_model == "qwen3"
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "org/elsewhere"}))
    with pytest.raises(UnknownModelError, match="org/elsewhere"):
        take(catalog, tmp_path / "theirs", tmp_path / "b", None)
    for nothing in (None, "", 7):
        config.write_text(json.dumps(settings | {"base_model_name_or_path": nothing}))
        with pytest.raises(InvalidParamsError, match="does not name its base") as raised:
            take(catalog, tmp_path / "theirs", tmp_path / f"c-{nothing}", None)
        assert raised.value.field == "base_model"


@pytest.mark.parametrize("setting", OTHER_SETTINGS, ids=str)
def test_other_adapters_are_refused_by_name(
    setting: dict[str, Any], catalog: Catalog, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    save_with_peft(model_folder("qwen3"), tmp_path / "theirs", setting)
    [name] = setting
    with pytest.raises(UnsupportedError, match=name):
        take(catalog, tmp_path / "theirs", tmp_path / "ours")


def fine_tuned(base: Path, folder: Path) -> Any:
    """A model that differs from the base in all its weights, saved."""
    model = reference_model(base)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def test_a_run_begins_as_the_model_that_it_is_given(
    catalog: Catalog, trainer: TorchTrainer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    [tokens] = sequences(30)
    model = fine_tuned(model_folder("qwen3"), tmp_path / "theirs")
    made = take(catalog, tmp_path / "theirs", tmp_path / "ours")
    assert made.lora_config is None
    begin(trainer, made, tmp_path / "ours")
    got = logprobs(trainer, tokens)
    torch.testing.assert_close(got, expected(model, tokens), atol=5e-5, rtol=0)
    base = expected(reference_model(model_folder("qwen3")), tokens)
    assert (got - base).abs().max() > 0.05


def test_models_that_are_not_made_of_the_base(
    catalog: Catalog, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    fine_tuned(model_folder("qwen3"), theirs)
    with pytest.raises(InvalidParamsError, match="which base"):
        take(catalog, theirs, tmp_path / "0", None)
    with pytest.raises(CheckpointMismatchError, match="serve it as a base of its own"):
        take(catalog, theirs, tmp_path / "1", "qwen2")
    config = json.loads((theirs / "config.json").read_text())
    changes: list[dict[str, Any]] = [
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"intermediate_size": 24},
    ]
    for i, change in enumerate(changes):
        (theirs / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointMismatchError, match=next(iter(change))):
            take(catalog, theirs, tmp_path / f"changed-{i}")
    (theirs / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    take(catalog, theirs, tmp_path / "like")


@pytest.mark.parametrize("damage", ["a file less", "no numbers", "not finite", "other shapes"])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_what_is_broken_is_named(
    damage: str,
    kind: str,
    catalog: Catalog,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base, theirs = model_folder("qwen3"), tmp_path / "theirs"
    if kind == "adapter":
        save_with_peft(base, theirs, {})
        file = theirs / "adapter_model.safetensors"
    else:
        shutil.copytree(base, theirs)
        file = theirs / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    match damage:
        case "a file less":
            file.unlink()
        case "no numbers":
            file.write_bytes(b"broken")
        case "not finite":
            save_file(tensors | {name: tensors[name] * float("nan")}, file, {"format": "pt"})
        case "other shapes":
            save_file(tensors | {name: tensors[name][..., :1].clone()}, file, {"format": "pt"})
    with pytest.raises(WeaverError) as raised:
        take(catalog, theirs, tmp_path / "ours")
    refusals = CheckpointCorruptError, CheckpointMismatchError, UnsupportedError
    assert isinstance(raised.value, refusals) and raised.value.hint


def test_a_rank_that_no_run_can_have_is_refused(
    catalog: Catalog, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(model_folder("qwen3")),
        peft.LoraConfig(r=LORA.rank * 64, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(InvalidParamsError, match="rank"):
        take(catalog, tmp_path / "theirs", tmp_path / "ours")
