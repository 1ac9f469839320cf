"""Models that are measured: made from a configuration, with random weights, into a folder once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / ".bench"
QWEN3: dict[str, dict[str, Any]] = {
    "nano": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32},
    "60m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64},
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151_936,
    },
}
COMMON: dict[str, Any] = {
    "vocab_size": 32_000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
GEMMA3_270M: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 2048,
}


def config_of(shape: str) -> Any:
    import transformers

    if shape == "270m":
        return transformers.Gemma3TextConfig(**GEMMA3_270M, eos_token_id=None)
    name, _, vocabulary = shape.partition("-")
    sizes = {**COMMON, **QWEN3[name]}
    if vocabulary:
        sizes["vocab_size"] = 1000 * int(vocabulary.removesuffix("k"))
    return transformers.Qwen3Config(**sizes, bos_token_id=None, eos_token_id=None)


def made(shape: str, folder: Path = FOLDER) -> Path:
    """The folder of a shape's weights and tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = folder / shape
    if not (path / "made").exists():
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        config = config_of(shape)
        dtype = torch.bfloat16 if shape in ("0.6b", "8b") else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config.eos_token_id = None
        model.save_pretrained(path)
        vocabulary = {f"w{i}": i for i in range(config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        whole.pad_token = "w0"
        whole.save_pretrained(path)
        (path / "made").touch()
    return path
