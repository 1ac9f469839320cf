"""How fast the steps of a loop go by and how long the rest will take; displays show it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """`Pace(steps=60)`; its text is `1.2 s a step, 1 m 10 s left`."""

    def __init__(
        self, *, steps: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.steps = steps
        """Of the loop, where that is known."""
        self.step = 0
        """The last that is done."""
        self._clock = clock
        self._begin = clock()
        self._done = 0

    def expect(self, steps: int, done: int) -> None:
        """The loop begins: it takes so many steps, of which a run before this did `done`."""
        self.steps = steps
        self.step = self._done = done
        self._begin = self._clock()

    def reach(self, step: int) -> None:
        """A step is done; 0 is the evaluation before the first, which counts for no step."""
        self.step = step
        if step <= self._done:
            self._begin = self._clock()

    @property
    def seconds_a_step(self) -> float | None:
        """The mean since the loop began; None before its first step."""
        taken = self.step - self._done
        return (self._clock() - self._begin) / taken if taken > 0 else None

    def __str__(self) -> str:
        each = self.seconds_a_step
        if each is None:
            return ""
        left = "" if self.steps is None else f", {duration(each * (self.steps - self.step))} left"
        return f"{each:.1f} s a step{left}"


def duration(seconds: float) -> str:
    """For people: `41 s`, `2 m 10 s`, `3 h 5 m`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole // 60} m {whole % 60} s" if whole >= 120 else f"{whole} s"
