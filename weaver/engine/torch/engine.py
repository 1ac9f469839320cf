"""`TorchEngine`: models that transformers can read, trained and sampled by torch on one device.

The embedded client and the server make one and give it to the service. `weaver doctor` asks before
anything is loaded what a model would take, and what is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weaver.engine.threaded import ThreadedEngine
from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.checkpoints import merge_adapter
from weaver.engine.torch.lora import roles
from weaver.engine.torch.models import ModelStore
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.text import encode_prompt
from weaver.engine.torch.trainer import TorchTrainer
from weaver.errors import ConfigError
from weaver.types import LoraConfig, Message, ModelInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAM_COPIES = 4
"""Of each trained value, in float32: itself, its gradient and two moments."""
CACHED_TOKENS = 4096
USABLE = 0.9
"""The rest is for activations of small batches and for everything else."""
CGROUP = Path("/sys/fs/cgroup")


class TorchEngine(ThreadedEngine):
    """`models` names folders or Hugging Face ids beside `weaver-nano`.

    Args:
        allow_paths: also accept any local folder or Hugging Face id as a base model.
        dtype: of frozen base weights, `float32` or `bfloat16`; what is trained is float32.
        threads: of torch; 0 takes one below 20 million parameters, else all physical cores.
        deterministic: no result depends on what else runs.

    Raises:
        ConfigError: the device or dtype cannot be used here.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path] | None = None,
        *,
        allow_paths: bool = True,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 0,
        deterministic: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"is {dtype!r}.", field="dtype", hint="Use float32 or bfloat16.")
        self._dtype = dtype
        self._catalog = Catalog(models or {}, allow_paths=allow_paths)
        self._store = ModelStore(
            self._catalog, device=_device(device), dtype=DTYPES[dtype], threads=threads
        )
        self._trainer = TorchTrainer(self._store, deterministic=deterministic)
        self._sampler = TorchSampler(self._store, deterministic=deterministic)
        super().__init__(self._trainer, self._sampler)

    @property
    def description(self) -> str:
        store = self._store
        dtype = str(store.dtype).removeprefix("torch.")
        return f"torch {torch.__version__} on {store.device}, {dtype}, {store.threads_text}"

    def list_models(self) -> list[ModelInfo]:
        """The configured models; any other name is still tried."""
        return [self.get_model(name) for name in self._catalog.names()]

    def get_model(self, base_model: str) -> ModelInfo:
        info = self._catalog.facts(base_model).info
        return info.model_copy(update={"dtype": self._dtype})

    def encode(self, base_model: str, prompt: str | Sequence[Message]) -> list[int]:
        facts = self._catalog.facts(base_model)
        facts.check_text(prompt)
        return encode_prompt(facts.tokenizer, prompt, name=base_model)

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return self._catalog.facts(base_model).tokenizer_files()

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        merge_adapter(self._catalog.facts(base_model), adapter, folder)

    def _forget(self) -> None:
        super()._forget()
        self._trainer.close()
        self._sampler.close()
        self._store.close()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"is {name!r}: {str(error).splitlines()[0]}", field="device", hint="Use cpu or cuda."
        ) from error
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """In bytes."""

    weights: int
    adapter: int
    """A LoRA adapter of the default rank in training."""
    cache: int
    """Keys and values of one sequence of `cached_tokens`."""
    cached_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.cache

    def against(self, free: int | None) -> tuple[bool, str]:
        """Whether it fits, as far as is known, and the sum in words."""
        parts = (
            f"{_size(self.weights)} weights, {_size(self.adapter)} adapter and optimizer, "
            f"{_size(self.cache)} cache of {self.cached_tokens:,} tokens"
        )
        if free is None:
            return True, f"needs {_size(self.total)} ({parts}); what is free is not known here"
        fits = self.total <= USABLE * free
        verdict = "fits" if fits else "DOES NOT FIT; try WEAVER_DTYPE=bfloat16 or a smaller model"
        return fits, f"needs {_size(self.total)} of {_size(free)} free ({parts}): {verdict}"


def needs_of(facts: ModelFacts, *, dtype: str) -> Needs:
    """Without activations, which grow with the tokens of a pass."""
    lora = LoraConfig()
    chosen = roles(lora)
    sides = (t.in_features + t.out_features for t in facts.targets.values() if chosen[t.role])
    tokens = min(CACHED_TOKENS, facts.info.context_length)
    values = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * tokens
    size = DTYPES[dtype].itemsize
    return Needs(
        weights=facts.info.num_parameters * size,
        adapter=ADAM_COPIES * torch.float32.itemsize * lora.rank * sum(sides),
        cache=values * size,
        cached_tokens=tokens,
    )


def free_bytes(device: str) -> int | None:
    """Of the device, or of this machine (or its container) for `cpu`; None where it is not told."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    known = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        limit = int((CGROUP / "memory.max").read_text())
        known.append(limit - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # another system, or a container without a limit
        pass
    return min(known, default=None)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
