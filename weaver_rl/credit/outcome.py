"""`outcome`: the rollout's reward, compared with others, for all of its tokens alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from weaver.errors import InvalidRequestError
from weaver_rl.advantages import AdvantageFn, advantage_fn
from weaver_rl.credit.marks import Marks, NamedCredit, spread
from weaver_rl.guard import name_of
from weaver_rl.types import BoolPG, FloatPG, Group, reward_matrix


def outcome(
    advantage: str | AdvantageFn = "group_centred", *, ddof: Literal[0, 1] = 0
) -> NamedCredit:
    """What `Plan(advantage=...)` is short for: `outcome("standardised", ddof=1)`.

    Args:
        advantage: a name of `ADVANTAGES`, or a function of rewards [P, G] and which count [P, G].
        ddof: of the standard deviation, as numpy's; see `weaver_rl.advantages`.

    Raises:
        ConfigError: no such advantage, or one that has no standard deviation, with a `ddof`.
    """
    compare = advantage_fn(advantage, ddof=ddof)

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        return spread(groups, compared(compare, *reward_matrix(list(groups))))

    return NamedCredit(f"outcome({described(advantage, ddof)})", mark)


def compared(compare: AdvantageFn, rewards_P_G: FloatPG, valid_P_G: BoolPG) -> FloatPG:
    """
    Raises:
        InvalidRequestError: the function answers another shape, or no numbers.
    """
    given = compare(rewards_P_G, valid_P_G)
    if np.shape(given) != rewards_P_G.shape:
        raise InvalidRequestError(
            f"{name_of(compare)} gave the shape {list(np.shape(given))} for rewards of "
            f"{list(rewards_P_G.shape)}.",
            field="advantage",
            hint="It answers an advantage for each reward.",
        )
    return given


def described(advantage: str | AdvantageFn, ddof: int) -> str:
    """For a credit's label: `standardised, ddof=1`."""
    name = advantage if isinstance(advantage, str) else name_of(advantage)
    return f"{name}, ddof={ddof}" if ddof else name
