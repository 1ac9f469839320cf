"""Writes the table of docs/cluster.md on which model fits which GPU: `python -m tests.sizes`.

It is reckoned by the plans that the engine itself makes, from configurations alone, for GPUs of
which this machine needs none.
"""

from __future__ import annotations

import json
import re
import tempfile
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

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
BEGIN, END = "<!-- python -m tests.sizes -->\n", "<!-- end -->\n"
GPUS_GB = (24, 48, 80, 141)
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


def longest(facts: ModelFacts, gpu_gb: int) -> str:
    """Tokens of a sequence whose gradient fits beside the base and one run."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    free = int(gpu_gb * 1e9 - CONTEXT_FREE)
    passes = shares(facts, free=free, dtype=dtype, device=device).passes
    plan = make_plan(facts, passes=passes, itemsize=dtype.itemsize, device=device)
    return f"{plan.longest:,}" if plan.longest else "does not fit"


def table() -> str:
    rows = [
        f"| model | base | a run of rank 32 | full fine-tuning | "
        f"{' | '.join(f'{gb} GB' for gb in GPUS_GB)} |",
        "| --- " * (4 + len(GPUS_GB)) + "|",
    ]
    for name in QWEN3:
        facts = facts_of(name)
        base = weights_bytes(facts, dtype=torch.bfloat16, quantize="none")
        sizes = [base, adapter_bytes(facts), full_training_bytes(facts)]
        shown = [f"{size / 1e9:.1f} GB" for size in sizes]
        fits = [longest(facts, gb) for gb in GPUS_GB]
        rows.append(f"| {name} | {' | '.join((*shown, *fits))} |")
    return "\n".join(rows) + "\n"


def in_page(text: str) -> str:
    """What the page has between the marks."""
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    assert found is not None
    return found[1]


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(in_page(text), table()))
