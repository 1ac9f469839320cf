"""`PackedBatch`: sequences laid end to end, the one form in which rows enter a model.

The trainer, as `plan_passes` says, and the sampler build it; `LoadedModel.hidden_states` takes it,
and it travels as the keyword `packed_batch` of the model call, beside `packed_attention`, to the
attention that is registered with transformers here, with which every model is loaded. transformers
builds no mask for an implementation that registers none, so none is registered. T is the rows of
the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from weaver.engine.torch.attention import Heads, PackedAttention, packed_attention
from weaver.engine.torch.lora import Adapter
from weaver.errors import UnsupportedError

ATTENTION = "weaver_packed"
"""Its name with transformers."""


class AttentionCache(Protocol):
    """Keys and values of earlier tokens; a batch that has one attends through it."""

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """-> [1, T, Hq, D]"""

    def finish(self) -> None:
        """After the last layer: the tokens of the pass count as read."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """Rows of several sequences, without padding.

    Two sequences of 3 and 2 tokens: `input_ids=[5, 6, 7, 5, 8]`, `position_ids=[0, 1, 2, 0, 1]`,
    `lengths=(3, 2)`, `adapters=(first, None)`.
    """

    input_ids: torch.Tensor
    """int64 [T]"""
    position_ids: torch.Tensor
    """int64 [T]"""
    lengths: tuple[int, ...]
    """Rows of each sequence; they sum to T."""
    adapters: tuple[Adapter | None, ...]
    """One for each sequence; None is the base model."""
    cache: AttentionCache | None = None
    made: dict[object, Any] = field(default_factory=dict)
    """See `Layout`."""


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    adapters: Sequence[Adapter | None],
    device: torch.device,
    starts: Sequence[int] | None = None,
    cache: AttentionCache | None = None,
) -> PackedBatch:
    """Packs sequences in the given order, each from position 0, or from its start in `cache`.

    Neighbours of one length share an attention call: sort by length where order is free.
    """
    tokens = [token for sequence in sequences for token in sequence]
    begins = starts or [0] * len(sequences)
    spans = zip(begins, sequences, strict=True)
    positions = [start + i for start, sequence in spans for i in range(len(sequence))]
    return PackedBatch(
        input_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        position_ids=torch.tensor(positions, dtype=torch.int64, device=device),
        lengths=tuple(len(s) for s in sequences),
        adapters=tuple(adapters),
        cache=cache,
    )


def stacked(targets: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
    """Targets of sequences, [T] or [T, K] each, end to end: int64 [T], or [T, W] for the widest.

    Those of fewer are filled up with -1.
    """
    columns = [one.reshape(len(one), -1) for one in targets]
    width = max(one.shape[1] for one in columns)
    if width == 1:
        return torch.from_numpy(np.concatenate([one[:, 0] for one in columns]))
    filled = np.full((sum(map(len, columns)), width), -1)
    start = 0
    for one in columns:
        filled[start : start + len(one), : one.shape[1]] = one
        start += len(one)
    return torch.from_numpy(filled)


@dataclass(frozen=True, slots=True)
class Share:
    """The datums of one job that ride in one pass."""

    job: int
    datums: tuple[int, ...]


def plan_passes(
    lengths: Sequence[Sequence[int]], *, budget: int, merge: bool
) -> list[tuple[Share, ...]]:
    """Passes of at most `budget` tokens; a longer sequence rides alone. `lengths[job][datum]`.

    A job's datums are sorted by length, so that equal ones share an attention call, and stay
    together, so that a pass has one row segment a job. Without `merge` a pass holds one job, and
    how a job is laid out does not depend on the others.

    >>> plan_passes([[3, 1], [2]], budget=4, merge=True)
    [(Share(job=0, datums=(1, 0)),), (Share(job=1, datums=(0,)),)]
    """
    riding: list[tuple[int, int]] = []
    passes, room = [riding], budget
    for job, sizes in enumerate(lengths):
        for datum in sorted(range(len(sizes)), key=lambda i: sizes[i]):
            if riding and (sizes[datum] > room or not (merge or riding[-1][0] == job)):
                riding, room = [], budget
                passes.append(riding)
            riding.append((job, datum))
            room -= sizes[datum]
    shares = [groupby(each, key=itemgetter(0)) for each in passes if each]
    return [tuple(Share(job, tuple(d for _, d in of)) for job, of in each) for each in shares]


def split_passes(
    passes: Sequence[tuple[Share, ...]], lengths: Sequence[Sequence[int]], *, budget: int
) -> list[tuple[Share, ...]]:
    """Each pass as passes of at most `budget` tokens.

    >>> whole = (Share(job=0, datums=(1, 0)), Share(job=1, datums=(0,)))
    >>> split_passes([whole], [[3, 1], [2]], budget=4)
    [(Share(job=0, datums=(1, 0)),), (Share(job=1, datums=(0,)),)]
    """
    split = []
    for shares in passes:
        sizes = [[lengths[share.job][datum] for datum in share.datums] for share in shares]
        for part in plan_passes(sizes, budget=budget, merge=True):
            of = [(shares[some.job], some.datums) for some in part]
            split.append(tuple(Share(s.job, tuple(s.datums[i] for i in at)) for s, at in of))
    return split


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_batch: PackedBatch | None = None,
    packed_attention: PackedAttention = packed_attention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D].

    `unused` are keywords that other implementations read, such as `dropout` (0 in eval mode).
    """
    if packed_batch is None:
        raise UnsupportedError(
            f"{type(module).__name__} is not handed the keywords of the model call.",
            field="base_model",
            hint="Choose another model.",
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = Heads(query, key, value, scaling, sliding_window, softcap, s_aux)
    if packed_batch.cache is None:
        output = packed_attention(heads, packed_batch)
    else:
        output = packed_batch.cache.attend(int(module.layer_idx), heads)
    return output.contiguous(), None  # models take views of it


AttentionInterface.register(ATTENTION, _attention)
