"""Tiny random models of any architecture, made from its configuration by known names of sizes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weaver.engine.torch.files import without_progress_bars

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VOCAB = 96
LARGEST = 8_000_000
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "emb_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_head_size": 8,
    "rotary_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "sliding_window_pattern": 2,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "global_attn_every_n_layers": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "pronunciation_embed_dim": 8,
    "pronunciation_vocab_size": 16,
    "shape_embed_dim": 8,
    "shape_vocab_size": 16,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values by the name of a configuration's field; a field that is None by default stays None."""
ALWAYS = {"pad_token_id", "bos_token_id", "eos_token_id", "num_hidden_layers"}
IF_KNOWN = {
    "head_dim",
    "is_decoder",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "num_key_value_heads",
    "topk_group",
}
"""Set where a configuration has such a field, even where that is None by default."""
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OWN: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": 48},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "phi4_multimodal": {
        "vision_config": {**TOWER, "image_size": 28, "crop_size": 28},
        "audio_config": {**TOWER, "num_blocks": 1, "nemo_conv_channels": 8},
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single architectures need besides."""


def tiny_config(model_type: str) -> Any:
    """A small configuration; raises whatever the architecture raises at it."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    fields = set(inspect.signature(kind.__init__).parameters) | vars(default).keys()
    settings = {}
    for name, value in SIZES.items():
        known = name in fields
        if name in ALWAYS or (
            known and (name in IF_KNOWN or isinstance(getattr(default, name, None), int))
        ):
            settings[name] = value
    heads = settings.get("num_attention_heads")
    if (
        getattr(default, "num_key_value_heads", None)
        == getattr(default, "num_attention_heads", None)
        and heads
    ):
        settings["num_key_value_heads"] = heads
    return kind(**{**settings, **OWN.get(model_type, {})})


def save_tiny(config: Any, folder: Path) -> None:
    """Random weights with logits of real spread, norms included; ValueError for large ones."""
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"has {size:,} parameters at its smallest")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                alpha = 0.2 * (float(parameter.abs().mean()) or 1.0)
                parameter.data.add_(torch.randn_like(parameter), alpha=alpha)
            else:
                parameter.data.mul_(4)
    with without_progress_bars():
        model.save_pretrained(folder)
