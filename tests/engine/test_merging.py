"""Merged models against the adapters they were made of, by transformers and PEFT alone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engine.conftest import (
    DEVICE,
    LORA,
    SIZES,
    lora_config,
    new_run,
    randomise,
    reference_model,
    save_tiny,
    sequences,
)
from tests.optional import peft
from weaver.engine.torch import files
from weaver.engine.torch.catalog import NANO, Catalog
from weaver.engine.torch.engine import TorchEngine
from weaver.engine.torch.merging import merge_adapter
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import CheckpointCorruptError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.zoo import Zoo
    from weaver.types import LoraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]


def save_adapter(trainer: TorchTrainer, name: str, folder: Path, *, config: LoraConfig) -> Path:
    new_run(trainer, architecture=name, config=config)
    folder.mkdir()
    trainer.save("run", include_optimizer=False)(folder)
    return folder


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.tensor([tokens])).logits[0]
    return result


def assert_merged_equals_peft(base: Path, adapter: Path, merged: Path) -> None:
    [tokens] = sequences(40)
    theirs = logits(peft.PeftModel.from_pretrained(reference_model(base), adapter), tokens)
    ours = logits(reference_model(merged), tokens)
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), rtol=0, atol=5e-5)
    assert (ours - logits(reference_model(base), tokens)).abs().max() > 0.1


@pytest.mark.parametrize("train_unembed", [False, True])
def test_a_merged_model_equals_its_adapter(
    trainer: TorchTrainer,
    catalog: Catalog,
    model_folder: Callable[[str], Path],
    architecture: str,
    tmp_path: Path,
    train_unembed: bool,
) -> None:
    config = lora_config(architecture).model_copy(update={"train_unembed": train_unembed})
    adapter = save_adapter(trainer, architecture, tmp_path / "adapter", config=config)
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_adapter(catalog.facts(architecture), adapter, merged)
    assert_merged_equals_peft(model_folder(architecture), adapter, merged)


def test_nano_is_merged_with_its_tokenizer(tmp_path: Path) -> None:
    engine = TorchEngine(threads=1)
    engine.trainer.create_run("run", "weaver-nano", training_mode="lora", lora_config=LORA, seed=0)
    randomise(engine.trainer, "run")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for folder in (adapter, merged):
        folder.mkdir()
    engine.trainer.save("run", include_optimizer=True)(adapter)
    engine.merge_adapter("weaver-nano", adapter, merged)
    engine.close()
    assert_merged_equals_peft(NANO, adapter, merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.decode(tokenizer.encode("rev:stone=")) == "rev:stone="
    assert tokenizer.chat_template
    assert not {"optimizer.safetensors", "weaver_state.json"} & {f.name for f in merged.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", ["whole", "in shards"])
def test_a_large_model_is_in_shards_of_the_bases_dtype(
    tmp_path: Path, dtype: torch.dtype, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    save_tiny(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True), base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="8KB" if kept == "in shards" else "8GB")
    (base / "generation_config.json").unlink(missing_ok=True)
    monkeypatch.setattr(files, "SHARD_BYTES", 16_000)
    catalog = Catalog({"base": base}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    adapter = save_adapter(TorchTrainer(store), "base", tmp_path / "adapter", config=LORA)
    merged.mkdir()
    merge_adapter(catalog.facts("base"), adapter, merged)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    tensors = {n: (s, t) for s in shards for n, t in load_file(merged / s).items()}
    assert {name: shard for name, (shard, _) in tensors.items()} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in tensors.values())
    held = [sum(t.nbytes for s, t in tensors.values() if s == shard) for shard in shards]
    largest = max(t.nbytes for _, t in tensors.values())
    assert max(held) <= max(16_000, largest) and min(held) > 0
    assert transformers.GenerationConfig.from_pretrained(merged).eos_token_id is not None
    assert {tensor.dtype for _, tensor in tensors.values()} == {dtype}
    assert "lm_head.weight" in tensors
    assert not json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    if dtype == torch.float32:
        assert_merged_equals_peft(base, adapter, merged)


def test_a_head_with_a_tied_bias_is_untied_whole(tmp_path: Path) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    sizes = SIZES | {"num_key_value_heads": 4}
    save_tiny(transformers.BertGenerationConfig(**sizes, is_decoder=True), base)
    catalog = Catalog({"base": base}, allow_paths=False)
    store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
    config = LORA.model_copy(update={"train_mlp": False, "train_unembed": True})
    adapter = save_adapter(TorchTrainer(store), "base", tmp_path / "adapter", config=config)
    merged.mkdir()
    merge_adapter(catalog.facts("base"), adapter, merged)
    assert_merged_equals_peft(base, adapter, merged)


def test_files_with_other_names_are_merged_too(
    trainer: TorchTrainer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(trainer, "llama", tmp_path / "adapter", config=LORA)
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(model_folder("llama"), base)
    merged.mkdir()
    weights = load_file(base / "model.safetensors")
    save_file({n.removeprefix("model."): t for n, t in weights.items()}, base / "model.safetensors")
    merge_adapter(Catalog({"base": base}, allow_paths=False).facts("base"), adapter, merged)
    assert_merged_equals_peft(base, adapter, merged)


def test_all_chat_templates_are_in_a_merged_model(zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.model("gpt_neox", "named")
    store = ModelStore(
        Catalog({"base": base}, allow_paths=False),
        device=DEVICE,
        dtype=torch.float32,
        threads=1,
    )
    adapter = save_adapter(TorchTrainer(store), "base", tmp_path / "adapter", config=LORA)
    merged = tmp_path / "merged"
    merged.mkdir()
    merge_adapter(store.catalog.facts("base"), adapter, merged)
    assert_merged_equals_peft(base, adapter, merged)
    made, had = map(transformers.AutoTokenizer.from_pretrained, (merged, base))
    assert made.chat_template == had.chat_template and len(had.chat_template) == 2
    assert all(path.is_file() for path in merged.iterdir())


def test_what_cannot_be_merged_is_named(
    trainer: TorchTrainer, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(trainer, "llama", tmp_path / "adapter", config=LORA)
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama"), base)
    facts = Catalog({"base": base}, allow_paths=False).facts("base")

    def merge(name: str) -> None:
        (tmp_path / name).mkdir()
        merge_adapter(facts, adapter, tmp_path / name)

    (base / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(StorageError, match="base model's files are complete"):
        merge("broken")
    for name, index in (("text", "broken"), ("object", "{}")):
        (base / "model.safetensors.index.json").write_text(index)
        with pytest.raises(StorageError, match="base model's files are complete"):
            merge(name)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointCorruptError):
        merge("gone")
