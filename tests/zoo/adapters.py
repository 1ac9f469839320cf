"""LoRA adapters as PEFT saves them, of random values that change the output."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from tests.optional import peft

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"target_modules": r".*(q_proj|k_proj|v_proj|qkv_proj|query_key_value|out?_proj)"},
    "all": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "q_proj", "qkv_proj", "query_key_value"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.3},
    "bfloat16": {"target_modules": "all-linear"},
    "old": {"target_modules": "all-linear"},
}
"""Settings of PEFT's `LoraConfig`. `bfloat16` is saved in that dtype, and `old` is the file of a
PEFT of 2023, with few settings. Beside `head` PEFT saves copies of the base's embeddings."""
OLD = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout")


def save_adapter(base: Path, kind: str, folder: Path) -> None:
    """An adapter of `kind` on the model in `base`, into `folder`."""
    settings = dict(ADAPTERS[kind])
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.name_or_path = str(base)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        adapted = peft.get_peft_model(model, config)
        if kind == "bfloat16":
            adapted.to(torch.bfloat16)
        adapted.save_pretrained(folder)
    if kind == "old":
        path = folder / "adapter_config.json"
        written = json.loads(path.read_text())
        kept = {name: written[name] for name in (*OLD, "target_modules", "bias")}
        path.write_text(json.dumps(kept))
