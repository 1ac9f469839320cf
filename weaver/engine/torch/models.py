"""`LoadedModel`: a base model in memory, the one object that trainer and sampler compute with.

`ModelStore` loads them. T rows of a packed batch, N rows of hidden states, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from weaver.engine.torch.arenas import ArenaCache
from weaver.engine.torch.attention_choice import ARENAS, BLOCKS, Attention, Paging
from weaver.engine.torch.catalog import ModelFacts
from weaver.engine.torch.decode_steps import CudaGraphs, DecodeSteps
from weaver.engine.torch.embedding import share_embedding
from weaver.engine.torch.kv_cache import CachedRows, CacheShape, KVCache
from weaver.engine.torch.linear import FrozenLinear, freeze
from weaver.engine.torch.lora import Adapter
from weaver.engine.torch.packing import PackedBatch, pack
from weaver.engine.torch.pages import PageCache, PageRows
from weaver.engine.torch.recompute import prepare_layers, recomputed
from weaver.engine.torch.routing import Routing
from weaver.engine.torch.shards import Parts, Shards
from weaver.types import Quantize

R = TypeVar("R")


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


def first_ends(*settings: Any) -> frozenset[int]:
    """The tokens that end a sequence, of the first of transformers' settings that has some."""
    for one in settings:
        eos = getattr(one, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


class LoadedModel:
    """A model on one device: frozen and shared with adapters, or trainable and owned by one run.

    Calls are serialized by the service. A trainable model has plain linear layers and no adapters.
    """

    def __init__(
        self,
        facts: ModelFacts,
        module: Any,
        *,
        trainable: bool,
        quantize: Quantize = "none",
        shards: Shards | None = None,
    ) -> None:
        self.facts = facts
        self.info = facts.info
        self.module = module
        self.device: torch.device = module.device
        self.dtype: torch.dtype = module.dtype
        self.trainable = trainable
        self.quantize = quantize
        """How layers were kept when it was read."""
        self.routing = Routing()
        module.requires_grad_(trainable).eval()
        linear = module.get_output_embeddings()
        tied = linear.weight is module.get_input_embeddings().weight
        path = next(name for name, m in module.named_modules() if m is linear)
        self._layers = prepare_layers(module.base_model, facts.num_layers)
        self.attention: Attention = BLOCKS
        self.paging: Paging = ARENAS
        """Its store settles which, of both."""
        self.steps = DecodeSteps(CudaGraphs()) if self.device.type == "cuda" else None
        self.parts = None if shards is None else Parts(shards, module, trainable=trainable)
        """Where its layers are divided among processes; then what uses it has to `run`."""
        if not trainable:
            freeze(module, lambda: self.run(self._read_a_token), routing=self.routing)
        head = module.get_submodule(path)
        if tied and not trainable:
            share_embedding(module, head.projection.kernel)
        if self.parts is not None:
            self.parts.check(self._layers, facts)
            if not trainable:
                self.parts.hold(module.get_input_embeddings())
        self.head = Head.of(head, path, facts.config)

    def run(self, work: Callable[[], R]) -> R:
        """Calls `work`, in which the model is used."""
        return work() if self.parts is None else self.parts.run(work)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence: of the generation settings, else of the configuration."""
        return first_ends(self.module.generation_config, self.facts.config)

    def new_cache(self) -> KVCache[Any, Any, Any]:
        """An empty one."""
        shape = CacheShape.of(self.facts, dtype=self.dtype, device=self.device)
        attention = self.paging.attention
        return ArenaCache(shape) if attention is None else PageCache(shape, attention)

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
                packed_attention=self.attention.packed,
            )
        if batch.cache is not None:
            batch.cache.finish()
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def next_logits(
        self,
        tokens: Sequence[int],
        adapters: Sequence[Adapter | None],
        together: CachedRows[Any, Any],
        rows: Sequence[Any],
    ) -> torch.Tensor:
        """float32 [B, V] behind one more token of each of the rows, all of `together`."""
        hidden = None
        if self.steps is not None and isinstance(together, PageRows):
            hidden = self.steps.hidden(self, together.cache, rows, tokens, adapters)
        if hidden is None:
            starts, cache = [row.length for row in rows], together.decode(rows)
            each = [[token] for token in tokens]
            hidden = self.hidden_states(
                pack(each, adapters=adapters, device=self.device, starts=starts, cache=cache)
            )
        return self.logits(hidden, adapters)

    def logits(self, hidden: torch.Tensor, adapters: Sequence[Adapter | None]) -> torch.Tensor:
        """float32 [N, V] of hidden states [N, H]; `adapters` has one entry a row."""
        with self.routing.of([1] * len(adapters), adapters):
            return self.head.logits(hidden)

    @torch.no_grad()
    def _read_a_token(self) -> None:
        self.hidden_states(pack([[0]], adapters=[None], device=self.device))


@dataclass(frozen=True, slots=True, eq=False)
class PublishedWeights:
    """What `TorchSampler` samples from under one id. Never changes once made."""

    facts: ModelFacts
    """Of the base model, which need not be in memory."""
    adapter: Adapter | None
    version: int
    own: LoadedModel | None = None
    """A snapshot's own copy after full fine-tuning."""

    @property
    def scalar(self) -> torch.Tensor | None:
        """float32 [1, H]: its head, where it scores in place of sampling."""
        return None if self.adapter is None else self.adapter.score
