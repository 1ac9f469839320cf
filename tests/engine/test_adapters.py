"""Adapters as PEFT saves them: what is W + scale·B·A is read, all others are refused by name."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import LORA, new_run, reference_model, sequences
from tests.engine.sampler_kit import finish, sample_job
from tests.optional import peft
from weaver.engine.torch.adapter_files import FREE, NEUTRAL, PLAIN, read_adapter
from weaver.engine.torch.merging import merge_adapter
from weaver.engine.torch.sampler import TorchSampler
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from weaver.engine.torch.catalog import Catalog
    from weaver.engine.torch.model_store import ModelStore
    from weaver.engine.torch.trainer import TorchTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning"),
]
LAYERS = ["q_proj", "v_proj", "up_proj"]
PLAIN_SETTINGS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "rslora": {"use_rslora": True},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"], "lora_dropout": 0.1},
    "head": {"target_modules": [*LAYERS, "lm_head"]},
}
OTHER_SETTINGS: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    {"alora_invocation_tokens": [7, 8]},
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"q_proj": 2}},
    {"modules_to_save": ["embed_tokens"]},
    {"layer_replication": [(0, 2), (1, 2)]},
]


def save_with_peft(base: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """An adapter of random values as PEFT itself writes it."""
    settings = {"target_modules": LAYERS, **settings}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(reference_model(base), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.15)
        adapted.save_pretrained(folder)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])  # own and tied head
@pytest.mark.parametrize("kind", PLAIN_SETTINGS)
def test_plain_adapters_are_what_peft_reads(
    kind: str,
    architecture: str,
    store: ModelStore,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base, [tokens] = model_folder(architecture), sequences(30)
    save_with_peft(base, tmp_path, PLAIN_SETTINGS[kind])
    reference = peft.PeftModel.from_pretrained(reference_model(base), tmp_path).eval()
    with torch.no_grad():
        log_p = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = log_p[range(29), tokens[1:]]
    sampler = TorchSampler(store)
    sampler.load("adapter", architecture, tmp_path)
    result = finish(sampler, [sample_job(tokens, weights_id="adapter", n=0, prompt_logprobs=True)])
    assert result["job"].prompt_logprobs is not None
    got = torch.tensor(result["job"].prompt_logprobs[1:])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", OTHER_SETTINGS, ids=str)
def test_other_adapters_are_refused_by_name(
    setting: dict[str, Any], catalog: Catalog, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    save_with_peft(model_folder("qwen3"), tmp_path / "adapter", setting)
    facts, [name] = catalog.facts("qwen3"), setting
    with pytest.raises(UnsupportedError, match=name):
        read_adapter(tmp_path / "adapter", facts=facts)
    with pytest.raises(UnsupportedError, match=name):
        merge_adapter(facts, tmp_path / "adapter", tmp_path / "merged")


def test_every_default_of_peft_is_read_and_anything_else_named(
    catalog: Catalog, trainer: TorchTrainer, tmp_path: Path
) -> None:
    new_run(trainer, config=LORA)
    trainer.save("run", include_optimizer=False)(tmp_path)
    path, facts = tmp_path / "adapter_config.json", catalog.facts("qwen3")
    settings = peft.LoraConfig().to_dict() | json.loads(path.read_text())
    path.write_text(json.dumps(settings))
    read_adapter(tmp_path, facts=facts)
    for name in settings.keys() - FREE | {"a_setting_to_come"}:
        path.write_text(json.dumps(settings | {name: "other"}))
        with pytest.raises(UnsupportedError, match=name):
            read_adapter(tmp_path, facts=facts)
    path.write_text(json.dumps(settings | {"a_setting_to_come": None}))
    read_adapter(tmp_path, facts=facts)


def test_the_table_of_settings_is_that_of_peft() -> None:
    defaults = peft.LoraConfig().to_dict()
    assert FREE | PLAIN.keys() <= defaults.keys()
    for name, default in defaults.items():
        assert name in FREE or default in PLAIN.get(name, NEUTRAL), name
    assert PLAIN["peft_type"] == (peft.PeftType.LORA.value,)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tensor_that_is_not_of_lora_must_be_the_bases(
    sharded: bool, model_folder: Callable[[str], Path], catalog: Catalog, tmp_path: Path
) -> None:
    name, base = "qwen3", model_folder("qwen3")
    if sharded:
        name, base = str(tmp_path / "base"), tmp_path / "base"
        reference_model(model_folder("qwen3")).save_pretrained(base, max_shard_size="8KB")
        assert (base / "model.safetensors.index.json").exists()
    facts, adapter = catalog.facts(name), tmp_path / "adapter"
    save_with_peft(base, adapter, {"target_modules": ["q_proj", "lm_head"]})
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [name for name in tensors if "lora_" not in name]
    assert copies
    read_adapter(adapter, facts=facts)
    half = {n: tensors[n].bfloat16() for n in copies}
    save_file(tensors | half, file)
    read_adapter(adapter, facts=facts)
    embedding = "base_model.model.model.embed_tokens.weight"
    wrong = {
        copies[0]: tensors[copies[0]] + 0.1,
        embedding: torch.zeros(70, 32),  # of a tokenizer that grew
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(64),
        "base_model.model.model.layers.0.input_layernorm.weight": torch.zeros(32),
        "base_model.model.score.weight": torch.ones(2, 32),
    }
    for name, tensor in wrong.items():
        save_file(tensors | {name: tensor}, file)
        with pytest.raises(UnsupportedError, match=name):
            read_adapter(adapter, facts=facts)
