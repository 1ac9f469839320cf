"""`TorchEngine`: models that transformers can read, trained and sampled by torch on one device.

The embedded client and the server make one and give it to the service.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weaver.config import EngineSettings
from weaver.engine.base import ImportedWeights, WeightsRef
from weaver.engine.sources import ModelSource
from weaver.engine.threaded import ThreadedEngine
from weaver.engine.torch.budget import Budget
from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.device import (
    DTYPES,
    choose_device,
    device_gauges,
    free_bytes,
    size_text,
    threads_text,
)
from weaver.engine.torch.importing import import_weights
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
        model_memory_gb: gigabytes of them for base models, of which those used least lately are
            unloaded for others; 0 is half of what can be used, and more for one that is alone.
        kv_cache_gb: gigabytes for keys and values of samples; 0 is half of what the model leaves.
        sample_rows: samples that are drawn at once; 0 is 64 on a CPU, else 256.
        tokens_per_pass: in training; 0 chooses by memory.
        head_rows: tokens whose logits are made at once in training; 0 chooses by memory.
        recompute: layers that compute their activations again, `off`, `all`, or as few as need be.
        deterministic: no result depends on what else runs.

    Raises:
        ConfigError: the device or dtype cannot be used here.
        MissingDependencyError: nf4 needs an extra of the package.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path | ModelSource] | None = None,
        *,
        allow_paths: bool = True,
        device: str = "auto",
        dtype: str = "auto",
        quantize: Quantize = "none",
        threads: int = 0,
        memory_gb: float = 0,
        model_memory_gb: float = 0,
        kv_cache_gb: float = 0,
        sample_rows: int = 0,
        tokens_per_pass: int = 0,
        head_rows: int = 0,
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
            model_memory=int(model_memory_gb * 1e9),
        )
        self._trainer = TorchTrainer(
            self._store,
            deterministic=deterministic,
            tokens_per_pass=tokens_per_pass,
            head_rows=head_rows,
            recompute=recompute,
        )
        self._sampler = TorchSampler(
            self._store,
            max_rows=sample_rows,
            cache_bytes=int(kv_cache_gb * 1e9),
            deterministic=deterministic,
        )
        super().__init__(self._trainer, self._sampler)
        room = self._store.room
        room.waiters.append(self._wanted)
        room.reading.wake = self._wake

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        models: Mapping[str, str | Path | ModelSource] | None = None,
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
            model_memory_gb=settings.model_memory_gb,
            kv_cache_gb=settings.kv_cache_gb,
            sample_rows=settings.sample_rows,
            tokens_per_pass=settings.tokens_per_pass,
            head_rows=settings.head_rows,
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
        counts = {"repeated_passes": self._trainer.repeated_passes, **self._sampler.counts}
        room = self._store.room
        return {**counts, "model_loads": room.loads, "model_unloads": room.unloads}

    @property
    def gauges(self) -> Mapping[str, float]:
        room = self._store.room
        return {
            "base_models": len(room.residents.names),
            "base_model_bytes": room.residents.nbytes,
            "own_model_bytes": room.owned_bytes,
            "waiting_for_models": len(self._sampler.waiting) + len(self._wanted()),
            **device_gauges(self.device.place),
        }

    @property
    def loaded_models(self) -> set[str]:
        there = self._store.room.residents.names
        return {name for name in self._catalog.names() if self._catalog.shared(name) in there}

    def list_models(self) -> list[ModelInfo]:
        """The configured models; any other name is still tried."""
        return [self.get_model(name) for name in self._catalog.names()]

    def get_model(self, base_model: str) -> ModelInfo:
        facts = self.facts(base_model)
        known = {"dtype": self.device.dtype, "quantize": self.quantize}
        return facts.info.model_copy(update={**known, "size_bytes": self._store.room.size(facts)})

    def prepare(self, *, larger: Collection[str] = ()) -> list[ModelInfo]:
        """Checks the configured models, and loads those that are to be there at the start.

        Before anything else is asked of the engine. What is wanted of a model that is `larger` than
        the memory fails when it is wanted.

        Raises:
            ConfigError: those to be loaded do not fit together.
            UnknownModelError, UnsupportedError: one cannot run here, or its weights are not whole.
        """
        self._store.check_models(larger=larger)
        for name in dict.fromkeys(map(self._catalog.shared, self._catalog.names(load="start"))):
            self._store.base(name)
        loaded = self.loaded_models
        return [m.model_copy(update={"loaded": m.name in loaded}) for m in self.list_models()]

    def lane(self, run_id: str, base_model: str) -> str:
        """Runs of one base model: those of others go on while it is waited for."""
        return self._catalog.shared(base_model)

    def facts(self, base_model: str) -> ModelFacts:
        """Errors: see `get_model`."""
        return self._catalog.facts(base_model)

    @property
    def budget(self) -> Budget:
        """What is sampled at once."""
        return self._sampler.budget

    def model_memory_text(self, base_model: str) -> str:
        """What base models may take together, and this one does. Errors: see `get_model`."""
        room, facts = self._store.room, self.facts(base_model)
        room.check_alone(facts)
        budget, own = room.residents.budget, size_text(room.size(facts))
        if budget is None:
            return f"{own} for this one; what is free is not known here"
        more = "" if room.residents.strict else ", or one of them what is free"
        return f"{size_text(budget)} together{more}; this one takes {own} at most"

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

    def import_weights(
        self, source: Path, folder: Path, *, base_model: str | None
    ) -> ImportedWeights:
        return import_weights(
            self._catalog, source, folder, base_model=base_model, quantize=self.quantize
        )

    async def publish(self, weights_id: str, ref: WeightsRef) -> int:
        """What is wrong with a base model is said when its weights are opened."""
        if ref.uri is None:
            base = partial(self._store.base, ref.base_model)
            await self._train(base, base_model=ref.base_model)
        return await super().publish(weights_id, ref)

    def _delay_s(self, base_model: str, since: float) -> float:
        return self._store.room.delay_s(base_model, since=since)

    @property
    def _samples_delay_s(self) -> float | None:
        return self._sampler.delay_s

    def _wanted(self) -> list[tuple[str, float]]:
        """Base models that calls of the trainer need, and since when, in any thread."""
        there = self._store.room.residents.names
        asked = [(self._catalog.shared(a.base_model), a.since) for a in self.asked if a.base_model]
        return [(name, since) for name, since in asked if name not in there]

    def _forget(self) -> None:
        super()._forget()
        self._trainer.close()
        self._sampler.close()
        self._store.close()
