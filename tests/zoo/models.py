"""A small configuration of each model family, and random weights for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3_rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "wide": ("qwen3", {"vocab_size": 2**18, "head_dim": 8, "num_hidden_layers": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, **MIXTURE}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **WINDOW},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 20.0, **WINDOW}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    ),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **WINDOW}),
    "starcoder2": ("starcoder2", {"sliding_window": 7}),
    "glm4": ("glm4", {"head_dim": 8}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
"""transformers' `model_type` and what differs from `SIZES`. `wide` has a large vocabulary, and
logits that spread as those of real models do."""
NO_MLP = {"qwen3_moe", "mixtral", "gpt_oss", "opt"}
"""Families whose feed-forward layers an adapter is refused for."""


def random_model(family: str, *, vocab_size: int, seed: int = 7, **settings: Any) -> Any:
    """A transformers model of `family` with random weights, norms included.

    `settings` are of its configuration, such as `eos_token_id`; `wide` keeps its own vocabulary.
    """
    model_type, own = FAMILIES[family]
    grouped = hasattr(AutoConfig.for_model(model_type), "num_key_value_heads")
    heads = {"num_key_value_heads": 2} if grouped else {}
    config = AutoConfig.for_model(
        model_type, **{**SIZES, **heads, "vocab_size": vocab_size, **own, **settings}
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        if family == "wide":
            model.lm_head.weight.data.normal_(0, 0.7)  # logits that spread by 4 nats
    return model.eval()
