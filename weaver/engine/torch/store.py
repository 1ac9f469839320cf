"""`ModelStore`: models in memory. Base models are loaded at first need and shared.

The trainer takes its models from here, and the sampler its `PublishedWeights`. `weaver doctor` asks
before anything is loaded what a model would take, and what is free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch.catalog import Catalog, ModelFacts
from weaver.engine.torch.files import check_finite, read_module, set_weights
from weaver.engine.torch.lora import Adapter, adapter_from_tensors, roles
from weaver.engine.torch.models import LoadedModel, check_model
from weaver.errors import EngineError
from weaver.types import LoraConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL_MODEL = 20_000_000
"""Parameters below which a second thread costs more than it gives: 6 ms a step against 660 ms."""
ADAM_COPIES = 4
"""Of each trained value, in float32: itself, its gradient and two moments."""
CACHED_TOKENS = 4096
USABLE = 0.9
"""The rest is for activations of small batches and for everything else."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, eq=False)
class PublishedWeights:
    """What `TorchSampler` samples from under one id. Never changes once made."""

    model: LoadedModel
    """The shared base, or a snapshot's own copy after full fine-tuning."""
    adapter: Adapter | None
    version: int


class ModelStore:
    """Frozen models by name, on one device in one dtype."""

    def __init__(
        self, catalog: Catalog, *, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        self.catalog = catalog
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self._models: dict[str, LoadedModel] = {}
        self._checked: set[tuple[str, bool]] = set()
        """Names, and whether trainable, of what is known to run here."""

    def base(self, name: str) -> LoadedModel:
        """The shared frozen model.

        Raises:
            UnknownModelError, UnsupportedError, EngineError: see `_load`.
        """
        if name not in self._models:
            facts = self.catalog.facts(name)
            self._models[name] = self._load(facts, dtype=self.dtype)
        return self._models[name]

    def own(self, name: str) -> LoadedModel:
        """A trainable model of one run's own, in float32 whatever the base's dtype."""
        facts = self.catalog.facts(name)
        return self._load(facts, dtype=torch.float32, trainable=True)

    def publish(self, snapshot: WeightSnapshot) -> PublishedWeights:
        """The snapshot on its base model.

        Raises:
            UnknownModelError, UnsupportedError: the base model cannot be loaded.
            NonFiniteError: a weight is NaN or infinite.
            CheckpointMismatchError: the weights of a whole model do not fit.
        """
        check_finite(snapshot.tensors)
        tensors, lora = snapshot.tensors, snapshot.lora_config
        if lora is None:
            facts = self.catalog.facts(snapshot.base_model)
            model = self._load(facts, dtype=self.dtype, weights=tensors)
            return PublishedWeights(model, None, snapshot.version)
        adapter = adapter_from_tensors(tensors, lora, device=self.device)
        return PublishedWeights(self.base(snapshot.base_model), adapter, snapshot.version)

    def _load(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype,
        trainable: bool = False,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> LoadedModel:
        """Loads a model, or one with copies of `weights`; the first time, also checks it.

        Raises:
            UnsupportedError: it cannot be read, or not computed rightly.
            CheckpointMismatchError: `weights` do not fit.
            EngineError: the device has not enough memory.
        """
        module = read_module(facts.source, name=facts.info.name, config=facts.config, dtype=dtype)
        try:
            module.to(self.device)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"not enough memory on {self.device} for {facts.info.name}.",
                hint="Use WEAVER_DTYPE=bfloat16 or a smaller model.",
            ) from error
        if weights is not None:
            set_weights(dict(module.named_parameters()), weights)
        model = LoadedModel(facts, module, trainable=trainable)
        if (facts.info.name, trainable) not in self._checked:
            self.use_threads(model)
            check_model(model)
            self._checked.add((facts.info.name, trainable))
        return model

    def use_threads(self, model: LoadedModel) -> None:
        """Sets torch's threads for the coming call: as configured, or by the model's size."""
        small = model.info.num_parameters < SMALL_MODEL
        wanted = self.threads or (1 if small else physical_cores())
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    @property
    def threads_text(self) -> str:
        """For the log."""
        threads = self.threads or f"1 to {physical_cores()}"
        return f"{threads} thread{'' if threads == 1 else 's'}"

    def close(self) -> None:
        self._models.clear()


def physical_cores() -> int:
    """Cores that this process may use, counting the two threads of one core once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    siblings: set[str] = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings) or os.cpu_count() or 1


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
