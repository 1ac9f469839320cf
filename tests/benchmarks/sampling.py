"""Sampling against `generate` on a PEFT model: a 60M Qwen3, LoRA rank 32, fp32, one thread.

Temperature 1, prompts of 32 tokens, no end-of-sequence token. `generate` works on batches of 16,
each as long as its longest row. Both sides run in turns, and CPU time counts: see `training`. In
all it takes about two minutes of one core.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import torch
import transformers
from tokenizers import Tokenizer, models

from tests.benchmarks.training import QWEN3_60M, TARGETS, THREADS, paired_medians
from weaver.engine.base import SampleJob
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import LoraConfig, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PROMPT = 32
BATCH = 16
LONGEST = 64


def long_tailed(count: int) -> list[int]:
    """Lengths of replies: half below 13, some of 64 tokens."""
    rng = random.Random(0)
    return [max(1, min(LONGEST, round(rng.lognormvariate(2.5, 1.0)))) for _ in range(count)]


LOADS = {"16 x 32 tokens": ([32] * 16, 1.0), "64, long-tailed": (long_tailed(64), 2.0)}


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        save_model(folder)
        ours, theirs = weaver_sampler(folder), peft_generate(folder)
        print(f"{'requests':<18} {'weaver s':>9} {'PEFT s':>9} {'ratio':>6} {'goal':>5}   load")
        for load, (lengths, goal) in LOADS.items():
            mine, other = paired_medians(lambda n=lengths: ours(n), lambda n=lengths: theirs(n))
            cores = ", ".join(f"{x:.1f}" for x in os.getloadavg())
            print(
                f"{load:<18} {mine:>9.3f} {other:>9.3f} {other / mine:>6.2f} {goal:>5.1f}   {cores}"
            )
    torch.set_num_threads(threads)


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**QWEN3_60M)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [rng.choices(range(32_000), k=PROMPT) for _ in range(count)]


def weaver_sampler(folder: Path) -> Callable[[Sequence[int]], None]:
    store = ModelStore(
        Catalog({"base": folder}, allow_paths=False),
        device=torch.device("cpu"),
        dtype=torch.float32,
        threads=THREADS,
    )
    trainer, sampler = TorchTrainer(store), TorchSampler(store)
    config = LoraConfig(rank=32, train_unembed=False)
    trainer.create_run("run", "base", training_mode="lora", lora_config=config, seed=0)
    sampler.publish("weights", trainer.snapshot("run"))

    def run(lengths: Sequence[int]) -> None:
        for i, (prompt, length) in enumerate(zip(prompts(len(lengths)), lengths, strict=True)):
            sampler.add(
                SampleJob(
                    job_id=str(i),
                    weights_id="weights",
                    prompt=prompt,
                    params=SamplingParams(max_tokens=length),
                    num_samples=1,
                )
            )
        tokens = 0
        while sampler.busy:
            for progress in sampler.step():
                assert progress.result is not None, progress.error
                tokens += len(progress.result.sequences[0].tokens)
        assert tokens == sum(lengths)

    return run


def peft_generate(folder: Path) -> Callable[[Sequence[int]], None]:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()

    def run(lengths: Sequence[int]) -> None:
        for start in range(0, len(lengths), BATCH):
            ids = torch.tensor(prompts(len(lengths))[start : start + BATCH])
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(lengths[start : start + BATCH]),
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )

    return run


if __name__ == "__main__":
    main()
