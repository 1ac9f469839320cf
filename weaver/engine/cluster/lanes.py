"""`GroupLanes`: which of several trainer groups has a run. Called by `ClusterEngine`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from zlib import crc32


class GroupLanes:
    """Gives a run that is new to the group that has the fewest, and remembers it.

    A hash of the run alone leaves groups idle while runs wait at others.
    """

    def __init__(self) -> None:
        self._of: dict[str, str] = {}
        self._there: set[str] = set()
        """Runs that their groups have now."""
        self._count: Counter[str] = Counter()
        """Of these, by group."""
        self._given: Counter[str] = Counter()
        """All that were ever given to a group."""

    def of(self, run_id: str, groups: Sequence[str]) -> str:
        """The run's group, one of these, for as long as this lives.

        Among those with the fewest runs, the one that was given the fewest: many may be on their
        way into it. Among these a hash chooses.
        """
        if run_id not in self._of:
            first = crc32(run_id.encode()) % len(groups)
            turned = [*groups[first:], *groups[:first]]
            group = min(turned, key=lambda name: (self._count[name], self._given[name]))
            self._of[run_id] = group
            self._given[group] += 1
        return self._of[run_id]

    def add(self, run_id: str) -> None:
        """Its group has it."""
        if run_id not in self._there:
            self._there.add(run_id)
            self._count[self._of[run_id]] += 1

    def discard(self, run_id: str) -> None:
        """It has left its group, to which it may come back."""
        if run_id in self._there:
            self._there.remove(run_id)
            self._count[self._of[run_id]] -= 1
