"""The estimate of `weaver doctor` against what the engine really holds, and what loading takes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.engine.conftest import SIZES, save_tiny
from weaver.engine.torch.device import free_bytes, needs_of
from weaver.engine.torch.memory import shares
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
    assert said.endswith("try WEAVER_QUANTIZE=nf4 or a smaller model")
    _, said = needs_of(catalog.facts("llama"), dtype="bfloat16", quantize="nf4").against(0)
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


def test_in_a_container_what_files_fill_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nactive_file 300000\ninactive_file 700000\n")
    monkeypatch.setattr("weaver.machine.CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 2_000_000


def test_what_is_left_beside_the_weights_is_shared(catalog: Catalog) -> None:
    facts = catalog.facts("llama")
    needs = needs_of(facts, dtype="float32")
    passes, cache = shares(facts, free=10**8, dtype=torch.float32, device=torch.device("cuda"))
    assert passes == cache == (9 * 10**7 - needs.weights - needs.adapter) // 2
    full, _ = shares(facts, free=10**8, dtype=torch.float32, training_mode="full_ft")
    assert full == (9 * 10**7 - 5 * needs.weights) // 2
    assert shares(facts, free=needs.weights, dtype=torch.float32) == (0, 0)


LOADING = """
import sys, torch
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore

def most_bytes():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])

store = ModelStore(
    Catalog({}, allow_paths=True), device=torch.device("cpu"), dtype=torch.float32, threads=1
)
store.base(sys.argv[1])  # what is imported, and the libraries' own
before = most_bytes()
store.base(sys.argv[2])
print(most_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_is_in_memory_once_while_it_is_loaded(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4}
    save_tiny(transformers.Qwen3Config(**SIZES), tmp_path / "small")
    save_tiny(transformers.Qwen3Config(**sizes), tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 100e6
    done = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.8 * size < int(done.stdout) < 1.3 * size, (int(done.stdout), size)
