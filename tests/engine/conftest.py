"""Tiny random models of every tested architecture, made from configurations, on one thread."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from weaver.checks import check_datums
from weaver.engine.base import GradientJob
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import Datum, ForwardBackwardResult, LoraConfig, ModelInput, TrainingMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

DEVICE = torch.device(os.environ.get("WEAVER_TEST_DEVICE", "cpu"))
"""Where the engine computes; what it is compared with is computed on the CPU."""
of_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="is of the CPU alone")
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
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {
    **WINDOW,
    "head_dim": 8,
    "final_logit_softcapping": 20.0,
}
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **WINDOW}
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips all, by name, where the device that was named is not there."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


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


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def reference_model(path: Path) -> Any:
    """The same weights through transformers alone, with its eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    return model.eval()


def lora_config(architecture: str) -> LoraConfig:
    """Everything that can be adapted; Qwen3-MoE's experts cannot."""
    return LORA.model_copy(update={"train_mlp": architecture not in ("qwen3_moe", "gpt_oss")})


def sequences(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def datum(tokens: Sequence[int], **inputs: object) -> Datum:
    """Predicts each next token; `inputs` are further loss inputs."""
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": list(tokens[1:]), **inputs},
    )


def job(
    run_id: str,
    datums: Sequence[Datum],
    loss_fn: str = "cross_entropy",
    *,
    config: Mapping[str, float | str] | None = None,
    backward: bool = True,
) -> GradientJob:
    return GradientJob(
        run_id=run_id,
        datums=datums,
        loss_fn=loss_fn,
        loss_fn_config=check_datums(datums, loss_fn, config=config),
        backward=backward,
    )


def result_of(trainer: TorchTrainer, *jobs: GradientJob) -> ForwardBackwardResult:
    """The result of the first job, which must have succeeded."""
    first = trainer.forward_backward(jobs)[0]
    assert isinstance(first, ForwardBackwardResult), first
    return first


def gradient_of(trainer: TorchTrainer, run_id: str) -> dict[str, torch.Tensor]:
    """The accumulated gradient by parameter name, on the CPU."""
    run = trainer._run(run_id)
    assert run.gradient is not None
    return dict(zip(run.named_parameters(), (g.cpu() for g in run.gradient), strict=True))


def randomise(trainer: TorchTrainer, run_id: str, *, seed: int = 5, size: float = 0.1) -> None:
    """Gives B values other than 0, so that every gradient is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainer._run(run_id).named_parameters().items():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * size
            parameter.data.copy_(values)


@pytest.fixture(scope="session")
def store(catalog: Catalog) -> ModelStore:
    return ModelStore(catalog, device=DEVICE, dtype=torch.float32, threads=1)


@pytest.fixture
def trainer(store: ModelStore) -> TorchTrainer:
    return TorchTrainer(store)


def new_run(
    trainer: TorchTrainer,
    run_id: str = "run",
    architecture: str = "qwen3",
    *,
    config: LoraConfig | None = None,
    training_mode: TrainingMode = "lora",
    seed: int = 0,
) -> str:
    """A run whose adapter already changes the output; answers its id."""
    lora = (config or lora_config(architecture)) if training_mode == "lora" else None
    trainer.create_run(
        run_id, architecture, training_mode=training_mode, lora_config=lora, seed=seed
    )
    randomise(trainer, run_id)
    return run_id
