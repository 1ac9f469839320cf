"""`check_model`: whether what the engine computes with a model is what the model itself computes.

`ModelStore` calls it when a model is opened, whatever its architecture. Two sequences are packed,
read in pieces and decoded in one batch, as trainer and sampler do it, and compared with the model's
own eager forward. T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from weaver.engine.torch.catalog import HINT, refusing
from weaver.engine.torch.kv_cache import CachedRow, DecodePass, PrefillPass, PromptCache, RowCache
from weaver.engine.torch.lora import new_adapter
from weaver.engine.torch.packing import pack
from weaver.errors import UnsupportedError
from weaver.types import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weaver.engine.torch.lora import Adapter
    from weaver.engine.torch.models import LoadedModel
    from weaver.engine.torch.packing import AttentionCache

LENGTHS = (16, 12)
"""Tokens of the sequences; six passes of a few rows take about as long as reading the weights."""
PIECES = ((9, 4), (5, 6), (1, 1), (1, 1))
"""Of each sequence in each of two prefill passes, and then of two steps of decoding."""
READ = [14, 10]
"""Tokens that prefill reads."""
WINDOW = 4
"""Tokens that windows are cut to meanwhile, so that short sequences are longer than them."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Relative to how far the logits spread; wrong attention of real weights moves them by 0.1 to 1."""
ATTEMPTS = 3
"""Rounding may send a token of a mixture to another expert, but not one of each attempt."""


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
        ("packed logits", _packed(model, rows, adapters)),
        ("logits of a sequence that is read piece by piece", _cached(model, rows, adapters)),
    ):
        error = float((ours - right).norm() / spread)
        if not error <= TOLERANCE[model.dtype]:
            return f"{use} would differ from transformers' by {error:.1g} of their spread"
    return ""


def _packed(
    model: LoadedModel, rows: Sequence[list[int]], adapters: Sequence[Adapter | None]
) -> torch.Tensor:
    """float32 [T of all, V] of one pass, as in training."""
    return torch.cat(_logits(model, rows, adapters, starts=[0] * len(rows), cache=None))


def _cached(
    model: LoadedModel, rows: Sequence[list[int]], adapters: Sequence[Adapter | None]
) -> torch.Tensor:
    """The same through prefill and decoding, as in sampling."""
    prompts = [PromptCache(model.cache_shape, length=length) for length in READ]
    places, decoding = [CachedRow() for _ in rows], RowCache(model.cache_shape)
    read, pieces = [0] * len(rows), []
    for sizes in PIECES:
        cache: PrefillPass | DecodePass
        if max(sizes) > 1:
            cache = PrefillPass(list(zip(prompts, sizes, strict=True)))
        else:
            cache = decoding.decode(places)
        new = [row[at : at + n] for row, at, n in zip(rows, read, sizes, strict=True)]
        pieces.append(_logits(model, new, adapters, starts=read, cache=cache))
        cache.finish()
        read = [at + n for at, n in zip(read, sizes, strict=True)]
        if read == READ:
            for place, prompt in zip(places, prompts, strict=True):
                decoding.add([place], prompt)
    return torch.cat([piece for row in zip(*pieces, strict=True) for piece in row])


def _logits(
    model: LoadedModel,
    rows: Sequence[list[int]],
    adapters: Sequence[Adapter | None],
    *,
    starts: list[int],
    cache: AttentionCache | None,
) -> tuple[torch.Tensor, ...]:
    """float32 [T, V] of each row."""
    batch = pack(rows, adapters=adapters, device=model.device, starts=starts, cache=cache)
    each = [a for a, row in zip(adapters, rows, strict=True) for _ in row]
    return torch.split(model.logits(model.hidden_states(batch), each), list(batch.lengths))


def _random_adapter(model: LoadedModel) -> Adapter:
    """Of every layer that can be adapted, with values that change the logits."""
    config = LoraConfig(rank=1, alpha=1.0)
    targets = list(model.facts.targets.values())
    adapter = new_adapter(targets, config, seed=0, device=model.device)
    generator = torch.Generator().manual_seed(0)
    for pair in adapter.pairs.values():
        pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * 0.1)
    return adapter


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """The attention of transformers' own, with the masks that the model makes for it."""
    configs = [m.config for m in module.modules() if hasattr(m, "config")]
    with _changed(
        [vars(config) for config in configs],
        lambda name, _: "eager" if name == "_attn_implementation_internal" else None,
    ):
        yield


@contextmanager
def _small_windows(module: Any) -> Iterator[None]:
    """Cuts every window and chunk of the attention."""
    holders = [vars(m) for m in module.modules()]
    holders += [vars(m.config) for m in module.modules() if hasattr(m, "config")]
    with _changed(
        holders,
        lambda name, value: (
            WINDOW
            if re.search("window|chunk", name) and type(value) is int and value > WINDOW
            else None
        ),
    ):
        yield


@contextmanager
def _changed(
    holders: Sequence[dict[str, Any]], change: Callable[[str, Any], Any]
) -> Iterator[None]:
    """Sets attributes for a while to what `change` answers for a name and value, if anything."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for holder in holders:
        for name, value in holder.items():
            new = change(name, value)
            if new is not None:
                kept.append((holder, name, value))
                holder[name] = new
    try:
        yield
    finally:
        for holder, name, value in reversed(kept):
            holder[name] = value
