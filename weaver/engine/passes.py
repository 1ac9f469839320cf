"""How the sequences of several jobs are laid out in passes of the model; pure, for the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


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
