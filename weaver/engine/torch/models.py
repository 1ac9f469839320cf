"""`LoadedModel`: a base model in memory, the one object that trainer and sampler compute with.

`ModelStore` loads them at first need. When it opens one, whatever its architecture, `check_model`
says whether what the engine computes is what the model itself computes: two sequences are packed,
read in pieces and decoded in one batch, as trainer and sampler do it, and compared with the model's
own eager forward. T rows of a packed batch, N rows of hidden states, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from weaver.engine.blocking import WeightSnapshot
from weaver.engine.torch.arenas import ArenaCache
from weaver.engine.torch.catalog import HINT, Catalog, ModelFacts, refusing
from weaver.engine.torch.device import physical_cores
from weaver.engine.torch.files import check_finite, read_module, set_weights
from weaver.engine.torch.kv_cache import CacheShape, KVCache
from weaver.engine.torch.linear import FrozenLinear, Routing
from weaver.engine.torch.lora import Adapter, adapter_from_tensors, new_adapter
from weaver.engine.torch.packing import AttentionCache, PackedBatch, pack
from weaver.engine.torch.recompute import prepare_layers, recomputed
from weaver.errors import EngineError, UnsupportedError
from weaver.types import LoraConfig

SMALL_MODEL = 20_000_000
"""Parameters below which a second thread costs more than it gives: 6 ms a step against 660 ms."""
LENGTHS = (16, 12)
"""Tokens of the sequences; six passes of a few rows take about as long as reading the weights."""
PIECES = ((9, 4), (5, 6), (1, 1), (1, 1))
"""So many of each sequence are read in each of two prefill passes, and then decoded in two
steps."""
READ = [14, 10]
"""Tokens that prefill reads."""
WINDOW = 4
"""Tokens that windows are cut to meanwhile, so that short sequences are longer than them."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative to how far the logits spread; wrong attention of real weights moves them by 0.1 to 1."""
ATTEMPTS = 3
"""Rounding may send a token of a mixture to another expert, but not one of each attempt."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """From hidden states to logits, with what some architectures do behind the last projection."""

    linear: FrozenLinear | torch.nn.Linear
    path: str
    """That of the projection in the model: `lm_head`."""
    scale: float
    """Granite divides its logits by `logits_scaling`, Cohere multiplies by `logit_scale`."""
    softcap: float | None
    """c of c·tanh(z / c): Gemma's `final_logit_softcapping`."""

    @classmethod
    def of(cls, linear: FrozenLinear | torch.nn.Linear, path: str, config: Any) -> Head:
        """The head of a model with this transformers configuration."""
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(linear, path, factor / divisor, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] -> float32 [N, V], differentiable, with the adapters of the current routing."""
        return self.finish(self.linear(hidden).float())

    def finish(self, z: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap."""
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def finish_back(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turns d/d logits into d/d z, in place, where `logits = finish(z)`."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class LoadedModel:
    """A model on one device: frozen and shared with adapters, or trainable and owned by one run.

    Calls are serialized by the service. A trainable model has plain linear layers and no adapters.
    """

    def __init__(self, facts: ModelFacts, module: Any, *, trainable: bool) -> None:
        self.facts = facts
        self.info = facts.info
        self.module = module
        self.device: torch.device = module.device
        self.dtype: torch.dtype = module.dtype
        self.trainable = trainable
        self.routing = Routing()
        module.requires_grad_(trainable).eval()
        linear = module.get_output_embeddings()
        path = next(name for name, m in module.named_modules() if m is linear)
        if not trainable:
            self._freeze()
        self._layers = prepare_layers(module.base_model, facts.num_layers)
        self.head = Head.of(module.get_submodule(path), path, facts.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: of the generation settings, else of the configuration."""
        for config in (self.module.generation_config, self.facts.config):
            eos = getattr(config, "eos_token_id", None)
            if eos is not None:
                return frozenset([eos] if isinstance(eos, int) else eos)
        return frozenset()

    def new_cache(self) -> KVCache[Any, Any]:
        """An empty one, of the kind for the model's device."""
        return ArenaCache(CacheShape.of(self.facts, dtype=self.dtype, device=self.device))

    def hidden_states(self, batch: PackedBatch, *, recompute: int = 0) -> torch.Tensor:
        """[T, H] after the final norm; differentiable in the adapters or the model's parameters.

        The first `recompute` layers keep no activations, and compute them again when they are
        needed. These are the first, as by then what the others keep is gone.
        """

        def set_up() -> AbstractContextManager[None]:
            return self.routing.of(batch.lengths, batch.adapters)

        with set_up(), recomputed(self._layers[:recompute], set_up):
            output = self.module.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                packed_batch=batch,
            )
        if batch.cache is not None:
            batch.cache.finish()
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor, adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """float32 [N, V] of hidden states [N, H]; `adapters` has one entry a row."""
        with self.routing.of([1] * len(adapters), adapters):
            return self.head.logits(hidden)

    def _freeze(self) -> None:
        modules = self.module.named_modules()
        for path in [path for path, layer in modules if type(layer) is torch.nn.Linear]:
            parent, _, name = path.rpartition(".")
            layer = self.module.get_submodule(path)  # not held: its weight is freed once packed
            frozen = FrozenLinear(layer, path=path, routing=self.routing)
            setattr(self.module.get_submodule(parent), name, frozen)


@dataclass(frozen=True, slots=True, eq=False)
class PublishedWeights:
    """What `TorchSampler` samples from under one id. Never changes once made."""

    model: LoadedModel
    """The shared base, or a snapshot's own copy after full fine-tuning."""
    adapter: Adapter | None
    version: int


class ModelStore:
    """Frozen models by name, on one device in one dtype.

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
    ) -> None:
        self.catalog = catalog
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.memory = memory
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
        try:
            module = read_module(
                facts.source,
                name=facts.info.name,
                config=facts.config,
                dtype=dtype,
                device=self.device,
            )
        except torch.OutOfMemoryError as error:
            halved = dtype == torch.float32 and not trainable
            raise EngineError(
                f"not enough memory on {self.device} for {facts.info.name}.",
                hint=f"Use {'WEAVER_DTYPE=bfloat16 or ' if halved else ''}a smaller model.",
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

    def close(self) -> None:
        self._models.clear()


@torch.no_grad()
def check_model(model: LoadedModel) -> None:
    """Raises UnsupportedError where the engine cannot compute, or computes something else."""
    name = f"{model.info.name} ({model.info.architecture})"
    adapters = (None if model.trainable else _random_adapter(model), None)
    with refusing(f"{name} cannot run here", hint=HINT), _small_windows(model.module):
        for attempt in range(ATTEMPTS):
            wrong = _difference(model, adapters, seed=attempt)
            if not wrong:
                return
    raise UnsupportedError(f"{name} cannot run here: its {wrong}.", field="base_model", hint=HINT)


def _difference(model: LoadedModel, adapters: Sequence[Adapter | None], *, seed: int) -> str:
    """In which use, and how far, the logits are not the model's own; empty where they are."""
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.info.vocab_size, (len(LENGTHS), longest), generator=generator)
    with _eager(model.module), model.routing.of([longest] * len(LENGTHS), adapters):
        logits = model.module(input_ids=tokens.to(model.device), use_cache=False).logits.float()
    rows = [row[:length] for row, length in zip(tokens.tolist(), LENGTHS, strict=True)]
    right = torch.cat([row[:length] for row, length in zip(logits, LENGTHS, strict=True)])
    spread = (right - right.mean(-1, keepdim=True)).norm()
    for use, ours in (
        ("packed logits", torch.cat(_logits(model, rows, adapters))),  # as in training
        ("logits of a sequence that is read piece by piece", _cached(model, rows, adapters)),
    ):
        error = float((ours - right).norm() / spread)
        if not error <= TOLERANCE[model.dtype]:
            return f"{use} would differ from transformers' by {error:.1g} of their spread"
    return ""


def _cached(
    model: LoadedModel, rows: Sequence[list[int]], adapters: Sequence[Adapter | None]
) -> torch.Tensor:
    """float32 [T of all, V] through prefill and decoding, as in sampling."""
    cache = model.new_cache()
    prompts, decoding = [cache.prompt(tokens) for tokens in READ], cache.rows()
    places: list[Any] = []
    read, pieces = [0] * len(rows), []
    for sizes in PIECES:
        if places:
            used = decoding.decode(places)
        else:
            used = cache.read(list(zip(prompts, sizes, strict=True)))
        new = [row[at : at + n] for row, at, n in zip(rows, read, sizes, strict=True)]
        pieces.append(_logits(model, new, adapters, starts=read, cache=used))
        read = [at + n for at, n in zip(read, sizes, strict=True)]
        if read == READ:
            places = [place for prompt in prompts for place in decoding.add(prompt, 1)]
    return torch.cat([piece for row in zip(*pieces, strict=True) for piece in row])


def _logits(
    model: LoadedModel,
    rows: Sequence[list[int]],
    adapters: Sequence[Adapter | None],
    *,
    starts: list[int] | None = None,
    cache: AttentionCache | None = None,
) -> tuple[torch.Tensor, ...]:
    """float32 [T, V] of each row."""
    batch = pack(rows, adapters=adapters, device=model.device, starts=starts, cache=cache)
    each = [a for a, row in zip(adapters, rows, strict=True) for _ in row]
    return torch.split(model.logits(model.hidden_states(batch), each), list(batch.lengths))


def _random_adapter(model: LoadedModel) -> Adapter:
    """An adapter of every layer that can have one, with values that change the logits."""
    config = LoraConfig(rank=1, alpha=1.0)
    targets = list(model.facts.targets.values())
    adapter = new_adapter(targets, config, seed=0, device=model.device)
    generator = torch.Generator().manual_seed(0)
    for pair in adapter.pairs.values():
        pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * 0.1)
    return adapter


def _eager(module: Any) -> AbstractContextManager[None]:
    """The attention of transformers' own, with the masks that the model makes for it."""
    name = "_attn_implementation_internal"
    return _changed(_configurations(module), lambda each, _: each == name, to="eager")


def _small_windows(module: Any) -> AbstractContextManager[None]:
    """Cuts every window and chunk of the attention."""

    def wide(name: str, value: Any) -> bool:
        return type(value) is int and value > WINDOW and bool(re.search("window|chunk", name))

    return _changed(
        [*(vars(each) for each in module.modules()), *_configurations(module)], wide, to=WINDOW
    )


def _configurations(module: Any) -> list[dict[str, Any]]:
    return [vars(each.config) for each in module.modules() if hasattr(each, "config")]


@contextmanager
def _changed(
    holders: Iterable[dict[str, Any]], which: Callable[[str, Any], bool], *, to: object
) -> Iterator[None]:
    """Sets for a while the attributes of whose name and value `which` is true."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for holder in holders:
        for name, value in holder.items():
            if which(name, value):
                kept.append((holder, name, value))
                holder[name] = to
    try:
        yield
    finally:
        for holder, name, value in reversed(kept):
            holder[name] = value
