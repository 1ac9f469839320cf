"""Training against transformers + PEFT: a 60M Qwen3, LoRA rank 32, fp32, one thread.

One step is forward, backward and AdamW. Both sides run in turns (ABAB...) in this process, and what
counts is CPU time, so that what else the machine does hardly matters; the ratio is of the medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers

from weaver.checks import check_loss
from weaver.engine.base import GradientJob
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import AdamParams, Datum, LoraConfig, ModelInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

THREADS = 1
ROUNDS = 3
RAGGED = (64, 80, 96, 128, 160, 224, 352, 800)
BATCHES = {"uniform 8 x 256": ((256,) * 8, 1.0), "ragged 64 to 800": (RAGGED, 3.0)}
QWEN3_60M: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = transformers.Qwen3Config(**QWEN3_60M)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ours, theirs = weaver_step(Path(folder)), peft_step(Path(folder))
        print(f"{'batch':<18} {'weaver s':>9} {'PEFT s':>9} {'ratio':>6} {'goal':>5}   load")
        for name, (lengths, goal) in BATCHES.items():
            tokens = [torch.randint(0, 32_000, (n + 1,)).tolist() for n in lengths]
            mine, other = paired_medians(lambda t=tokens: ours(t), lambda t=tokens: theirs(t))
            load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
            print(
                f"{name:<18} {mine:>9.3f} {other:>9.3f} {other / mine:>6.2f} {goal:>5.1f}   {load}"
            )
    torch.set_num_threads(threads)


def paired_medians(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Median CPU seconds of each, run in turns after one round that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS + 1):
        for run, kept in zip((first, second), times, strict=True):
            start = time.process_time()
            run()
            if round_:
                kept.append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def weaver_step(folder: Path) -> Callable[[Sequence[list[int]]], float]:
    store = ModelStore(
        Catalog({"base": folder}, allow_paths=False),
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=THREADS,
    )
    trainer = TorchTrainer(store)
    config = LoraConfig(rank=32, train_unembed=False)
    trainer.create_run("run", "base", training_mode="lora", lora_config=config, seed=0)

    def step(tokens: Sequence[list[int]]) -> float:
        datums = [
            Datum(
                model_input=ModelInput.from_ints(s[:-1]),
                loss_fn_inputs={"target_tokens": s[1:]},
            )
            for s in tokens
        ]
        options = check_loss("cross_entropy", None)
        job = GradientJob(
            run_id="run", datums=datums, loss_fn="cross_entropy", loss_fn_config=options
        )
        (result,) = trainer.forward_backward([job])
        trainer.optim_step("run", AdamParams())
        return float(result.metrics["loss"])  # type: ignore[union-attr]

    return step


def peft_step(folder: Path) -> Callable[[Sequence[list[int]]], float]:
    """The loop that people write: a padded batch, the mean over real tokens."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(tokens: Sequence[list[int]]) -> float:
        width = max(len(s) for s in tokens)
        ids = torch.zeros(len(tokens), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, s in enumerate(tokens):
            ids[row, : len(s)] = torch.tensor(s)
            mask[row, : len(s)] = 1
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


if __name__ == "__main__":
    main()
