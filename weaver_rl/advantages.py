"""Advantages: how much better a sample was than what it is compared with. Called by credits.

Each function takes `rewards_P_G` (P problems, G samples, float64) and `valid_P_G` (bool; False
where a rollout failed or does not exist) and answers advantages [P, G], float64. What is not valid,
or has nothing to be compared with (a group of one, of equal rewards), gets 0; never NaN.

Standard deviations divide by n (`ddof=0`), so that the advantages of a group have the variance 1,
or by n − 1 (`ddof=1`), the unbiased estimate. The papers of GRPO (arXiv:2402.03300) and REINFORCE++
(arXiv:2501.03262) write std and do not say which; TRL and verl take torch's default, n − 1. In a
group of 8 the advantages of n are 7% larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from weaver.errors import ConfigError, nearest
from weaver_rl.types import BoolPG, FloatPG

__all__ = ["ADVANTAGES"]

AdvantageFn = Callable[[FloatPG, BoolPG], FloatPG]

EPSILON = 1e-6
"""Added to standard deviations, in units of reward."""


def group_centred(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """A = r − mean(r) of the group. Also that of Dr. GRPO (Liu et al., arXiv:2503.20783, eq. 3),
    whose other half is the constant denominator: `Objective(aggregate="constant")`."""
    count_P = np.maximum(valid_P_G.sum(axis=1), 1)
    mean_P = np.where(valid_P_G, rewards_P_G, 0.0).sum(axis=1) / count_P
    centred_P_G = rewards_P_G - mean_P[:, None]
    exact = np.abs(centred_P_G) > 1e-12 * np.maximum(np.abs(rewards_P_G), 1.0)
    return np.where(valid_P_G & exact, centred_P_G, 0.0)  # equal rewards give 0, not rounding


def standardised(rewards_P_G: FloatPG, valid_P_G: BoolPG, *, ddof: int = 0) -> FloatPG:
    """A = (r − mean) / (std + ε) of the group: GRPO (Shao et al., arXiv:2402.03300, section 4.1.2).

    std divides by n − `ddof`.
    """
    centred_P_G = group_centred(rewards_P_G, valid_P_G)
    count_P = np.maximum(valid_P_G.sum(axis=1) - ddof, 1)
    std_P = np.sqrt((centred_P_G**2).sum(axis=1) / count_P)
    result: FloatPG = centred_P_G / (std_P[:, None] + EPSILON)
    return result


def leave_one_out(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """A_i = r_i − mean of the others: RLOO (Ahmadian et al., arXiv:2402.14740, eq. 8)."""
    count_P = valid_P_G.sum(axis=1)
    scale_P = np.where(count_P > 1, count_P / np.maximum(count_P - 1, 1), 0.0)
    return group_centred(rewards_P_G, valid_P_G) * scale_P[:, None]


def reinforce_pp(rewards_P_G: FloatPG, valid_P_G: BoolPG, *, ddof: int = 0) -> FloatPG:
    """A = (r − mean) / (std + ε) over the whole batch: REINFORCE++ (Hu, arXiv:2501.03262).

    Leaves out the paper's KL term in the reward: with it, it is `weaver_rl.credit.whitened`.
    """
    flat = standardised(rewards_P_G.reshape(1, -1), valid_P_G.reshape(1, -1), ddof=ddof)
    return flat.reshape(rewards_P_G.shape)


def reinforce_pp_baseline(rewards_P_G: FloatPG, valid_P_G: BoolPG, *, ddof: int = 0) -> FloatPG:
    """REINFORCE++ with a baseline: centred in the group, then standardised over the batch."""
    return reinforce_pp(group_centred(rewards_P_G, valid_P_G), valid_P_G, ddof=ddof)


def raw(rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """A = r: plain REINFORCE (Williams 1992), without a baseline."""
    return np.where(valid_P_G, rewards_P_G, 0.0)


STANDARDISING: Mapping[str, Callable[..., FloatPG]] = {
    "standardised": standardised,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
ADVANTAGES: Mapping[str, AdvantageFn] = {
    "group_centred": group_centred,
    "standardised": standardised,
    "leave_one_out": leave_one_out,
    "dr_grpo": group_centred,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "raw": raw,
}


def advantage_fn(choice: str | AdvantageFn, *, ddof: int = 0) -> AdvantageFn:
    """The function that a name stands for; a function is taken as it is.

    Raises:
        ConfigError: no advantage has that name, or it has no use for a `ddof`.
    """
    if ddof not in (0, 1) or (ddof and choice not in STANDARDISING):
        raise ConfigError(
            f"is {ddof!r}, the advantage {choice!r}.",
            field="ddof",
            hint=f"0 divides by n, 1 by n − 1, the latter in {', '.join(sorted(STANDARDISING))}.",
        )
    if callable(choice):
        return choice
    if ddof:
        return partial(STANDARDISING[choice], ddof=ddof)
    if choice not in ADVANTAGES:
        raise ConfigError(
            f"no advantage is called {choice!r}.",
            field="advantage",
            hint=nearest(choice, ADVANTAGES),
        )
    return ADVANTAGES[choice]
