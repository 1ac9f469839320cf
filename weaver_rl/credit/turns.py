"""`turns` and `steps`: each turn of a conversation answers for what came of it, not for the whole.

The rewards of turns are what an environment said by `agent.reward(0.2)`, or what a process reward
says afterwards. The return of a turn is its reward and the discounted ones behind it; it is
compared with those of the same turn in the rollouts of the group that got so far: the turn-level
advantage of Zeng et al. (arXiv:2505.11821), with returns to go as in Feng et al.'s GiGPO
(arXiv:2505.10978, eq. 9). Left out: groups of equal states (GiGPO), and a critic.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import anyio
import numpy as np
import numpy.typing as npt

from weaver.errors import ConfigError, InvalidRequestError
from weaver_rl.advantages import AdvantageFn, advantage_fn
from weaver_rl.credit.marks import Marks, NamedCredit, level, turn_of_tokens
from weaver_rl.credit.outcome import compared, described
from weaver_rl.guard import gather, is_async, name_of
from weaver_rl.types import Group, Rollout, Task

FloatK = npt.NDArray[np.float64]
"""A number for each turn of a rollout."""
ProcessReward = Callable[[Task, Rollout], Awaitable[Sequence[float]]]


def turns(
    advantage: str | AdvantageFn = "group_centred",
    *,
    discount: float = 1.0,
    ddof: Literal[0, 1] = 0,
) -> NamedCredit:
    """Of the rewards that environments gave by `agent.reward`; a turn without one has 0.

    Args:
        advantage: a row is one turn of one group; see `outcome`.
        discount: γ in [0, 1] of the return r_t + γ·r_{t+1} + ...; 0: each turn for itself.

    Raises:
        ConfigError: at construction; names the argument.
    """
    compare = advantage_fn(advantage, ddof=ddof)
    check_discount(discount)

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        rewards = [[_given(rollout) for rollout in group.rollouts] for group in groups]
        return by_turn(groups, rewards, compare=compare, discount=discount)

    return NamedCredit(f"turns({described(advantage, ddof)}, discount={discount:g})", mark)


def steps(
    score: ProcessReward,
    advantage: str | AdvantageFn = "group_centred",
    *,
    discount: float = 1.0,
    ddof: Literal[0, 1] = 0,
    timeout_s: float = 60.0,
) -> NamedCredit:
    """Of a process reward: an async function of (task, rollout) that answers a number a turn.

    What it raises ends the step before anything is trained. The others are those of `turns`.

    Args:
        timeout_s: for each rollout.

    Raises:
        ConfigError: at construction; names the argument.
        InvalidRequestError, when called: another number of turns, NaN, or no answer in time.
    """
    if not is_async(score):
        hint = "Write `async def score(task, rollout)`; it answers a list, a number for each turn."
        raise ConfigError(f"{score!r} is not an async function.", field="score", hint=hint)
    compare = advantage_fn(advantage, ddof=ddof)
    check_discount(discount)

    async def one(place: str, rollout: Rollout) -> FloatK:
        if rollout.failure is not None:
            return np.zeros(rollout.trajectory.turns)
        with anyio.move_on_after(timeout_s):
            values = await score(rollout.task, rollout)
            return _per_turn(values, rollout, place)
        hint = "Raise timeout_s, or make it faster."
        raise InvalidRequestError(f"took over {timeout_s:g} s.", field=place, hint=hint)

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        calls = [
            partial(one, f"{name_of(score)}[{p}][{g}]", rollout)
            for p, group in enumerate(groups)
            for g, rollout in enumerate(group.rollouts)
        ]
        values = iter(await gather(calls))
        rewards = [[next(values) for _ in group.rollouts] for group in groups]
        return by_turn(groups, rewards, compare=compare, discount=discount)

    label = f"steps({name_of(score)}, {described(advantage, ddof)}, discount={discount:g})"
    return NamedCredit(label, mark)


def by_turn(
    groups: Sequence[Group],
    rewards: Sequence[Sequence[FloatK]],
    *,
    compare: AdvantageFn,
    discount: float,
) -> list[list[Marks]]:
    """Marks from the rewards of each rollout's turns, [turns] each."""
    longest = max((len(one) for row in rewards for one in row), default=0)
    size = max((len(row) for row in rewards), default=0)
    returns_P_K_G = np.zeros((len(groups), longest, size))
    valid_P_K_G = np.zeros(returns_P_K_G.shape, dtype=np.bool_)
    for p, group in enumerate(groups):
        for g, rollout in enumerate(group.rollouts):
            if rollout.failure is None:
                count = len(rewards[p][g])
                returns_P_K_G[p, :count, g] = to_go(rewards[p][g], discount)
                valid_P_K_G[p, :count, g] = True
    rows = len(groups) * longest, size
    flat = compared(compare, returns_P_K_G.reshape(rows), valid_P_K_G.reshape(rows))
    A_P_K_G = flat.reshape(returns_P_K_G.shape)

    def mark(p: int, g: int, rollout: Rollout) -> Marks:
        if rollout.failure is not None or not rollout.trajectory.num_sampled:
            return level(rollout)
        advantages = A_P_K_G[p, turn_of_tokens(rollout.trajectory), g]
        return Marks(advantages, np.ones(len(advantages)))

    return [
        [mark(p, g, rollout) for g, rollout in enumerate(group.rollouts)]
        for p, group in enumerate(groups)
    ]


def to_go(values: FloatK, discount: float) -> FloatK:
    """Of the same length: each value and the discounted ones behind it."""
    added = accumulate(values[::-1], lambda later, now: now + discount * later)
    return np.array(list(added), dtype=np.float64)[::-1]


def check_discount(discount: float) -> None:
    """Raises ConfigError: outside [0, 1]."""
    if not 0 <= discount <= 1:
        raise ConfigError(f"is {discount!r}.", field="discount", hint="From 0 to 1.")


def _given(rollout: Rollout) -> FloatK:
    turns = rollout.trajectory.turns
    given = rollout.trajectory.turn_rewards or (0.0,) * turns
    return _per_turn(given, rollout, "trajectory.turn_rewards")


def _per_turn(values: Any, rollout: Rollout, place: str) -> FloatK:
    turns = rollout.trajectory.turns
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{error}.", field=place, hint="Give floats.") from None
    if array.shape != (turns,):
        raise InvalidRequestError(
            f"has the shape {list(array.shape)}, the rollout {turns} turns.",
            field=place,
            hint="Give one number for each turn, 0 for none.",
        )
    if not np.isfinite(array).all():
        turn = int(np.argmin(np.isfinite(array)))
        hint = "It must be finite."
        raise InvalidRequestError(f"is {array[turn]:g}.", field=f"{place}[{turn}]", hint=hint)
    return array
