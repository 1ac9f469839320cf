"""`TorchEngine`: models that transformers can read, trained and sampled by torch on one device.

The embedded client and the server make one and give it to the service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weaver.engine.threaded import ThreadedEngine
from weaver.engine.torch.catalog import Catalog
from weaver.engine.torch.checkpoints import merge_adapter
from weaver.engine.torch.device import DTYPES, choose_device, free_bytes, threads_text
from weaver.engine.torch.models import ModelStore
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.text import encode_prompt
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import Message, ModelInfo


class TorchEngine(ThreadedEngine):
    """`models` names folders or Hugging Face ids beside `weaver-nano`.

    Args:
        allow_paths: also accept any local folder or Hugging Face id as a base model.
        device: `auto` (CUDA where torch has it, else the CPU), `cpu`, `cuda`, `cuda:1`, or `mps`,
            which is untested.
        dtype: of frozen base weights, `float32`, `bfloat16` or `auto` (bfloat16 on CUDA, else
            float32); what is trained is float32.
        threads: of torch; 0 takes one below 20 million parameters, else all physical cores.
        memory_gb: gigabytes that it may use on the device; 0 takes what is free there now.
        kv_cache_gb: gigabytes for keys and values of samples; 0 is half of what the model leaves.
        sample_rows: samples that are drawn at once; 0 is 64 on a CPU, else 256.
        deterministic: no result depends on what else runs.

    Raises:
        ConfigError: the device or dtype cannot be used here.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path] | None = None,
        *,
        allow_paths: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 0,
        memory_gb: float = 0,
        kv_cache_gb: float = 0,
        sample_rows: int = 0,
        deterministic: bool = False,
    ) -> None:
        self._device = choose_device(device, dtype)
        self._catalog = Catalog(models or {}, allow_paths=allow_paths)
        self._store = ModelStore(
            self._catalog,
            device=self._device.place,
            dtype=DTYPES[self._device.dtype],
            threads=threads,
            memory=int(memory_gb * 1e9) or free_bytes(self._device.place),
        )
        self._trainer = TorchTrainer(self._store, deterministic=deterministic)
        self._sampler = TorchSampler(
            self._store,
            max_rows=sample_rows,
            cache_bytes=int(kv_cache_gb * 1e9),
            deterministic=deterministic,
        )
        super().__init__(self._trainer, self._sampler)

    @property
    def description(self) -> str:
        device, threads = self._device, threads_text(self._store.threads)
        where = f"{device.place} ({device.why}), {device.dtype}"
        return f"torch {torch.__version__} on {where}, {threads}"

    def list_models(self) -> list[ModelInfo]:
        """The configured models; any other name is still tried."""
        return [self.get_model(name) for name in self._catalog.names()]

    def get_model(self, base_model: str) -> ModelInfo:
        info = self._catalog.facts(base_model).info
        return info.model_copy(update={"dtype": self._device.dtype})

    def encode(self, base_model: str, prompt: str | Sequence[Message]) -> list[int]:
        facts = self._catalog.facts(base_model)
        facts.check_text(prompt)
        return encode_prompt(facts.tokenizer, prompt, name=base_model)

    def tokenizer(self, base_model: str) -> Any:
        return self._catalog.facts(base_model).tokenizer

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return self._catalog.facts(base_model).tokenizer_files()

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        merge_adapter(self._catalog.facts(base_model), adapter, folder)

    def _forget(self) -> None:
        super()._forget()
        self._trainer.close()
        self._sampler.close()
        self._store.close()
