"""What the engine cannot compute is refused when it is opened, whatever makes it so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engine.conftest import DEVICE, LORA, SIZES, save_tiny
from weaver.engine.torch import model_check
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import CheckpointCorruptError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WINDOWED = {**SIZES, "sliding_window": 200, "layer_types": ["sliding_attention"] * 2}


def store_of(folder: Path, dtype: torch.dtype = torch.float32) -> ModelStore:
    catalog = Catalog({"base": folder}, allow_paths=False)
    return ModelStore(catalog, device=DEVICE, dtype=dtype, threads=1)


def llama(folder: Path, **changes: Any) -> Path:
    save_tiny(transformers.LlamaConfig(**SIZES), folder)
    write = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(write))
    return folder


def test_windows_longer_than_the_check_are_right_and_stay(tmp_path: Path) -> None:
    save_tiny(transformers.Qwen3Config(**WINDOWED, use_sliding_window=True), tmp_path)
    module = store_of(tmp_path).base("base").module
    assert module.config.sliding_window == 200
    assert module.config._attn_implementation == "weaver_packed"
    assert {layer.self_attn.sliding_window for layer in module.model.layers} == {200}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training_mode", ["lora", "full_ft"])
def test_a_window_that_lives_in_the_mask_only_is_refused(
    dtype: torch.dtype, training_mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(transformers.Qwen3Config(**WINDOWED, use_sliding_window=True), tmp_path)
    attention = transformers.models.qwen3.modeling_qwen3.Qwen3Attention
    made = attention.__init__

    def without_window(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.sliding_window = None

    monkeypatch.setattr(attention, "__init__", without_window)
    trainer = TorchTrainer(store_of(tmp_path, dtype))
    with pytest.raises(UnsupportedError, match="packed logits would differ") as caught:
        trainer.create_run(
            "run",
            "base",
            training_mode=training_mode,
            lora_config=LORA if training_mode == "lora" else None,
            seed=0,
        )
    assert caught.value.field == "base_model"


def test_an_attention_that_is_called_twice_a_layer_is_refused(tmp_path: Path) -> None:
    save_tiny(transformers.DiffLlamaConfig(**SIZES), tmp_path)
    with pytest.raises(UnsupportedError, match="read piece by piece would differ"):
        store_of(tmp_path).base("base")


def test_rows_of_two_adapters_that_are_mixed_up_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x.flip(1)).flip(1))
    with pytest.raises(UnsupportedError, match="packed logits would differ"):
        store_of(llama(tmp_path)).base("base")


def test_layers_that_get_some_rows_only_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x[:, :2]).mean() + x)
    with pytest.raises(UnsupportedError, match="rows, the routing has"):
        store_of(llama(tmp_path)).base("base")


def test_a_model_that_fails_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP

    def forward(self: Any, x: torch.Tensor) -> None:
        raise AssertionError("needs a kernel that is not there")

    monkeypatch.setattr(mlp, "forward", forward)
    with pytest.raises(UnsupportedError, match="needs a kernel that is not there"):
        store_of(llama(tmp_path)).base("base")


def test_want_of_memory_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    monkeypatch.setattr(mlp, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        store_of(llama(tmp_path)).base("base")


def test_a_model_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[bool] = []
    monkeypatch.setattr(
        "weaver.engine.torch.model_check.check_model", lambda m: checks.append(m.trainable)
    )
    store = store_of(llama(tmp_path))
    for _ in range(2):
        store.base("base")
        store.own("base")
    assert checks == [False, True]


def test_the_other_attempts_are_for_rounding_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = store_of(llama(tmp_path)).base("base")
    answers = iter(["packed logits would differ", ""])
    monkeypatch.setattr(model_check, "_difference", lambda *_, **__: next(answers))
    model_check.check_model(model)
    monkeypatch.setattr(model_check, "_difference", lambda *_, **__: "packed logits would differ")
    with pytest.raises(UnsupportedError, match="packed logits would differ"):
        model_check.check_model(model)


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "of_tomorrow"]
)
def test_quantised_weights_are_refused_by_their_scheme(method: str, tmp_path: Path) -> None:
    folder = llama(tmp_path, quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(UnsupportedError, match=method.replace("_", ".")) as caught:
        store_of(folder).base("base")
    assert caught.value.field == "base_model"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 70}, r"\[61, 32\], not \[70, 32\]"),
        ({"intermediate_size": 40}, r"mlp.*\[\d+, \d+\], not"),
        ({"num_hidden_layers": 3}, r"lack model\.layers\.2"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "cannot run here"),
        ({"rope_parameters": {"rope_type": "of_tomorrow", "rope_theta": 1.0}}, "of_tomorrow"),
        ({"hidden_act": "of_tomorrow"}, "of_tomorrow"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        store_of(llama(tmp_path, **changes)).base("base")
    assert caught.value.field == "base_model"


def transposed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(32, 48)


def packed_in_bytes(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.zeros(48, 16, dtype=torch.uint8)


def renamed(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.qweight"] = weights.pop("model.layers.0.mlp.up_proj.weight")


def with_scales(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(48, 1)


def with_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.bias"] = torch.ones(48)


def of_integers(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = torch.ones(48, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    "damage", [transposed, packed_in_bytes, renamed, with_scales, with_bias, of_integers]
)
def test_weights_of_another_form_are_refused_with_their_name(
    damage: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    file = llama(tmp_path) / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj") as caught:
        store_of(tmp_path).base("base")
    assert caught.value.field == "base_model"


def test_a_checkpoint_that_cannot_be_read_is_corrupt_not_a_defect(
    tmp_path: Path,
) -> None:
    folder = llama(tmp_path / "base")
    store, broken = store_of(folder), llama(tmp_path / "broken", vocab_size=70)
    trainer = TorchTrainer(store)
    trainer.create_run("run", "base", training_mode="full_ft", lora_config=None, seed=0)
    trainer.save("run", include_optimizer=False)(tmp_path / "broken")
    (broken / "config.json").write_text(
        json.dumps(json.loads((broken / "config.json").read_text()) | {"vocab_size": 70})
    )
    with pytest.raises(CheckpointCorruptError, match="not fit"):
        trainer.load("run", broken, include_optimizer=False)


def test_one_key_head_for_all_queries_is_right(tmp_path: Path) -> None:
    config = transformers.GPTBigCodeConfig(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=True
    )
    save_tiny(config, tmp_path)
    assert store_of(tmp_path).base("base").facts.num_kv_heads == 1


def test_latent_attention_is_refused_by_its_name(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(**SIZES | {"num_key_value_heads": 4}, kv_lora_rank=16)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="latent attention"):
        store_of(tmp_path).catalog.facts("base")
