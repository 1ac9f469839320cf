"""`total`, `unless` and `whitened`: credits made of credits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from weaver.errors import ConfigError
from weaver_rl.advantages import EPSILON
from weaver_rl.credit.marks import (
    Credit,
    FloatS,
    Marks,
    NamedCredit,
    check_marks,
    models_of,
    short_name,
)
from weaver_rl.guard import gather, is_async, name_of
from weaver_rl.types import Group, Rollout


def total(*credits: Credit) -> NamedCredit:
    """The sum: each token's loss is the sum of what it would be with each credit alone.

    Each is logged as `credit/<name>/mean` and `/mean_abs` and is a colour of the report; the second
    of a name becomes `name_2`. A token's weight is the largest that one gives it, and an advantage
    counts as much as its own weight says.

    Raises:
        ConfigError: no credits, or what is no async function.
    """
    if not credits:
        raise ConfigError("has none.", field="credits", hint="Give at least one credit.")
    check_credits(*credits)
    names: list[str] = []
    seen: Counter[str] = Counter()
    for credit in credits:
        name = short_name(credit)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        made = await gather([partial(credit, groups) for credit in credits])
        checked = [
            check_marks(one, groups, source=name) for one, name in zip(made, names, strict=True)
        ]
        return [
            [
                _added({name: one[p][g] for name, one in zip(names, checked, strict=True)})
                for g in range(len(group.rollouts))
            ]
            for p, group in enumerate(groups)
        ]

    return NamedCredit(f"total({_labels(credits)})", mark, models_of(*credits))


def _added(marks: Mapping[str, Marks]) -> Marks:
    weights: FloatS = np.max([one.weights for one in marks.values()], axis=0)
    summed: FloatS = np.sum([one.weights * one.advantages for one in marks.values()], axis=0)
    parts: dict[str, FloatS] = {}
    measured: dict[str, FloatS] = {}
    for name, one in marks.items():
        parts |= one.parts or {name: one.advantages}
        measured |= one.measured

    def share(of: FloatS) -> FloatS:
        return np.divide(of, weights, out=np.zeros_like(of), where=weights > 0)

    soft = [
        replace(soft, weights=share(soft.weights * one.weights))
        for one in marks.values()
        for soft in one.soft
    ]
    return Marks(share(summed), weights, parts, measured, tuple(soft))


def truncated(rollout: Rollout) -> bool:
    """Whether max_tokens, or the context, cut its last reply off."""
    return rollout.trajectory.stop_reason == "length"


def unless(when: Callable[[Rollout], bool], credit: Credit) -> NamedCredit:
    """`credit`, but rollouts of which `when` is true teach nothing: `unless(truncated, outcome())`.

    They still stand in the baselines of the others. The overlong filter of DAPO (Yu et al.,
    arXiv:2503.14476, section 3.4) for `truncated`.

    Raises:
        ConfigError: `when` is no function of a rollout that answers at once, or no credit is given.
    """
    if not callable(when) or is_async(when):
        hint = "Give a function of a rollout, such as rl.credit.truncated."
        raise ConfigError(f"is {when!r}.", field="when", hint=hint)
    check_credits(credit)

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        made = check_marks(await credit(groups), groups, source=short_name(credit))
        return [
            [_unless(one, rollout) for one, rollout in zip(row, group.rollouts, strict=True)]
            for row, group in zip(made, groups, strict=True)
        ]

    def _unless(marks: Marks, rollout: Rollout) -> Marks:
        counts = 0.0 if when(rollout) else 1.0
        return replace(marks, weights=marks.weights * counts)

    label = f"unless({name_of(when)}, {_labels([credit])})"
    return NamedCredit(label, mark, models_of(credit))


def whitened(
    credit: Credit, *, over: Literal["batch", "group"] = "batch", ddof: Literal[0, 1] = 0
) -> NamedCredit:
    """(A − mean) / (std + ε) of another credit's advantages, over all tokens that count.

    REINFORCE++ (Hu, arXiv:2501.03262, eq. 5) standardises over the batch, the KL in the reward
    included: `whitened(total(outcome("raw"), kl(reference, beta=0.01)))`.

    Args:
        over: the batch, or each group for itself.
        ddof: of the standard deviation, as numpy's.

    Raises:
        ConfigError: at construction; names the argument.
    """
    check_credits(credit)
    if over not in ("batch", "group"):
        raise ConfigError(f"is {over!r}.", field="over", hint="batch or group.")
    if ddof not in (0, 1):
        raise ConfigError(f"is {ddof!r}.", field="ddof", hint="0 divides by n, 1 by n − 1.")

    async def mark(groups: Sequence[Group]) -> list[list[Marks]]:
        made = check_marks(await credit(groups), groups, source=short_name(credit))
        if over == "group":
            return [_whitened([row], ddof)[0] for row in made]
        return _whitened(made, ddof)

    detail = f", ddof={ddof}" if ddof else ""
    label = f"whitened({_labels([credit])}, {over}{detail})"
    return NamedCredit(label, mark, models_of(credit))


def _whitened(made: Sequence[Sequence[Marks]], ddof: int) -> list[list[Marks]]:
    counted = [one.advantages[one.weights > 0] for row in made for one in row]
    values = np.concatenate(counted) if counted else np.zeros(0)
    if len(values) <= ddof:
        mean, scale = 0.0, 0.0
    else:
        mean, scale = float(values.mean()), 1 / (float(values.std(ddof=ddof)) + EPSILON)
    return [[replace(m, advantages=(m.advantages - mean) * scale) for m in row] for row in made]


def check_credits(*credits: Credit) -> None:
    """Raises ConfigError: one is no async function."""
    for credit in credits:
        if not is_async(credit):
            raise ConfigError(
                f"{credit!r} is no async function.",
                field="credit",
                hint="Use rl.credit.outcome() and its like, or write `async def credit(groups)`.",
            )


def _labels(credits: Sequence[Credit]) -> str:
    return ", ".join(map(name_of, credits))
