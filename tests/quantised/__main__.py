"""Measures and writes docs/quantised.md; a few minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import bitsandbytes
import torch
import transformers

from tests.engine.conftest import ARCHITECTURES, save_tiny
from tests.engine.sampler_kit import save_tokenizer
from tests.quantised.measure import Sheet, measure
from weaver.engine.torch.catalog import NANO, Catalog

PAGE = Path(__file__).parents[2] / "docs" / "quantised.md"
START = "<!-- python -m tests.quantised writes what follows -->\n"
TINY = ("gemma3", "llama", "mistral", "phi3", "qwen3")
SIZES_60M = {
    "vocab_size": 32768,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""About 60 million parameters, 35 of them in layers that are quantised."""


def rows(name: str, sheets: list[Sheet]) -> str:
    return "".join(
        f"| {name} | {s.form} | {s.mean:.1e} | {s.most:.1e} | {s.cosine:.5f} | {s.gap:.0e} "
        f"| {s.size_bytes / 1e6:.2f} |\n"
        for s in sheets
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for tiny in TINY:
            save_tiny(ARCHITECTURES[tiny](), root / f"tiny {tiny}")
        save_tiny(transformers.Qwen3Config(**SIZES_60M), root / "60M qwen3")
        folders = {folder.name: folder for folder in sorted(root.iterdir())}
        for folder in folders.values():
            save_tokenizer(folder)
        catalog = Catalog({**folders, "weaver-nano": NANO}, allow_paths=False)
        torch.set_num_threads(1)
        table = "".join(rows(one, measure(catalog, one)) for one in ("weaver-nano", *folders))
    versions = f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    head = PAGE.read_text().split(START)[0]
    PAGE.write_text(
        f"{head}{START}\nOn a CPU, with {versions}.\n\n"
        "| model | form | mean | largest | cosine | gap | MB |\n|---|---|---|---|---|---|---|\n"
        f"{table}"
    )


if __name__ == "__main__":
    main()
