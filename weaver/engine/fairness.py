"""`in_turn`: in which order tenants get places in the sampler. Called by the samplers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


def in_turn(
    items: Iterable[T], tenant: Callable[[T], str], *, held: Callable[[T], int] = lambda item: 0
) -> list[T]:
    """One item of each tenant after the other, that of the tenant who holds least first.

    Each tenant's items stay in their order, whatever others have.
    """
    order = [(item, tenant(item)) for item in items]
    counts: Counter[str] = Counter()
    holds: Counter[str] = Counter()
    places = []
    for item, name in order:
        places.append(counts[name])
        counts[name] += 1
        holds[name] += held(item)
    if len(counts) < 2:
        return [item for item, _ in order]
    ranks = sorted(range(len(order)), key=lambda i: (places[i], holds[order[i][1]]))
    return [order[i][0] for i in ranks]
