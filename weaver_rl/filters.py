"""Which groups are trained on: those whose samples all earned the same teach nothing.

`apply` is called by the RL loops between scoring and advantages. Dropping or resampling is the
dynamic sampling of DAPO (Yu et al., arXiv:2503.14476, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from weaver_rl.types import Group

if TYPE_CHECKING:
    from collections.abc import Sequence

Groups = tuple[Group, ...]
ZeroVariance = Literal["keep", "drop", "resample"]
"""keep: they count in the denominator; drop: they do not; resample: others take their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """`Filtered(kept=(g1, g3), dropped=(g2,), metrics={"groups/kept": 2.0, ...})`"""

    kept: Groups
    """What is learned; a task that has nothing is not among them."""
    dropped: Groups = ()
    metrics: dict[str, float] = field(default_factory=dict)


def is_zero_variance(group: Group) -> bool:
    """Whether its rewards teach nothing: all equal, up to rounding, or fewer than two."""
    rewards = group.rewards
    return len(rewards) < 2 or bool(np.ptp(rewards) <= 1e-12 * max(map(abs, (*rewards, 1.0))))


def apply(groups: Sequence[Group], zero_variance: ZeroVariance = "keep") -> Filtered:
    """Sorts groups into kept and dropped; one in which every rollout failed is never kept.

    Resampling is the loop's: here it means to drop.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    for group in groups:
        wanted = bool(group.rewards) and (zero_variance == "keep" or not is_zero_variance(group))
        (kept if wanted else dropped).append(group)
    metrics = {
        "groups/kept": float(len(kept)),
        "groups/dropped": float(len(dropped)),
        "groups/empty": float(sum(not group.rewards for group in groups)),
    }
    return Filtered(kept=tuple(kept), dropped=tuple(dropped), metrics=metrics)
