"""The estimate of `weaver doctor` against what the engine really holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from weaver.engine.torch.device import free_bytes, needs_of
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.catalog import Catalog
    from weaver.engine.torch.trainer import TorchTrainer


def test_weights_and_adapter_are_counted_exactly(
    catalog: Catalog, trainer: TorchTrainer, model_folder: Callable[[str], Path]
) -> None:
    needs = needs_of(catalog.facts("llama"), dtype="float32")
    weights = load_file(model_folder("llama") / "model.safetensors")
    assert needs.weights == sum(tensor.nbytes for tensor in weights.values())
    config = LoraConfig(rank=16, train_unembed=True)
    trainer.create_run("run", "llama", training_mode="lora", lora_config=config, seed=0)
    values = sum(t.nbytes for t in trainer.snapshot("run").tensors.values())
    assert needs.adapter == 4 * values * LoraConfig().rank // config.rank
    assert needs.cache == 2 * 2 * 2 * 8 * 4 * needs.cached_tokens  # K, V; layers; heads; dim; fp32
    half = needs_of(catalog.facts("llama"), dtype="bfloat16")
    assert (2 * half.weights, 2 * half.cache) == (needs.weights, needs.cache)


def test_the_verdict_is_in_words(catalog: Catalog) -> None:
    needs = needs_of(catalog.facts("llama"), dtype="float32")
    fits, said = needs.against(2 * needs.total)
    assert fits and said.endswith("fits") and "adapter and optimizer" in said
    fits, said = needs.against(needs.total)
    assert not fits and "DOES NOT FIT" in said and "WEAVER_DTYPE=bfloat16" in said
    _, said = needs_of(catalog.facts("llama"), dtype="bfloat16").against(0)
    assert said.endswith("try a smaller model")
    fits, said = needs.against(None)
    assert fits and "not known" in said


def test_free_memory_is_below_that_of_the_machine() -> None:
    free = free_bytes(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not tell")
    with open("/proc/meminfo") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < free < total
