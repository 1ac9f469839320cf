"""Who draws a job, and whose job is next: `choose` and `Turns`. Called by `SamplerPool`."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

PREFIX_TOKENS = 256
"""Prompts that have so many in common go to the same worker, where they were read already."""
OVERLOAD = 1.25
"""Times the mean load, above which a worker's prompts go to the second choice."""
LIGHT = 16
"""Rows, above which a worker can be overloaded: so many are drawn hardly slower than one."""


def key_of(weights: str, prompt: Sequence[int]) -> bytes:
    """What jobs have in common that should meet at one worker."""
    return f"{weights} {list(prompt[:PREFIX_TOKENS])}".encode()


def choose(
    key: bytes, loads: Mapping[str, int], *, has_room: Callable[[str], bool] = lambda name: True
) -> str | None:
    """A worker for the key, by their names and loads in rows; None: none of them has room.

    Rendezvous hashing (Thaler and Ravishankar, doi:10.1109/90.663936): when a worker leaves or
    joins, only its own keys move. The first choice that is loaded above `OVERLOAD` times the mean,
    and not just lightly, leaves the key to the second, unless that is loaded more; where neither
    has room, the next has.
    """
    ranked = sorted(loads, key=lambda name: _score(key, name), reverse=True)
    if len(ranked) > 1:
        first, second = ranked[:2]
        mean = sum(loads.values()) / len(loads)
        if loads[first] > max(OVERLOAD * mean, LIGHT) and loads[second] <= loads[first]:
            ranked[:2] = second, first
    return next((name for name in ranked if has_room(name)), None)


def _score(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(key, key=name.encode()[:64], digest_size=8).digest()


class Turns(Generic[T]):
    """What waits, of tenants who take turns, however much waits of each.

    Whoever holds least is next, of those the one whose last turn is longest ago.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._held: dict[str, int] = {}
        self._last: dict[str, int] = {}
        """Of tenants who wait or hold something, the number of their last turn."""
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, item: T, *, first: bool = False) -> None:
        """Behind the tenant's others, or before them all."""
        queue = self._waiting.setdefault(tenant, deque())
        if first:
            queue.appendleft(item)
        else:
            queue.append(item)

    def remove(self, tenant: str, item: T) -> None:
        """What does not wait is ignored."""
        if item in (queue := self._waiting.get(tenant, deque())):
            queue.remove(item)
            self._forget(tenant)

    def next(self) -> T | None:
        """Whose turn it is; it goes on waiting."""
        if not self._waiting:
            return None
        ranks = {name: (self._held.get(name, 0), self._last.get(name, 0)) for name in self._waiting}
        return self._waiting[min(ranks, key=lambda name: ranks[name])][0]

    def begin(self, tenant: str, *, rows: int) -> None:
        """The tenant's first does not wait any more, but holds so many rows."""
        self._held[tenant] = self._held.get(tenant, 0) + rows
        self._turn += 1
        self._last[tenant] = self._turn
        self._waiting[tenant].popleft()
        self._forget(tenant)

    def end(self, tenant: str, *, rows: int) -> None:
        """Gives back what the tenant held."""
        self._held[tenant] -= rows
        self._forget(tenant)

    def drain(self) -> list[T]:
        """All that waits, which then does not any more."""
        items = [item for queue in self._waiting.values() for item in queue]
        for tenant in list(self._waiting):
            self._waiting[tenant].clear()
            self._forget(tenant)
        return items

    def _forget(self, tenant: str) -> None:
        """What there is nothing of any more."""
        if not self._waiting.get(tenant, True):
            del self._waiting[tenant]
        if not self._held.get(tenant, True):
            del self._held[tenant]
        if tenant not in self._waiting and tenant not in self._held:
            self._last.pop(tenant, None)
