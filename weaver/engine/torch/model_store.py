"""`ModelStore`: the models in memory, loaded at first need and checked as `model_check.py` says.

`TorchEngine` makes one; trainer and sampler share it. Base models come and go as `ModelRoom` says,
so each call asks for the one that it needs, and keeps none that is not in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch.attention_choice import Attention, Paging
from weaver.engine.torch.catalog import HINT, Catalog, ModelFacts, only_here, refusing
from weaver.engine.torch.device import (
    full_training_bytes,
    give_back_freed,
    physical_cores,
    take_from_files,
)
from weaver.engine.torch.files import check_finite, files_bytes, read_module, set_weights
from weaver.engine.torch.lora import adapter_from_tensors
from weaver.engine.torch.model_check import settle_attention
from weaver.engine.torch.model_room import ModelRoom
from weaver.engine.torch.models import LoadedModel, PublishedWeights
from weaver.engine.torch.quantised import QuantisedLinear, can_quantise, weights_bytes
from weaver.engine.torch.shards import Shards
from weaver.errors import EngineError, UnsupportedError
from weaver.types import Quantize

R = TypeVar("R")
SMALL_MODEL = 20_000_000
"""Parameters below which a second thread costs more than it gives: 6 ms a step against 660 ms."""


class ModelStore:
    """Frozen models by name, on one device in one dtype, and quantised if need be.

    `memory` are the bytes that were free on the device when the engine began; None is not known.
    `model_memory` are those that base models may take together, see `ModelRoom`.
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
        model_memory: int = 0,
        shards: Shards | None = None,
    ) -> None:
        self.catalog = catalog
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.memory = memory
        self.quantize = quantize
        self.shards = shards
        """Among which the layers of all models are divided; then every process loads alike."""
        self.room = ModelRoom(
            catalog,
            device=device,
            dtype=dtype,
            quantize=quantize,
            memory=memory,
            model_memory=model_memory,
            ranks=self.ranks,
        )
        self._attention: dict[tuple[str, bool], tuple[Attention, Paging]] = {}
        """By name, and whether trainable, of what is known to run here."""

    @property
    def ranks(self) -> int:
        """Among which the layers of models are divided."""
        return 1 if self.shards is None else self.shards.size

    def agreed(self, work: Callable[[], R]) -> R:
        """What it answers, once all of `ranks` have it; else the first error, in all."""
        return work() if self.shards is None else self.shards.agreed(work)

    # --- base models ----------------------------------------------------------------------------

    def base(self, name: str) -> LoadedModel:
        """The shared frozen model, which stays for this call, and while `users` name it.

        Raises:
            UnknownModelError, UnsupportedError, EngineError: see `_load`.
            QuotaExceededError: there is no room for it beside those that are in use.
        """
        name = self.catalog.shared(name)
        there = self.room.residents.get(name)
        if there is not None:
            return there.model
        facts = self.catalog.facts(name)
        self.agreed(partial(self.room.prepare, facts))
        began = time.monotonic()
        model = self._load(facts, dtype=self.dtype, quantize=self.quantize)
        self.room.put(facts, model, load_s=time.monotonic() - began)
        return model

    def check_models(self, *, larger: Collection[str] = ()) -> None:
        """Looks at what the engine was given, before anything is loaded; `larger` may be too large.

        Raises:
            ConfigError: those that are to be loaded at the start do not fit together.
            UnknownModelError, UnsupportedError: one cannot run here, or its weights are not whole.
        """
        for name in self.catalog.given:
            facts = self.catalog.facts(name)
            if name not in larger:
                self.room.check_alone(facts)
            if files_bytes(facts.source) is None and only_here(facts.source):
                raise UnsupportedError(
                    f"the weights of {name} are not whole in {facts.source}.",
                    field="base_model",
                    hint="They are safetensors files beside config.json, all that the index names; "
                    "`weaver models download` fetches those of a Hugging Face id.",
                )
        self.room.check_together(self.catalog.names(load="start"))

    # --- models of one owner --------------------------------------------------------------------

    def own(self, name: str) -> LoadedModel:
        """A trainable model of one run's own, in float32 whatever the base's dtype.

        Room is made for what trains it, too. Errors: see `base`.
        """
        facts = self.catalog.facts(name)
        nbytes = full_training_bytes(facts, ranks=self.ranks)
        self.agreed(partial(self.room.make, nbytes, facts, base=False))
        model = self._load(facts, dtype=torch.float32, trainable=True)
        self.room.owned[model] = nbytes
        return model

    def publish(self, snapshot: WeightSnapshot) -> PublishedWeights:
        """The snapshot, an adapter of its base model, or a whole one, which is never quantised.

        Raises:
            UnknownModelError, UnsupportedError: the base model cannot be loaded.
            NonFiniteError: a weight is NaN or infinite.
            CheckpointMismatchError: the weights of a whole model do not fit.
            QuotaExceededError: there is no memory for a whole one.
        """
        check_finite(snapshot.tensors)
        facts = self.catalog.facts(snapshot.base_model)
        tensors, lora = snapshot.tensors, snapshot.lora_config
        if lora is None:
            size = weights_bytes(facts, dtype=self.dtype, quantize="none")
            self.room.make(size, facts, base=False)
            model = self._load(facts, dtype=self.dtype, weights=tensors)
            self.room.owned[model] = size
            return PublishedWeights(facts, None, snapshot.version, own=model)
        adapter = adapter_from_tensors(tensors, lora, device=self.device, dtype=self.dtype)
        return PublishedWeights(facts, adapter, snapshot.version)

    def model_of(self, weights: PublishedWeights) -> LoadedModel:
        """What they are computed with. Errors: see `base`."""
        return self.base(weights.facts.info.name) if weights.own is None else weights.own

    # --- loading --------------------------------------------------------------------------------

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
        change: Callable[[Any], None] | None = None
        if quantize != "none":
            change = partial(self._quantise, facts=facts, kind=quantize)
        elif self.shards is not None:
            change = partial(self.shards.divide, facts=facts, dtype=dtype, device=self.device)
        module = self.agreed(
            partial(self._read, facts, dtype=dtype, change=change, trainable=trainable)
        )
        if weights is not None:
            set_weights(dict(module.named_parameters()), weights)
        self.turn_to(facts)
        with refusing(f"{facts.info.name} ({facts.info.architecture}) cannot run here", hint=HINT):
            model = LoadedModel(
                facts, module, trainable=trainable, quantize=quantize, shards=self.shards
            )
        key = (facts.info.name, trainable)
        if key not in self._attention:
            with torch.no_grad():
                model.run(partial(settle_attention, model))
            self._attention[key] = model.attention, model.paging
        model.attention, model.paging = self._attention[key]
        return model

    def _read(
        self,
        facts: ModelFacts,
        *,
        dtype: torch.dtype,
        change: Callable[[Any], None] | None,
        trainable: bool,
    ) -> Any:
        try:
            return read_module(
                facts.source,
                name=facts.info.name,
                config=facts.config,
                dtype=dtype,
                device=self.device,
                change=change,
            )
        except torch.OutOfMemoryError as error:
            smaller = "WEAVER_DTYPE=bfloat16 or " if dtype == torch.float32 else ""
            if self.quantize == "none" and self.shards is None:
                smaller += "WEAVER_QUANTIZE=nf4 or "
            raise EngineError(
                f"not enough memory on {self.device} for {facts.info.name}.",
                hint=f"Use {'' if trainable else smaller}a smaller model.",
            ) from error

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

    def turn_to(self, model: LoadedModel | ModelFacts) -> None:
        """Before a call computes: a base counts as used, and torch's threads are set.

        They are as configured, or by the model's size.
        """
        self.room.residents.touch(self.catalog.shared(model.info.name))
        small = model.info.num_parameters < SMALL_MODEL
        wanted = self.threads or (1 if small else physical_cores())
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def close(self) -> None:
        self.room.residents.clear()
