"""The memory of a process: flat over thousands of steps and samples, and of a pass as planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import TYPE_CHECKING

import pytest
import transformers

from tests.engine.conftest import SIZES, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

SLACK = 16_000_000
"""Bytes. The lengths of what runs at the moment make reads of a flat load differ by 6 MB."""
STEPS, LEAKING_STEPS = 1000, 800
"""A published snapshot is 0.1 MB on average, so that these many that are kept are well above it."""


def growth(*arguments: str) -> int:
    """Bytes by which the last three of ten reads are above the three behind the second."""
    command = [sys.executable, "-m", "tests.engine.mixed_load", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read = json.loads(done.stdout)
    assert len(read) == 10
    return int(median(read[-3:]) - median(read[2:5]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_mixed_load_is_flat_and_a_leak_would_be_found() -> None:
    assert growth(str(STEPS)) < SLACK
    assert growth(str(LEAKING_STEPS), "keep") > SLACK


PEAK = """
import gc, random, sys, torch
from tests.engine.conftest import datum, job, new_run, result_of
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import LoraConfig

def most_bytes():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])

folder, mode, recompute = sys.argv[1:]
catalog = Catalog({"model": folder}, allow_paths=False)
store = ModelStore(catalog, device=torch.device("cpu"), dtype=torch.float32, threads=1)
trainer = TorchTrainer(store, recompute=recompute)
new_run(trainer, "run", "model", training_mode=mode, config=LoraConfig(rank=8))

def gradient(length):
    tokens = [random.randrange(3, 60) for _ in range(length + 1)]
    result_of(trainer, job("run", [datum(tokens)]))

gradient(40)  # what is made once
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = most_bytes()
gradient(2048)
plan = trainer.plan("model", mode)
size = plan.footprint.size([2048], recompute=plan.layers_recomputed([2048]))
own = store.catalog.facts("model").info.num_parameters * 4 if mode == "full_ft" else 0
print((size + own) / (most_bytes() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recompute", ["off", "all"])
@pytest.mark.parametrize("mode", ["lora", "full_ft"])
def test_a_pass_takes_what_is_planned_at_most(mode: str, recompute: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "max_position_embeddings": 4096}
    save_tiny(transformers.Qwen3Config(**SIZES | sizes, head_dim=64), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, mode, recompute],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    assert 1.0 < float(done.stdout) < 2.0, done.stdout
