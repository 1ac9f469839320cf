"""Where the seconds of a group went: the sampler, environments, rewards, tools. Rollouts keep it.

What is timed lies deep in code that knows no group (a reward's call, a tool's), and tasks inherit
the context in which they were begun: so the list that a second is added to is found there. Outside
of a recording nothing is kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

SPENT: ContextVar[dict[str, list[float]] | None] = ContextVar("spent", default=None)


@contextmanager
def recording() -> Iterator[dict[str, list[float]]]:
    """What is spent inside, by kind: `{"tool": [0.2, 0.1], "tool_failed": [0.1]}`, in seconds."""
    spent: dict[str, list[float]] = {}
    token = SPENT.set(spent)
    try:
        yield spent
    finally:
        SPENT.reset(token)


def spend(kind: str, seconds: float) -> None:
    """Adds one to the recording that is open, if any."""
    spent = SPENT.get()
    if spent is not None:
        spent.setdefault(kind, []).append(seconds)


@contextmanager
def timed(kind: str) -> Iterator[None]:
    """Spends the seconds inside, also where they end with an error."""
    begin = time.monotonic()
    try:
        yield
    finally:
        spend(kind, time.monotonic() - begin)


@contextmanager
def timed_alone(kind: str) -> Iterator[None]:
    """`timed` without the seconds in which the sampler was waited for."""
    begin = time.monotonic()
    with recording() as inner:
        try:
            yield
        finally:
            whole = time.monotonic() - begin
    spend(kind, max(0.0, whole - sum(inner.get("sampling", ()))))
    for name, seconds in inner.items():
        for one in seconds:
            spend(name, one)


class Stopwatch:
    """`with watch: ...` in any number of tasks: the seconds in which at least one is inside."""

    def __init__(self) -> None:
        self._inside = 0
        self._since = self._before = 0.0

    @property
    def seconds(self) -> float:
        """Until now."""
        return self._before + (time.monotonic() - self._since if self._inside else 0.0)

    def __enter__(self) -> None:
        if not self._inside:
            self._since = time.monotonic()
        self._inside += 1

    def __exit__(self, *exc: object) -> None:
        if self._inside == 1:
            self._before = self.seconds
        self._inside -= 1


def merged(spent: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    """For a `Group`: whole microseconds, since it is kept as JSON."""
    return {kind: tuple(round(one, 6) for one in every) for kind, every in spent.items()}
