"""The folder in which the recipes of `tinker-cookbook` run offline: models and data by their names.

Libraries of Hugging Face take a folder that is called as a name on its hub for that name, so the
recipes' own defaults find what lies here. The models are tiny and random, but for one habit: they
mostly write digits, ends of turns and what the recipes' rewards look for, so that rewards differ.
"""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING

import torch

from tests.zoo import TOKENIZERS
from tests.zoo.models import random_model
from weaver.engine.torch.files import without_progress_bars

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

STUDENT, TEACHER = "Qwen/Qwen3-8B", "Qwen/Qwen3-32B"
"""Names for which the recipes know how to write a conversation."""
CONTEXT = 4096
PHRASES = ("\\boxed{4}", "\\boxed{5}", "Guess: 5")
HABITS: Mapping[str, float] = {
    "<|im_end|>": 7.0,
    **dict.fromkeys("0123456789", 5.0),
    **dict.fromkeys(PHRASES, 6.0),
}
"""Logits; those of all else are about 0."""


def make(folder: Path) -> None:
    """Fills an empty folder."""
    for seed, name in enumerate((STUDENT, TEACHER)):
        save_model(folder / name, seed=seed)
    turns = [("user", "What is one and one?"), ("assistant", "It is two.")]
    talk = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 256
    write(folder / "HuggingFaceH4/no_robots", train=talk, test=talk[:128])
    sums = [{"question": f"What is 1 + {n}?", "answer": f"#### {1 + n}"} for n in (3, 4)] * 4
    write(folder / "openai/gsm8k", config="main", train=sums, test=sums[:2])
    rng = Random(0)
    pairs = [
        {
            side: f"\n\nHuman: Say {word}.\n\nAssistant: {answer}"
            for side, answer in (("chosen", word), ("rejected", "No."))
        }
        for word in ("".join(rng.choices("abcdef", k=5)) for _ in range(32))
    ]
    write(folder / "Anthropic/hh-rlhf", train=pairs, test=pairs[:4])
    asked = [{"question": f"What is {n} + {n}?"} for n in range(16)]
    write(folder / "zwhe99/DeepMath-103K", train=asked)


def save_model(folder: Path, *, seed: int) -> None:
    """A random model with `HABITS`, and its tokenizer."""
    words = TOKENIZERS["qwen"]()
    words.add_tokens(list(PHRASES))
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("eos", "pad")}
    settings = {"vocab_size": len(words), "max_position_embeddings": CONTEXT, "seed": seed}
    model = random_model("qwen3", **settings, **ids)
    with torch.no_grad(), without_progress_bars():
        # of the normed state before the head, the first number is then about 5 in any context
        model.model.embed_tokens.weight[:, 0] = 40.0
        model.model.norm.weight[0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        for text, logit in HABITS.items():
            (token,) = words.encode(text, add_special_tokens=False)
            model.lm_head.weight[token, 0] = logit / 5.0
        model.save_pretrained(folder)
    words.save_pretrained(folder)


def write(folder: Path, *, config: str | None = None, **splits: Iterable[object]) -> None:
    """A data set of JSON lines; with a name of its own for its one configuration, if given."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        lines = [json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    if config is not None:
        files = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
        card = json.dumps({"configs": [{"config_name": config, "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
