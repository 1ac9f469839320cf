"""Tasks and scores of the `reasoning-gym` package (the extra `tasks`), kept on a lead.

Its scorers run behind `rewards.scorer`, whose time-out and boundary catch those that hang or raise.
Left out: `game_of_life_halting`, whose scorer pays for any answer (seen in 0.1.25).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weaver.errors import ConfigError, nearest, requiring
from weaver_rl.types import Reply, Task

REFUSED = frozenset({"game_of_life_halting"})


def reasoning_gym_tasks(name: str, count: int, *, seed: int = 0) -> list[Task]:
    """Tasks of a generator: `{"prompt": ..., "answer": ..., "dataset": name, "entry": ...}`.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
        ConfigError: no generator has that name, or it is refused.
    """
    _check(name)
    dataset = _package().create_dataset(name, size=count, seed=seed)
    return [
        {
            "prompt": entry["question"],
            "answer": str(entry["answer"]),
            "dataset": name,
            "entry": entry,
        }
        for entry in dataset
    ]


def reasoning_gym_reward(
    *, read: Callable[[str], str] = str.strip
) -> Callable[[Task, Reply], float]:
    """The package's own score of a reply, from 0 to 1; `read` finds the answer in its text.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
    """
    package = _package()
    scorers: dict[str, Callable[..., Any]] = {}

    def reward(task: Task, reply: Reply) -> float:
        name = task["dataset"]
        _check(name)
        if name not in scorers:
            scorers[name] = package.get_score_answer_fn(name)
        return float(scorers[name](answer=read(reply.text), entry=task["entry"]))

    return reward


def _check(name: str) -> None:
    if name in REFUSED:
        raise ConfigError(
            f"{name} pays for any answer.", field="dataset", hint="Choose another generator."
        )
    known = _package().factory.DATASETS
    if name not in known:
        raise ConfigError(
            f"reasoning-gym has no {name!r}.", field="dataset", hint=nearest(name, known)
        )


def _package() -> Any:
    with requiring("these tasks", "tasks"):
        import reasoning_gym
    return reasoning_gym
