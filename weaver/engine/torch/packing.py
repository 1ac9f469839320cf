"""`PackedBatch`: sequences laid end to end, the one form in which rows enter a model.

The trainer, as `plan_passes` says, and the sampler build it; `LoadedModel.hidden_states` takes it,
and it travels as a keyword of the model call to
`weaver.engine.torch.attention`. T is the rows of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.engine.torch.lora import Adapter


class Heads(NamedTuple):
    """What a layer attends with, after rotary embedding."""

    q: torch.Tensor
    """[1, Hq, T, D]"""
    k: torch.Tensor
    """[1, Hkv, T, D]"""
    v: torch.Tensor
    scaling: float
    window: int | None
    """w lets position i see (i - w, i]; None sees [0, i]."""


class AttentionCache(Protocol):
    """Keys and values of earlier tokens; a batch that has one attends through it."""

    def attend(self, layer: int, heads: Heads) -> torch.Tensor:
        """-> [1, T, Hq, D]"""


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
    """Of each sequence; None is the base model."""
    cache: AttentionCache | None = None
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Sliding-window masks by (length, window), shared by the layers of one call."""


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
    passes: list[tuple[Share, ...]] = []
    shares: list[Share] = []
    room = budget
    for job, sizes in enumerate(lengths):
        riding: list[int] = []
        for datum in sorted(range(len(sizes)), key=lambda i: sizes[i]):
            if sizes[datum] > room and (riding or shares):
                if riding:
                    shares.append(Share(job, tuple(riding)))
                passes.append(tuple(shares))
                shares, riding, room = [], [], budget
            riding.append(datum)
            room -= sizes[datum]
        if riding:
            shares.append(Share(job, tuple(riding)))
        if not merge and shares:
            passes.append(tuple(shares))
            shares, room = [], budget
    return [*passes, tuple(shares)] if shares else passes
