"""`TorchEngine`: models that transformers can read, trained and sampled by torch on one device.

The embedded client and the server make one and give it to the service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weaver.config import EngineSettings
from weaver.engine.threaded import ThreadedEngine
from weaver.engine.torch.budget import Budget
from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.device import DTYPES, choose_device, free_bytes, threads_text
from weaver.engine.torch.memory import Plan, Recompute
from weaver.engine.torch.merging import merge_adapter
from weaver.engine.torch.model_store import ModelStore
from weaver.engine.torch.quantised import check_kind
from weaver.engine.torch.sampler import TorchSampler
from weaver.engine.torch.text import encode_prompt
from weaver.engine.torch.trainer import TorchTrainer
from weaver.types import JsonDict, Message, ModelInfo, Quantize, SamplingParams, TrainingMode


class TorchEngine(ThreadedEngine):
    """`models` names folders or Hugging Face ids beside `weaver-nano`.

    Args:
        allow_paths: also accept any local folder or Hugging Face id as a base model.
        device: `auto` (CUDA where torch has it, else the CPU), `cpu`, `cuda`, `cuda:1`, or `mps`,
            which is untested.
        dtype: of frozen base weights, `float32`, `bfloat16` or `auto` (bfloat16 on CUDA, else
            float32); what is trained is float32.
        quantize: frozen layers of attention and MLP to `int8` or `nf4`, or `none`; they are only
            kept so, and compute in `dtype`.
        threads: of torch; 0 takes one below 20 million parameters, else all physical cores.
        memory_gb: gigabytes that it may use on the device; 0 takes what is free there now.
        kv_cache_gb: gigabytes for keys and values of samples; 0 is half of what the model leaves.
        sample_rows: samples that are drawn at once; 0 is 64 on a CPU, else 256.
        tokens_per_pass: in training; 0 chooses by memory.
        recompute: layers that compute their activations again, `off`, `all`, or as few as need be.
        deterministic: no result depends on what else runs.

    Raises:
        ConfigError: the device or dtype cannot be used here.
        MissingDependencyError: nf4 needs an extra of the package.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path] | None = None,
        *,
        allow_paths: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        quantize: Quantize = "none",
        threads: int = 0,
        memory_gb: float = 0,
        kv_cache_gb: float = 0,
        sample_rows: int = 0,
        tokens_per_pass: int = 0,
        recompute: Recompute = "auto",
        deterministic: bool = False,
    ) -> None:
        self.device = choose_device(device, dtype)
        check_kind(quantize)
        self.quantize = quantize
        self.memory = int(memory_gb * 1e9) or free_bytes(self.device.place)
        """Bytes; None is not known."""
        self._catalog = Catalog(models or {}, allow_paths=allow_paths)
        self._store = ModelStore(
            self._catalog,
            device=self.device.place,
            dtype=DTYPES[self.device.dtype],
            threads=threads,
            memory=self.memory,
            quantize=quantize,
        )
        self._trainer = TorchTrainer(
            self._store,
            deterministic=deterministic,
            tokens_per_pass=tokens_per_pass,
            recompute=recompute,
        )
        self._sampler = TorchSampler(
            self._store,
            max_rows=sample_rows,
            cache_bytes=int(kv_cache_gb * 1e9),
            deterministic=deterministic,
        )
        super().__init__(self._trainer, self._sampler)

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        models: Mapping[str, str | Path] | None = None,
        *,
        allow_paths: bool = True,
    ) -> TorchEngine:
        """One as the user has set it."""
        return cls(
            models,
            allow_paths=allow_paths,
            device=settings.device,
            dtype=settings.dtype,
            quantize=settings.quantize,
            threads=settings.threads,
            memory_gb=settings.memory_gb,
            kv_cache_gb=settings.kv_cache_gb,
            sample_rows=settings.sample_rows,
            tokens_per_pass=settings.tokens_per_pass,
            recompute=settings.recompute,
            deterministic=settings.deterministic,
        )

    @property
    def description(self) -> str:
        device, threads = self.device, threads_text(self._store.threads)
        kept = "" if self.quantize == "none" else f", frozen layers kept in {self.quantize}"
        where = f"{device.place} ({device.why}), {device.dtype}{kept}"
        return f"torch {torch.__version__} on {where}, {threads}"

    @property
    def counts(self) -> Mapping[str, int]:
        return {"repeated_passes": self._trainer.repeated_passes, **self._sampler.counts}

    def list_models(self) -> list[ModelInfo]:
        """The configured models; any other name is still tried."""
        return [self.get_model(name) for name in self._catalog.names()]

    def get_model(self, base_model: str) -> ModelInfo:
        known = {"dtype": self.device.dtype, "quantize": self.quantize}
        return self.facts(base_model).info.model_copy(update=known)

    def facts(self, base_model: str) -> ModelFacts:
        """Errors: see `get_model`."""
        return self._catalog.facts(base_model)

    @property
    def budget(self) -> Budget:
        """What is sampled at once."""
        return self._sampler.budget

    def plan(self, base_model: str, training_mode: TrainingMode) -> Plan:
        """How training passes are laid out. Errors: see `get_model`."""
        return self._trainer.plan(base_model, training_mode)

    def max_tokens_trained(self, base_model: str, training_mode: TrainingMode) -> int | None:
        return self.plan(base_model, training_mode).longest

    def encode(
        self,
        base_model: str,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[JsonDict] = (),
    ) -> list[int]:
        facts = self.facts(base_model)
        facts.check_text(prompt)
        return encode_prompt(facts.tokenizer, prompt, name=base_model, tools=tools)

    def check_structure(self, base_model: str, params: SamplingParams) -> None:
        self.facts(base_model).grammars.compiled(params)

    def tokenizer(self, base_model: str) -> Any:
        return self.facts(base_model).tokenizer

    def tokenizer_files(self, base_model: str) -> Mapping[str, bytes]:
        return self.facts(base_model).tokenizer_files()

    def origin(self, base_model: str) -> str:
        return self.facts(base_model).origin

    def merge_adapter(self, base_model: str, adapter: Path, folder: Path) -> None:
        merge_adapter(self.facts(base_model), adapter, folder)

    def _forget(self) -> None:
        super()._forget()
        self._trainer.close()
        self._sampler.close()
        self._store.close()
