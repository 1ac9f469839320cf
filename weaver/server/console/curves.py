"""Curves of a run, thinned for a screen: made for the console from metrics and operations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weaver.types import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weaver.server.store import Answer
    from weaver.types import MetricPoint

LOGGED = "logged"
Points = list[tuple[float, float]]


class Curve(Value):
    name: str
    source: str
    """`logged` by the client, or the kind of operation that answered it."""
    points: tuple[tuple[float, float], ...]
    """Step and value, both finite."""
    last: float
    total: int
    """How many points there were before thinning."""


def curves_of(
    points: Iterable[MetricPoint], answers: Iterable[Answer], *, most: int
) -> list[Curve]:
    """One for each name and source, of at most `most` points."""
    found: dict[tuple[str, str], Points] = {}
    for point in points:
        place = found.setdefault((LOGGED, point.name), [])
        place.append((len(place) if point.step is None else point.step, point.value))
    for one in answers:
        step = one.step + (one.kind == "forward_backward")  # the step that its gradient goes into
        for name, value in one.metrics.items():
            if name != "step":
                found.setdefault((one.kind, name), []).append((step, value))
    return [
        Curve(
            name=name,
            source=source,
            points=tuple(thin(kept, most)),
            last=kept[-1][1],
            total=len(kept),
        )
        for (source, name), all_points in found.items()
        if (kept := [(step, value) for step, value in all_points if math.isfinite(value)])
    ]


def thin(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """At most `most` of the points: the lowest and the highest of each stretch, in their order."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    shown: Points = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        shown += [points[i] for i in sorted(ends)]
    return shown
