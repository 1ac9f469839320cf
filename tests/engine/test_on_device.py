"""What is shown on the very device: it learns, bfloat16 has its sheet, and memory really ends.

`make gpu` runs these on CUDA, where what `measured` records becomes rows of its table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.conftest import DEVICE, datum, gradient_of, job, new_run, result_of, sequences
from tests.engine.sampler_kit import save_tokenizer
from tests.quantised.measure import measure
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import AdamParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weaver.engine.torch.catalog import Catalog

STEPS = 20
LEARNED = 0.5
"""Nats a token by which the loss falls at least; without a learning rate it stays."""
TENSE = 0.7
"""Of what a pass took beyond what was there: the memory that the same pass finds the next time."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [3e-2, 0.0], ids=["learns", "control"])
def test_it_learns(catalog: Catalog, dtype: torch.dtype, rate: float) -> None:
    trainer = TorchTrainer(ModelStore(catalog, device=DEVICE, dtype=dtype, threads=1))
    new_run(trainer, "run")
    work = job("run", [datum(tokens) for tokens in sequences(24, 17, 31)])
    losses = []
    for _ in range(STEPS):
        losses.append(result_of(trainer, work).metrics["loss"])
        trainer.optim_step("run", AdamParams(learning_rate=rate))
    if rate:
        assert losses[-1] < losses[0] - LEARNED
    else:
        assert losses[-1] == pytest.approx(losses[0], rel=1e-3)


def test_bfloat16_has_its_sheet(
    model_folder: Callable[[str], Path], catalog: Catalog, record_property: Callable[..., None]
) -> None:
    save_tokenizer(model_folder("qwen3"))
    _, sheet = measure(catalog, "qwen3", forms=("float32", "bfloat16"))
    for name, value in (
        ("mean", f"{sheet.mean:.1e} nats"),
        ("largest", f"{sheet.most:.1e} nats"),
        ("cosine of gradients", f"{sheet.cosine:.5f}"),
        ("trainer against sampler", f"{sheet.gap:.1e} nats"),
    ):
        record_property(f"tiny qwen3, bfloat16 against float32: {name}", value)
    assert sheet.mean < 0.05 and sheet.cosine > 0.99 and sheet.gap < 0.3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="is of CUDA's allocator")
def test_a_pass_that_does_not_fit_is_halved(
    catalog: Catalog, record_property: Callable[..., None]
) -> None:
    def trained() -> tuple[TorchTrainer, torch.Tensor]:
        store = ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)
        trainer = TorchTrainer(store, tokens_per_pass=2**15)
        new_run(trainer, "run")
        work = job("run", [datum(tokens) for tokens in sequences(*[250] * 120)])
        torch.cuda.reset_peak_memory_stats(DEVICE)
        result_of(trainer, work)
        return trainer, torch.cat([g.flatten() for g in gradient_of(trainer, "run").values()])

    trained()
    before = torch.cuda.memory_allocated(DEVICE)
    _, right = trained()
    most = before + TENSE * (torch.cuda.max_memory_allocated(DEVICE) - before)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(most / total, DEVICE)
        trainer, gradient = trained()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    record_property("passes halved by a real lack of memory", trainer.repeated_passes)
    assert trainer.repeated_passes == 1
    assert float((gradient - right).norm()) <= 1e-5 * float(right.norm())
