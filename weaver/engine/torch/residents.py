"""`Residents`: which frozen base models are in memory, and which of them leave for another.

`ModelStore` keeps them here, in the engine's thread. Only frozen weights come and go: adapters,
gradients and optimizers of runs stay, and what was unloaded is read again from its files, so that
nothing is lost. A model is in use while samples of it run, and is then never unloaded; a gradient
pass has its model until it ends.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from weaver.engine.torch.models import LoadedModel

TURNS = 2
"""A model that others wait for keeps its place for so many times as long as its loading took, so
that turns of two models that do not fit together are not spent on loading alone."""
PAUSE_S = 0.5
"""So long after its last use it counts as used: a loop thinks between two calls."""


@dataclass(slots=True, eq=False)
class Resident:
    model: LoadedModel
    nbytes: int
    load_s: float
    """What its loading took."""
    used_at: float
    """By the clock of `Residents`."""


@dataclass(slots=True, kw_only=True)
class Residents:
    """Frozen models by name."""

    budget: int | None
    """Bytes that all of them may take; None is without a limit."""
    strict: bool
    """Whether it was set, and holds for a model that is alone, too."""
    memory: int | None
    """Bytes that they and what else is loaded may take; None is not known."""
    clock: Callable[[], float] = time.monotonic
    _models: dict[str, Resident] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in list(self._models.values()))

    @property
    def names(self) -> list[str]:
        """May be asked in any thread."""
        return list(self._models)

    def get(self, name: str) -> Resident | None:
        """One that is there, which does not count as its use."""
        return self._models.get(name)

    def put(self, name: str, model: LoadedModel, *, nbytes: int, load_s: float) -> None:
        self._models[name] = Resident(model, nbytes, load_s, self.clock())

    def take(self, name: str) -> LoadedModel:
        """Out of here."""
        return self._models.pop(name).model

    def touch(self, name: str) -> None:
        """Notes that it is used, if it is there."""
        if name in self._models:
            self._models[name].used_at = self.clock()

    def clear(self) -> None:
        self._models.clear()

    def could_hold(self, nbytes: int, *, owned: int) -> bool:
        """Whether there is room for a base model once all others are gone."""
        return self._fits(nbytes, beside=0, owned=owned, base=True)

    def leaving(
        self, nbytes: int, *, owned: int, in_use: Container[str], base: bool = True
    ) -> list[str] | None:
        """Which go so that there is room, those used least lately; None: it cannot be made now.

        Args:
            owned: bytes of models that are not here, see `ModelStore.own`.
            base: whether it is for a base model, which the budget is for.
        """
        by_use = sorted(self._models.items(), key=lambda item: item[1].used_at)
        idle = [name for name, _ in by_use if name not in in_use]
        beside, gone = self.nbytes, list[str]()
        while not self._fits(nbytes, beside=beside, owned=owned, base=base):
            if not idle:
                return None
            gone.append(idle.pop(0))
            beside -= self._models[gone[-1]].nbytes
        return gone

    def delay_s(self, leaving: list[str], *, since: float) -> float:
        """For how long they keep their places, though another waits since then."""
        ends = (
            min(one.used_at + min(one.load_s, PAUSE_S), since + TURNS * one.load_s)
            for one in (self._models[name] for name in leaving)
        )
        return max(0.0, max(ends, default=0.0) - self.clock())

    def _fits(self, nbytes: int, *, beside: int, owned: int, base: bool) -> bool:
        alone = not beside + owned
        if self.memory is not None and beside + owned + nbytes > self.memory and not alone:
            return False
        if not base or self.budget is None or beside + nbytes <= self.budget:
            return True
        return not (beside or self.strict)
