"""What runs next on the engine: pure decisions, called by the executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The operation at the head of a lane."""

    merge_key: str | None
    """Heads with the same key can share a pass of the engine; None runs alone."""
    num_tokens: int = 0


def plan(heads: Sequence[Head], budget_tokens: int) -> list[int]:
    """The heads, by index, to run in one engine call.

    `heads` are in the order in which their projects and lanes were last served, so the first one
    always runs;
    later ones that can share its pass join while the sum of tokens stays within the budget.
    """
    if not heads:
        return []
    chosen, total = [0], heads[0].num_tokens
    for i, head in enumerate(heads[1:], start=1):
        together = head.merge_key is not None and head.merge_key == heads[0].merge_key
        if together and total + head.num_tokens <= budget_tokens:
            chosen.append(i)
            total += head.num_tokens
    return chosen


class Turns:
    """Remembers when each project was last served."""

    def __init__(self) -> None:
        self._count = 0
        self._served: dict[str, int] = {}

    def last(self, project: str) -> int:
        """Grows with each turn; 0 for a project that had none."""
        return self._served.get(project, 0)

    def serve(self, projects: Iterable[str]) -> None:
        self._count += 1
        self._served |= dict.fromkeys(projects, self._count)
