"""Which tasks come next: small functions of what was played so far. Plans take one.

`Plan(curriculum=curriculum.mixing({"easy": 1, "hard": 3}, within=curriculum.by_pass_rate()))`. A
curriculum is pure: it gets the progress, how many tasks are wanted and a generator that follows
from seed, step and round, and answers indices. So the progress is the whole state; the loops keep
it in their checkpoints (`Picker`), and a run that goes on chooses what it would have chosen.

Axis N: the tasks of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weaver.errors import ConfigError, InvalidRequestError, nearest
from weaver_rl.data import TaskStream
from weaver_rl.guard import name_of
from weaver_rl.types import Group, Task

__all__ = ["by_pass_rate", "joined", "mixing", "shuffled"]

IntN = npt.NDArray[np.int64]
PASSING = 1.0
"""The reward from which a rollout counts as passed."""


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """What a curriculum sees: of each task how often it came, and how its last group did. [N]"""

    tasks: Sequence[Task]
    taken: IntN
    """How often it was chosen."""
    played: IntN
    """Rollouts of its last group that have a reward; 0 where none was played yet."""
    passed: IntN
    """Those of them with a reward of at least 1."""

    @classmethod
    def fresh(cls, tasks: Sequence[Task]) -> Progress:
        zeros = np.zeros((3, len(tasks)), dtype=np.int64)
        return cls(tasks, *zeros)

    def of(self, indices: IntN) -> Progress:
        """That of some tasks alone."""
        tasks = [self.tasks[i] for i in indices]
        return Progress(tasks, self.taken[indices], self.played[indices], self.passed[indices])


Curriculum = Callable[[Progress, int, np.random.Generator], Sequence[int] | IntN]
"""`count` indices of tasks, from 0."""


def joined(sets: Mapping[str, Sequence[Task]]) -> list[Task]:
    """The tasks of several data sets, each with the name of its own as its field `dataset`.

    Raises:
        InvalidRequestError: a task says that it is of another.
    """
    made: list[Task] = []
    for name, tasks in sets.items():
        for i, task in enumerate(tasks):
            if task.get("dataset", name) != name:
                raise InvalidRequestError(
                    f"is {task['dataset']!r}.", field=f"{name}[{i}].dataset", hint="Rename it."
                )
            made.append({**task, "dataset": name})
    return made


def shuffled() -> Curriculum:
    """Those that came least, in a random order: each once before any comes again."""

    def choose(progress: Progress, count: int, rng: np.random.Generator) -> IntN:
        taken = progress.taken.copy()
        chosen: list[int] = []
        while len(chosen) < count:
            ranked = np.lexsort((rng.random(len(taken)), taken))
            for index in ranked[: count - len(chosen)].tolist():
                chosen.append(index)
                taken[index] += 1
        return np.array(chosen, dtype=np.int64)

    choose.__name__ = "shuffled"
    return choose


def by_pass_rate(*, explore: float = 0.1) -> Curriculum:
    """Tasks at the frontier: drawn by p·(1 − p), p = (passed + 1) / (played + 2) of the last group.

    That is the variance of a reward of 0 or 1, highest where half of the replies pass, and what a
    group teaches (Foster and Foerster, arXiv:2502.12272). A task that was never played has p = ½.

    Args:
        explore: the share of draws that is uniform, so that what was too hard is tried again.

    Raises:
        ConfigError: `explore` is outside [0, 1].
    """
    if not 0 <= explore <= 1:
        raise ConfigError(f"is {explore!r}.", field="explore", hint="From 0 to 1.")

    def choose(progress: Progress, count: int, rng: np.random.Generator) -> IntN:
        p = (progress.passed + 1) / (progress.played + 2)
        learnable = p * (1 - p)
        chances = (1 - explore) * learnable / learnable.sum() + explore / len(p)
        chosen: list[int] = []
        while len(chosen) < count:  # without replacement, as far as the tasks go
            size = min(count - len(chosen), int((chances > 0).sum()))
            chosen += rng.choice(len(p), size=size, replace=False, p=chances).tolist()
        return np.array(chosen, dtype=np.int64)

    choose.__name__ = f"by_pass_rate(explore={explore:g})"
    return choose


def mixing(weights: Mapping[str, float], *, within: Curriculum | None = None) -> Curriculum:
    """Tasks of several data sets in these proportions: each slot goes to the one furthest behind.

    A task says in its field `dataset` of which it is. So the shares are exact over the run, to one
    task, whatever the sizes of the data sets.

    Args:
        weights: by data set, at least 0; their sum is arbitrary.
        within: chooses among the tasks of one; `shuffled()` by default.

    Raises:
        ConfigError: at construction, a weight; when called, a task of another data set, or a data
            set without tasks.
    """
    if not weights or not all(0 <= one < float("inf") for one in weights.values()):
        raise ConfigError(f"is {dict(weights)}.", field="weights", hint="Numbers from 0 up.")
    if not sum(weights.values()):
        raise ConfigError("are all 0.", field="weights", hint="Give one above 0.")
    inner = within or shuffled()
    names = list(weights)
    shares = np.array([weights[name] for name in names]) / sum(weights.values())

    def choose(progress: Progress, count: int, rng: np.random.Generator) -> IntN:
        parts = _by_dataset(progress.tasks, names, shares)
        taken = np.array([progress.taken[part].sum() for part in parts], dtype=np.float64)
        counts = np.zeros(len(names), dtype=np.int64)
        for _ in range(count):
            behind = np.where(shares > 0, shares * (taken.sum() + 1) - taken, -np.inf)
            first = int(np.argmax(behind))
            counts[first] += 1
            taken[first] += 1
        chosen = [
            part[
                _checked(inner(progress.of(part), int(wanted), rng), int(wanted), len(part), inner)
            ]
            for part, wanted in zip(parts, counts, strict=True)
            if wanted
        ]
        return rng.permutation(np.concatenate(chosen))

    listed = ", ".join(f"{name}={share:g}" for name, share in weights.items())
    choose.__name__ = f"mixing({listed}, within={name_of(inner)})"
    return choose


def _by_dataset(
    tasks: Sequence[Task], names: Sequence[str], shares: npt.NDArray[np.float64]
) -> list[IntN]:
    of: dict[str, list[int]] = {name: [] for name in names}
    for i, task in enumerate(tasks):
        name = task.get("dataset")
        if name not in of:
            raise ConfigError(
                f"is {name!r}, which has no weight.",
                field=f"tasks[{i}].dataset",
                hint=nearest(str(name), of),
            )
        of[name].append(i)
    for name, share in zip(names, shares, strict=True):
        if share and not of[name]:
            raise ConfigError(
                "has a weight and no tasks.", field=f"weights.{name}", hint="Give some, or 0."
            )
    return [np.array(of[name], dtype=np.int64) for name in names]


def _checked(given: Any, count: int, size: int, curriculum: Curriculum) -> IntN:
    """
    Raises:
        InvalidRequestError: not `count` indices below `size`.
    """
    try:
        indices = np.asarray(given)
    except ValueError:
        indices = np.zeros(0)
    whole = indices.shape == (count,) and np.issubdtype(indices.dtype, np.integer)
    if not whole or (count and not (0 <= indices.min() and indices.max() < size)):
        raise InvalidRequestError(
            f"{name_of(curriculum)} gave {str(given)[:200]}.",
            field="curriculum",
            hint=f"It must answer {count} indices from 0 to {size - 1}.",
        )
    return indices.astype(np.int64)


Outcome = tuple[int, int, int]
"""Of a group: its task's index, its rollouts that have a reward, and those that passed."""


def outcomes(indices: Sequence[int], groups: Sequence[Group]) -> tuple[Outcome, ...]:
    """Of groups that were chosen by these indices."""
    pairs = [(i, group.rewards) for i, group in zip(indices, groups, strict=True)]
    return tuple((i, len(rs), sum(reward >= PASSING for reward in rs)) for i, rs in pairs)


@dataclass(slots=True)
class Picked:
    """The tasks of one step, round by round, chosen by what was known when it began."""

    progress: Progress
    indices: list[int] = field(default_factory=list)


class Picker:
    """The tasks of each step: each once in a shuffled order, or by a curriculum. For the pipeline.

    Steps begin in order, and what came of them is learned in order; so what is chosen follows from
    the seed, whichever rollout was faster.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        curriculum: Curriculum | None,
        *,
        seed: int,
        count: int,
        state: Mapping[str, Any],
    ) -> None:
        """
        Args:
            count: tasks of a step.
            state: what `state()` gave, after a journey through JSON; {} at the start.
        """
        self._tasks = tasks
        self._curriculum = curriculum
        self._seed = seed
        self._count = count
        self._epochs = TaskStream(tasks, seed=seed)
        self._progress = Progress.fresh(tasks)
        for index, (taken, played, passed) in state.items():
            row = int(index)
            self._progress.taken[row] = taken
            self._progress.played[row] = played
            self._progress.passed[row] = passed

    def begin(self, step: int) -> tuple[Picked, list[Task]]:
        """The first tasks of a step, from 0; call it once for each, in order.

        Raises:
            ConfigError, InvalidRequestError: the curriculum does not fit the tasks.
        """
        if self._curriculum is None:
            self._epochs.position = step * self._count
            return Picked(self._progress), self._epochs.take(self._count)
        now = self._progress
        picked = Picked(replace(now, taken=now.taken.copy(), played=now.played.copy(),
                                passed=now.passed.copy()))  # fmt: skip
        tasks = self._choose(picked, self._count, seed=[self._seed, step, 0])
        np.add.at(now.taken, picked.indices, 1)
        return picked, tasks

    def more(self, picked: Picked, count: int, *, step: int, number: int, seed: int) -> list[Task]:
        """`count` others for the same step, in round `number`; `seed` is that of the round."""
        if self._curriculum is None:
            # Whole steps are drawn, so that what is drawn does not depend on how many are missing.
            return TaskStream(self._tasks, seed=seed).take(self._count)[:count]
        return self._choose(picked, count, seed=[self._seed, step, number])

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """What came of a step's groups, in the order in which they were chosen; steps in order."""
        for i, (index, played, passed) in enumerate(outcomes):
            if i >= self._count:  # the first were counted when they were chosen
                self._progress.taken[index] += 1
            self._progress.played[index] = played
            self._progress.passed[index] = passed

    def state(self) -> dict[str, list[int]]:
        """By index of the tasks that came: how often, rollouts of the last group, those passed."""
        now = self._progress
        rows = np.stack([now.taken, now.played, now.passed], axis=1)
        return {str(i): rows[i].tolist() for i in np.flatnonzero(now.taken).tolist()}

    def _choose(self, picked: Picked, count: int, *, seed: Sequence[int]) -> list[Task]:
        assert self._curriculum is not None
        rng = np.random.default_rng(list(seed))
        given = self._curriculum(picked.progress, count, rng)
        indices = _checked(given, count, len(self._tasks), self._curriculum)
        np.add.at(picked.progress.taken, indices, 1)
        picked.indices += indices.tolist()
        return [self._tasks[i] for i in indices]
