"""Whether what the engine computes with a model is what the model itself computes.

`ModelStore` asks when it opens a model, whatever its architecture: two sequences are packed, read
in pieces and decoded in one batch, as trainer and sampler do it, and compared with the model's own
eager forward. T rows of a packed batch, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from weaver.engine.torch.attention_choice import (
    ARENAS,
    BLOCKS,
    Attention,
    Paging,
    by_rule,
    choose,
    paging_by_rule,
)
from weaver.engine.torch.attention_proof import fault_of, paging_fault_of
from weaver.engine.torch.catalog import HINT, refusing
from weaver.engine.torch.lora import Adapter, new_adapter
from weaver.engine.torch.packing import AttentionCache, pack
from weaver.errors import UnsupportedError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from weaver.engine.torch.models import LoadedModel

logger = logging.getLogger(__name__)

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


def settle_attention(model: LoadedModel) -> None:
    """Chooses what computes the model's attention, and checks the model with it.

    Raises:
        UnsupportedError: see `check_model`.
    """
    name, facts, place, dtype = model.info.name, model.facts, model.device, model.dtype

    def fault(attention: Attention) -> str:
        return fault_of(attention.packed, facts, place=place, dtype=dtype)

    def paging_fault(paging: Paging) -> str:
        assert paging.attention is not None, "arenas are the last, and are not asked"
        return paging_fault_of(paging.attention, facts, place=place, dtype=dtype)

    model.attention = choose(name, by_rule(facts, place=place, dtype=dtype), fault)
    model.paging = choose(name, paging_by_rule(facts, place=place, dtype=dtype), paging_fault)
    try:
        check_model(model)
    except UnsupportedError as error:
        if (model.attention, model.paging) == (BLOCKS, ARENAS):
            raise
        said = "%s: attention by %s and %s is left out: %s"
        logger.warning(said, name, model.attention.name, model.paging.name, error)
        model.attention, model.paging = BLOCKS, ARENAS
        check_model(model)
    logger.info("%s: attention by %s and %s", name, model.attention.name, model.paging.name)


@torch.no_grad()
def check_model(model: LoadedModel) -> None:
    """Raises UnsupportedError where the engine cannot compute, or computes something else."""
    name = f"{model.info.name} ({model.info.architecture})"
    adapter = None if model.trainable else _random_adapter(model)
    # Rows of one adapter are decoded by other means where there are any, see `DecodeSteps`.
    sets = [(adapter, None)] + [(adapter, adapter)] * (model.steps is not None)
    with refusing(f"{name} cannot run here", hint=HINT), _small_windows(model.module):
        for adapters in sets:
            for attempt in range(ATTEMPTS):
                wrong = _difference(model, adapters, seed=attempt)
                if not wrong:
                    break
            else:
                said = f"{name} cannot run here: its {wrong}."
                raise UnsupportedError(said, field="base_model", hint=HINT)


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
        new = [row[at : at + n] for row, at, n in zip(rows, read, sizes, strict=True)]
        if places:
            tokens = [token for (token,) in new]
            logits = model.next_logits(tokens, adapters, decoding, places)
            pieces.append(torch.split(logits, 1))
        else:
            used = cache.read(list(zip(prompts, sizes, strict=True)))
            pieces.append(_logits(model, new, adapters, starts=read, cache=used))
        read = [at + n for at, n in zip(read, sizes, strict=True)]
        if read == READ:
            places = list(decoding.add([(prompt, 1) for prompt in prompts]))
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
