"""Tiny random models of every tested architecture, made from configurations, on one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from weaver.engine.catalog import Catalog
from weaver.engine.models import LoadedModel, load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = {
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 20.0,
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model by architecture; norms are random too."""
    root = tmp_path_factory.mktemp("models")

    def folder(architecture: str) -> Path:
        path = root / architecture
        if not path.exists():
            save_tiny(ARCHITECTURES[architecture](), path)
        return path

    return folder


def save_tiny(config: Any, path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(path)


@pytest.fixture(scope="session")
def catalog(model_folder: Callable[[str], Path]) -> Catalog:
    return Catalog({name: model_folder(name) for name in ARCHITECTURES}, allow_paths=True)


@pytest.fixture(scope="session")
def loaded(catalog: Catalog) -> Callable[[str], LoadedModel]:
    """A frozen fp32 model by architecture, shared by all tests."""
    models: dict[str, LoadedModel] = {}

    def load(architecture: str) -> LoadedModel:
        if architecture not in models:
            models[architecture] = load_model(
                catalog.facts(architecture),
                catalog=catalog,
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
        return models[architecture]

    return load


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def reference_model(path: Path) -> Any:
    """The same weights through transformers alone, with its eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    return model.eval()
