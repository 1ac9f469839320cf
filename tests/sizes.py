"""Writes the table of docs/cluster.md on which model fits which GPU: `python -m tests.sizes`.

It is reckoned by the plans that the engine itself makes, from configurations alone, for GPUs of
which this machine needs none.
"""

from __future__ import annotations

import json
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.device import adapter_bytes, full_training_bytes
from weaver.engine.torch.memory import make_plan, shares
from weaver.engine.torch.quantised import weights_bytes

if TYPE_CHECKING:
    from weaver.engine.torch.catalog import ModelFacts
    from weaver.types import TrainingMode

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
BEGIN, END = "<!-- python -m tests.sizes -->\n", "<!-- end -->\n"
GPUS_GB = (24, 48, 80, 141)
RANKS, GPU_GB, TOKENS = (1, 2, 4, 8, 16, 32, 64), 80, 8192
"""Of the last two columns."""
CONTEXT_FREE = 0.5e9
"""Bytes that CUDA keeps for itself; assumed."""
QWEN3: dict[str, tuple[int, int, int, int, bool]] = {
    "Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen3-4B": (2560, 9728, 36, 32, True),
    "Qwen3-8B": (4096, 12_288, 36, 32, False),
    "Qwen3-14B": (5120, 17_408, 40, 40, False),
    "Qwen3-32B": (5120, 25_600, 64, 64, False),
}
"""Hidden and intermediate size, layers, heads, and whether the head is the embedding."""


def facts_of(name: str) -> ModelFacts:
    hidden, intermediate, layers, heads, tied = QWEN3[name]
    config: dict[str, Any] = transformers.Qwen3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    ).to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return Catalog({name: folder}, allow_paths=False).facts(name)


def longest(
    facts: ModelFacts, gpu_gb: int, *, ranks: int = 1, training_mode: TrainingMode = "lora"
) -> int:
    """Tokens of a sequence whose gradient fits beside the base and one run; 0: none does."""
    device = torch.device("cuda")
    dtype = torch.bfloat16 if training_mode == "lora" else torch.float32
    free = int(gpu_gb * 1e9 - CONTEXT_FREE)
    of = partial(shares, facts, free=free, dtype=dtype, device=device, ranks=ranks)
    passes = of(training_mode=training_mode).passes
    plan = make_plan(facts, passes=passes, itemsize=dtype.itemsize, device=device)
    return plan.longest or 0


def ranks_for(facts: ModelFacts, training_mode: TrainingMode) -> str:
    """GPUs that take a sequence of `TOKENS`; more than one divide the base."""
    for ranks in RANKS:
        if longest(facts, GPU_GB, ranks=ranks, training_mode=training_mode) >= TOKENS:
            return f"{ranks}"
    return f"more than {RANKS[-1]}"


def table() -> str:
    head = [
        "model",
        "base",
        "a run of rank 32",
        "full fine-tuning",
        *(f"{gb} GB" for gb in GPUS_GB),
        "LoRA",
        "full",
    ]
    rows = [head, ["---"] * len(head)]
    for name in QWEN3:
        facts = facts_of(name)
        base = weights_bytes(facts, dtype=torch.bfloat16, quantize="none")
        sizes = [base, adapter_bytes(facts), full_training_bytes(facts)]
        fits = [longest(facts, gb) for gb in GPUS_GB]
        rows.append(
            [
                name,
                *(f"{size / 1e9:.1f} GB" for size in sizes),
                *(f"{tokens:,}" if tokens else "does not fit" for tokens in fits),
                ranks_for(facts, "lora"),
                ranks_for(facts, "full_ft"),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def in_page(text: str) -> str:
    """What the page has between the marks."""
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(in_page(text), table()))
