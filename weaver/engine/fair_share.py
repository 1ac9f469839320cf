"""`FairShare`: whose turn it is on a device that a trainer and a sampler share.

`ThreadedEngine` asks it before each turn.
"""

from __future__ import annotations


class FairShare:
    """Gives trainer and sampler the same time on the device while both want it.

    The one that has used less goes first; a side that was idle saves up no claim.
    """

    def __init__(self) -> None:
        self._used_s = {"trainer": 0.0, "sampler": 0.0}

    def choose(self, *, trainer: bool, sampler: bool) -> str | None:
        """Whose turn it is among those that have work; None if neither has."""
        used = self._used_s
        if not trainer:
            used["trainer"] = max(used.values()) if sampler else used["trainer"]
            return "sampler" if sampler else None
        if not sampler:
            used["sampler"] = max(used.values())
            return "trainer"
        return min(used, key=lambda side: used[side])

    @property
    def trainer_is_next(self) -> bool:
        return self._used_s["trainer"] <= self._used_s["sampler"]

    def charge(self, side: str, seconds: float) -> None:
        self._used_s[side] += seconds
