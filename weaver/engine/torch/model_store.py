"""`ModelStore`: the models in memory, loaded at first need and checked as `model_check.py` says.

`TorchEngine` makes one; trainer and sampler share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch.attention_choice import Attention, Paging
from weaver.engine.torch.catalog import HINT, Catalog, ModelFacts, refusing
from weaver.engine.torch.device import give_back_freed, physical_cores, take_from_files
from weaver.engine.torch.files import check_finite, read_module, set_weights
from weaver.engine.torch.lora import adapter_from_tensors
from weaver.engine.torch.model_check import settle_attention
from weaver.engine.torch.models import LoadedModel, PublishedWeights
from weaver.engine.torch.quantised import QuantisedLinear, can_quantise
from weaver.errors import EngineError
from weaver.types import Quantize

SMALL_MODEL = 20_000_000
"""Parameters below which a second thread costs more than it gives: 6 ms a step against 660 ms."""


class ModelStore:
    """Frozen models by name, on one device in one dtype, and quantised if need be.

    `memory` are the bytes that were free on the device when the engine began; None is not known.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        memory: int | None = None,
        quantize: Quantize = "none",
    ) -> None:
        self.catalog = catalog
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.memory = memory
        self.quantize = quantize
        self._models: dict[str, LoadedModel] = {}
        self._attention: dict[tuple[str, bool], tuple[Attention, Paging]] = {}
        """By name, and whether trainable, of what is known to run here."""

    def base(self, name: str) -> LoadedModel:
        """The shared frozen model.

        Raises:
            UnknownModelError, UnsupportedError, EngineError: see `_load`.
        """
        if name not in self._models:
            facts = self.catalog.facts(name)
            self._models[name] = self._load(facts, dtype=self.dtype, quantize=self.quantize)
        return self._models[name]

    def own(self, name: str) -> LoadedModel:
        """A trainable model of one run's own, in float32 whatever the base's dtype."""
        facts = self.catalog.facts(name)
        return self._load(facts, dtype=torch.float32, trainable=True)

    def publish(self, snapshot: WeightSnapshot) -> PublishedWeights:
        """The snapshot on its base model; a whole model's own weights are never quantised.

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
        adapter = adapter_from_tensors(tensors, lora, device=self.device, dtype=self.dtype)
        return PublishedWeights(self.base(snapshot.base_model), adapter, snapshot.version)

    def _load(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype,
        quantize: Quantize = "none",
        trainable: bool = False,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> LoadedModel:
        """Loads a model, or one with copies of `weights`; the first time, also checks it.

        Raises:
            UnsupportedError: it cannot be read, or not computed rightly.
            CheckpointMismatchError: `weights` do not fit.
            EngineError: the device has not enough memory.
        """
        try:
            module = read_module(
                facts.source,
                name=facts.info.name,
                config=facts.config,
                dtype=dtype,
                device=self.device,
                quantise=None
                if quantize == "none"
                else partial(self._quantise, facts=facts, kind=quantize),
            )
        except torch.OutOfMemoryError as error:
            smaller = "WEAVER_DTYPE=bfloat16 or " if dtype == torch.float32 else ""
            if quantize == "none":
                smaller += "WEAVER_QUANTIZE=nf4 or "
            raise EngineError(
                f"not enough memory on {self.device} for {facts.info.name}.",
                hint=f"Use {'' if trainable else smaller}a smaller model.",
            ) from error
        if weights is not None:
            set_weights(dict(module.named_parameters()), weights)
        self.use_threads(facts)
        with refusing(f"{facts.info.name} ({facts.info.architecture}) cannot run here", hint=HINT):
            model = LoadedModel(facts, module, trainable=trainable, quantize=quantize)
        key = (facts.info.name, trainable)
        if key not in self._attention:
            settle_attention(model)
            self._attention[key] = model.attention, model.paging
        model.attention, model.paging = self._attention[key]
        return model

    @torch.no_grad()
    def _quantise(self, module: Any, *, facts: ModelFacts, kind: Quantize) -> None:
        """Replaces layers of a model whose weights are views of its files, one after the other.

        Each is brought to the device, quantised there and let go, so that no more than one of them
        is there in full.
        """
        for path, target in facts.targets.items():
            if can_quantise(target, kind):
                linear = module.get_submodule(path)
                take_from_files([linear.weight], self.device)
                check_finite({f"{path}.weight": linear.weight})
                parent, _, name = path.rpartition(".")
                layer = QuantisedLinear(linear, kind=kind, dtype=self.dtype)
                setattr(module.get_submodule(parent), name, layer)
                del linear.weight  # whoever still holds the layer
                give_back_freed()

    def use_threads(self, model: LoadedModel | ModelFacts) -> None:
        """Sets torch's threads for the coming call: as configured, or by the model's size."""
        small = model.info.num_parameters < SMALL_MODEL
        wanted = self.threads or (1 if small else physical_cores())
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def close(self) -> None:
        self._models.clear()
