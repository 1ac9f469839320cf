"""`Marks`: an advantage and a weight for each sampled token of a rollout, checked before training.

Every credit makes them; `weaver_rl.algorithms.step` checks them, and datums and transcripts read
them. Axis S: the sampled tokens of a rollout, in order, over all of its segments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from weaver import AsyncSamplingClient
from weaver.errors import InvalidRequestError
from weaver_rl.divergences import SoftTargets
from weaver_rl.types import FloatPG, Group, Rollout, Trajectory

__all__ = ["Credit", "Marks"]

FloatS = npt.NDArray[np.float64]
IntS = npt.NDArray[np.int64]
LARGEST = float(np.finfo(np.float32).max)
"""Advantages and weights are at most so large: what is trained on has 32 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """`Marks(advantages=[0.5, 0.5, -0.1], weights=[1, 1, 0])` for a rollout of three tokens."""

    advantages: FloatS
    """[S], in units of reward: above 0 makes the token likelier."""
    weights: FloatS
    """[S], at least 0: the token's share in the loss and in what it is divided by; 0: left out."""
    parts: Mapping[str, FloatS] = field(default_factory=dict)
    """[S] each, by name: the advantages that were added up; logged, and colours of the report."""
    measured: Mapping[str, FloatS] = field(default_factory=dict)
    """[S] each, by a metric's name: what was seen on the way, such as `kl/reference` in nats."""
    soft: tuple[SoftTargets, ...] = ()
    """[S] rows each, by teacher: the reverse KL to it there is added to the loss, of the token's
    weight times that of its row."""


Credit = Callable[[Sequence[Group]], Awaitable[list[list[Marks]]]]
"""Marks for each rollout of each group; those of a failed rollout are not looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class NamedCredit:
    """A credit with a name for people: `NamedCredit("turns(raw, discount=1)", mark)`."""

    label: str
    mark: Credit
    models: tuple[AsyncSamplingClient, ...] = ()
    """Those that score the tokens, and so must have the vocabulary of the one that is trained."""

    @property
    def __name__(self) -> str:
        return self.label

    async def __call__(self, groups: Sequence[Group]) -> list[list[Marks]]:
        return check_marks(await self.mark(groups), groups, source=short_name(self))


def short_name(credit: Credit) -> str:
    """`turns` of `turns(raw, discount=1)`; of a function of the user's, its name."""
    label = str(getattr(credit, "__name__", type(credit).__name__))
    return label.partition("(")[0]


def models_of(*credits: Credit) -> tuple[AsyncSamplingClient, ...]:
    """The models that these credits ask."""
    return tuple(model for credit in credits for model in getattr(credit, "models", ()))


def check_marks(given: Any, groups: Sequence[Group], *, source: str) -> list[list[Marks]]:
    """What a credit answered, as arrays of float64; a failed rollout has no advantage, no weight.

    Raises:
        InvalidRequestError: not a list for each group of `Marks` for each rollout, other lengths
            than the rollout's sampled tokens, NaN, infinity, or a negative weight; names the place.
    """
    checked = []
    for p, (row, group) in enumerate(zip(_listed(given, len(groups), source), groups, strict=True)):
        place = f"{source}[{p}]"
        marks = zip(_listed(row, len(group.rollouts), place), group.rollouts, strict=True)
        checked.append([_checked(one, of, f"{place}[{g}]") for g, (one, of) in enumerate(marks)])
    return checked


def _listed(given: Any, count: int, place: str) -> list[Any]:
    if not isinstance(given, (list, tuple)) or len(given) != count:
        size = f" of {len(given)}" if hasattr(given, "__len__") else ""
        raise InvalidRequestError(
            f"is a {type(given).__name__}{size}, there are {count}.",
            field=place,
            hint="A credit answers a list for each group, with Marks for each of its rollouts.",
        )
    return list(given)


def _checked(marks: Any, rollout: Rollout, place: str) -> Marks:
    count = rollout.trajectory.num_sampled
    if rollout.failure is not None:
        return Marks(np.zeros(count), np.zeros(count))
    if not isinstance(marks, Marks):
        hint = "Give Marks(advantages, weights), one number for each sampled token."
        raise InvalidRequestError(f"is a {type(marks).__name__}.", field=place, hint=hint)

    def numbers(values: Mapping[str, Any]) -> dict[str, FloatS]:
        return {k: _numbers(v, count, f"{place}.{k}") for k, v in values.items()}

    own = numbers({"advantages": marks.advantages, "weights": marks.weights})
    if (own["weights"] < 0).any():
        token = int(np.argmax(own["weights"] < 0))
        raise InvalidRequestError(
            f"is {own['weights'][token]:g}.",
            field=f"{place}.weights[{token}]",
            hint="A weight is at least 0; the sign of a token is that of its advantage.",
        )
    for i, soft in enumerate(marks.soft):
        if len(soft.tokens) != count:
            hint = "Give a row for each sampled token, over all segments of the rollout."
            message = f"has {len(soft.tokens)} rows, the rollout {count} sampled tokens."
            raise InvalidRequestError(message, field=f"{place}.soft[{i}]", hint=hint)
    parts, measured = numbers(marks.parts), numbers(marks.measured)
    return Marks(**own, parts=parts, measured=measured, soft=tuple(marks.soft))


def _numbers(values: Any, count: int, place: str) -> FloatS:
    """Finite numbers, `count` of them.

    Raises:
        InvalidRequestError: others; names the place.
    """
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"holds what is no number: {error}.", field=place, hint="Give floats."
        ) from None
    if array.shape != (count,):
        raise InvalidRequestError(
            f"has the shape {list(array.shape)}, the rollout {count} sampled tokens.",
            field=place,
            hint="Give one number for each sampled token, over all segments of the rollout.",
        )
    wrong = ~(np.abs(array) <= LARGEST)
    if wrong.any():
        token = int(np.argmax(wrong))
        raise InvalidRequestError(
            f"is {array[token]:g}.", field=f"{place}[{token}]", hint="It must be finite."
        )
    return array


def spread(groups: Sequence[Group], advantages_P_G: FloatPG) -> list[list[Marks]]:
    """One advantage for all tokens of a rollout, each of weight 1."""
    return [
        [level(rollout, float(A)) for rollout, A in zip(group.rollouts, A_G, strict=False)]
        for group, A_G in zip(groups, advantages_P_G, strict=True)
    ]


def level(rollout: Rollout, advantage: float = 0.0) -> Marks:
    """The same advantage for every token, of weight 1."""
    count = rollout.trajectory.num_sampled
    return Marks(np.full(count, advantage), np.ones(count))


def turn_of_tokens(trajectory: Trajectory) -> IntS:
    """[S], the turn, from 0, in which each token was sampled.

    Raises:
        InvalidRequestError: a trajectory of several turns does not say how long each is.
    """
    lengths = trajectory.reply_lengths
    if not lengths and trajectory.turns <= 1:
        lengths = (trajectory.num_sampled,)
    if len(lengths) != max(trajectory.turns, 1) or sum(lengths) != trajectory.num_sampled:
        raise InvalidRequestError(
            f"is {lengths}: {trajectory.turns} turns of {trajectory.num_sampled} sampled tokens.",
            field="trajectory.reply_lengths",
            hint="Give the sampled tokens of each turn; an Agent records them.",
        )
    return np.repeat(np.arange(len(lengths)), lengths)
