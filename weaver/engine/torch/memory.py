"""`Plan`: what a training pass of a model may hold, reckoned from its configuration.

Trainer, sampler and `weaver doctor` ask for it before anything is loaded. Plans do not ask the
device: what was free when the engine began is given, so that a process with the same models and as
many adapters plans the same from its first pass to its last. With `deterministic` the layout of
passes, which decides their last bits, does not depend on memory at all; how many layers compute
again does, and changes no bit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from weaver.engine.torch.attention import BLOCK_ROWS, BLOCK_SCORES
from weaver.engine.torch.device import (
    ADAM_COPIES,
    CPU,
    USABLE,
    adapter_bytes,
    free_bytes,
    full_training_bytes,
    part_bytes,
    size_text,
)
from weaver.engine.torch.quantised import weights_bytes
from weaver.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.engine.torch.catalog import ModelFacts
    from weaver.engine.torch.model_store import ModelStore
    from weaver.types import Quantize, TrainingMode

Recompute = Literal["auto", "off", "all"]
TOKENS_PER_PASS = 4096
"""Enough rows to keep a CPU's matrix products busy."""
MOST_TOKENS = 2**14
"""Of a pass on another device, where memory is plenty."""
FEWEST_TOKENS = 1024
"""With fewer rows the products get slower; then layers compute again instead."""
CHUNK_ELEMENTS = 2**23
"""Logits that the head makes at once on a CPU: 32 MiB in float32."""
MOST_CHUNK_ELEMENTS = 2**27
"""The same on another device, where memory is plenty: each chunk waits for the device."""
LEAST_ROWS = 16
"""Rows that a chunk of the head has at least, however large the vocabulary."""
LOGIT_BYTES = 20
"""For each logit of a chunk: five arrays of float32 at most."""
SCORE_BYTES = 12
"""For each score that is capped: what its tanh and its softmax answered, and its mask."""
SPREAD = 1.5
"""What a layer keeps, over what its projections take and give: 0.85 to 1.46 where measured."""


class Shares(NamedTuple):
    """In bytes."""

    passes: int
    """For the activations and buffers of one training pass."""
    cache: int
    """For keys and values of all rows that are sampled."""


def shares(
    facts: ModelFacts,
    *,
    free: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
    training_mode: TrainingMode = "lora",
    quantize: Quantize = "none",
    beside: int = 0,
    adapters: int = 0,
    ranks: int = 1,
) -> Shares:
    """Halves of what is left of `free` beside the weights and what trains them, each at least 0.

    Args:
        beside: bytes that other models may take.
        adapters: bytes of all adapters in training, where it is known and more than the usual one.
        ranks: among which the layers are divided.
    """
    copies = 2 if device.type == "cpu" and ranks == 1 else 1  # a second layout for the way back
    whole = weights_bytes(facts, dtype=dtype, quantize=quantize, copies=copies)
    held = part_bytes(facts, whole, ranks=ranks)
    held += max(adapter_bytes(facts), adapters)
    if training_mode == "full_ft":  # and the gradient of a pass, until it is added to the run's
        held = adapters + full_training_bytes(facts, ranks=ranks) * (ADAM_COPIES + 1) // ADAM_COPIES
    rest = max(0, int(USABLE * free) - held - beside)
    return Shares(passes=rest // 2, cache=rest // 2)


def check_full_training(facts: ModelFacts, store: ModelStore) -> None:
    """Before a base is loaded.

    Raises:
        UnsupportedError: it is quantised, or does not fit what is free now, or will be once base
            models are unloaded.
    """
    if store.quantize != "none":
        raise UnsupportedError(
            f"a base of {store.quantize} weights is frozen, and cannot be trained in full.",
            field="training_mode",
            hint="Train with LoRA, or start without WEAVER_QUANTIZE (--quantize).",
        )
    needed = full_training_bytes(facts, ranks=store.ranks)
    now = free_bytes(store.device)
    if now is not None:
        now += store.room.freeable_bytes
    free = min([b for b in (store.memory, now) if b is not None], default=needed)
    if needed > free:
        raise UnsupportedError(
            f"full fine-tuning of {facts.info.name} needs {size_text(needed)} for weights, a "
            f"gradient and two moments in float32; {store.device} has {size_text(free)} free.",
            field="training_mode",
            hint="Train with LoRA, or use a smaller model.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a pass of one model holds, in bytes, rather more than less."""

    layers: int
    activations: int
    """Of one token in one layer."""
    inputs: int
    """Of one token in one layer that keeps its input alone."""
    ends: int
    """Of one token outside of the layers: embedding, last norm, the head's gradient, the loss."""
    itemsize: int
    """Of a value."""
    capped_heads: int
    """Query heads whose scores are capped or have sinks, so that they are kept; else 0."""
    window: int | None
    windowed: float
    """The share of the layers that have one."""
    vocab_size: int
    chunk: int
    """Logits that the head makes at once."""

    @classmethod
    def of(cls, facts: ModelFacts, *, itemsize: int, chunk: int) -> Footprint:
        """For activations of so many bytes a value."""
        config, layers = facts.config, facts.num_layers
        hidden = config.hidden_size
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
        return cls(
            layers=layers,
            activations=int(SPREAD * itemsize * facts.projected / layers),
            inputs=itemsize * hidden,
            ends=(3 * itemsize + 12) * hidden + 512,
            itemsize=itemsize,
            capped_heads=facts.num_heads if facts.softcap is not None or facts.sinks else 0,
            window=window,
            windowed=kinds.count("sliding_attention") / layers if window else 0.0,
            vocab_size=facts.info.vocab_size,
            chunk=chunk,
        )

    def size(self, lengths: Sequence[int], *, recompute: int) -> int:
        """Of a pass of these sequences where so many layers compute again, at its largest.

        One layer counts twice: for gradients on the way back, or for what it computes again.
        """
        tokens, kept = sum(lengths), self.layers - recompute
        layer = int(tokens * self.activations + self._masks(lengths))
        logits = LOGIT_BYTES * min(self.chunk, tokens * self.vocab_size)
        scores = 2 * SCORE_BYTES * min(BLOCK_SCORES, self.capped_heads * tokens * max(lengths))
        kept_scores, inputs = kept * self._scores(lengths), tokens * recompute * self.inputs
        return (kept + 1) * layer + kept_scores + inputs + tokens * self.ends + logits + scores

    def _masks(self, lengths: Sequence[int]) -> float:
        """Of windows, in one layer."""
        if self.window is None:
            return 0.0
        pairs = (n * min(n, self.window + BLOCK_ROWS) for n in set(lengths) if n > self.window)
        return self.windowed * self.itemsize * sum(pairs)

    def _scores(self, lengths: Sequence[int]) -> int:
        """In one layer that keeps them; those of more than a block are always computed again."""
        counts = [(n, self.capped_heads * n * n * of) for n, of in Counter(lengths).items()]
        return SCORE_BYTES * sum(s for n, s in counts if n <= BLOCK_ROWS and s <= BLOCK_SCORES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the training passes of a model are laid out in this process."""

    footprint: Footprint
    budget: int | None
    """Bytes of a pass; None where memory is not known."""
    recompute: Recompute
    tokens: int
    """Of a pass; a longer sequence rides alone."""
    longest: int | None
    """Tokens of the longest sequence that can be trained; None without a limit."""

    def layers_recomputed(self, lengths: Sequence[int]) -> int:
        """As few as let a pass of these sequences fit."""
        layers = self.footprint.layers
        if self.recompute == "off" or (self.recompute == "auto" and self.budget is None):
            return 0
        if self.recompute == "all" or self.budget is None:
            return layers
        for count in range(layers):
            if self.footprint.size(lengths, recompute=count) <= self.budget:
                return count
        return layers

    def describe(self) -> str:
        """In words, with the numbers that are reckoned with."""
        head = f"the head's logits {self.footprint.chunk // self.footprint.vocab_size:,} at once"
        if self.budget is None:
            return f"passes of {self.tokens:,} tokens, {head}; what is free is not known here"
        if not self.longest:
            return "DOES NOT FIT: no memory is left for a pass"
        layers = self.footprint.layers
        usual, most = (self.layers_recomputed([n]) for n in (self.tokens, self.longest))
        return (
            f"passes of {self.tokens:,} tokens in {size_text(self.budget)}, {usual} of {layers} "
            f"layers recomputed, {head}; sequences of up to {self.longest:,} tokens, "
            f"{most} recomputed"
        )


class Planner:
    """The plans of one trainer, each made once for what may be in memory beside it.

    May be asked in several threads.
    """

    def __init__(
        self,
        store: ModelStore,
        *,
        tokens: int,
        head_rows: int,
        recompute: Recompute,
        deterministic: bool,
    ) -> None:
        """What is 0 or `auto` is chosen, see `make_plan`; else it is as the user has set it."""
        self._store = store
        self._tokens = tokens
        self._head_rows = head_rows
        self._recompute: Recompute = recompute
        self._deterministic = deterministic
        self._plans: dict[tuple[str, TrainingMode, int, int], Plan] = {}

    def plan(self, base_model: str, training_mode: TrainingMode) -> Plan:
        """Errors: see `Catalog.facts`."""
        store = self._store
        facts, free, passes = store.catalog.facts(base_model), store.memory, None
        beside = store.room.beside(facts, base=training_mode == "lora")
        adapters = store.room.adapter_room()
        key = base_model, training_mode, beside, adapters
        if key not in self._plans:
            dtype = store.dtype if training_mode == "lora" else torch.float32
            if free is not None:
                of = partial(shares, facts, dtype=dtype, quantize=store.quantize, beside=beside)
                of = partial(of, device=store.device, adapters=adapters, ranks=store.ranks)
                passes = of(free=free, training_mode=training_mode).passes
            self._plans[key] = make_plan(
                facts,
                passes=passes,
                itemsize=dtype.itemsize,
                device=store.device,
                tokens=self._tokens,
                head_rows=self._head_rows,
                recompute=self._recompute,
                deterministic=self._deterministic,
            )
        return self._plans[key]


def make_plan(
    facts: ModelFacts,
    *,
    passes: int | None,
    itemsize: int,
    device: torch.device,
    tokens: int = 0,
    head_rows: int = 0,
    recompute: Recompute = "auto",
    deterministic: bool = False,
) -> Plan:
    """The plan for `passes` bytes and activations of `itemsize` bytes; None is plenty.

    `tokens` of a pass are chosen where 0: as many, in a power of two, as fit without a layer that
    computes again, but no fewer than `FEWEST_TOKENS` for that. So are `head_rows`, whose logits the
    head makes at once.
    """
    known = passes is not None and device.type != "cpu" and not deterministic
    most, chunk = (MOST_TOKENS, MOST_CHUNK_ELEMENTS) if known else (TOKENS_PER_PASS, CHUNK_ELEMENTS)
    if passes is not None and not deterministic:
        while LOGIT_BYTES * chunk > passes // 8 and chunk > LEAST_ROWS * facts.info.vocab_size:
            chunk //= 2
    chunk = max(chunk, LEAST_ROWS * facts.info.vocab_size)
    if head_rows:
        chunk = head_rows * facts.info.vocab_size
    footprint = Footprint.of(facts, itemsize=itemsize, chunk=chunk)
    longest = None
    if passes is not None:
        longest = _fitting(footprint, passes, facts.info.context_length, recompute)
    if not tokens:
        tokens = most
        if passes is not None and not deterministic:
            again = footprint.layers if recompute == "all" else 0
            while tokens > FEWEST_TOKENS and footprint.size([tokens], recompute=again) > passes:
                tokens //= 2
            tokens = max(1, _fitting(footprint, passes, tokens, recompute))
    return Plan(
        footprint=footprint,
        budget=passes,
        recompute=recompute,
        tokens=tokens,
        longest=longest,
    )


def _fitting(footprint: Footprint, budget: int, most: int, recompute: Recompute) -> int:
    """The longest sequence of at most so many tokens whose pass fits; 0 where none does."""
    again = 0 if recompute == "off" else footprint.layers
    size = partial(footprint.size, recompute=again)
    return bisect_right(range(1, most + 1), budget, key=lambda n: size([n]))
