"""Rewards: any sync or async callable of `(task, reply)` that returns a float or a `Score`.

`scorer` turns one into what environments call: sync ones run off the event loop, all have a
time-out, and what raises, hangs or is not a finite number becomes a `Failure`, never a zero.
`weighted` composes them, `group_reward` marks one that looks at all samples of a task together, and
`judge` asks a language model.
"""

from __future__ import annotations

import inspect
import numbers
import os
import pickle
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.from_thread
import anyio.to_process
import numpy as np
from anyio.lowlevel import current_token

from weaver.errors import ConfigError
from weaver.threads import in_daemon_thread
from weaver.types import SamplingParams
from weaver_rl.agent import Agent
from weaver_rl.boundary import attempt, attempt_async
from weaver_rl.gather import gather
from weaver_rl.types import Failure, Place, Reply, Score, Task

if TYPE_CHECKING:
    from weaver import AsyncSamplingClient
    from weaver_rl.agent import Prompt

Value = float | Score
Reward = Callable[[Task, Reply], Value | Awaitable[Value]]
GroupFunction = Callable[[Task, Sequence[Reply]], Sequence[Value] | Awaitable[Sequence[Value]]]
Scorer = Callable[[Task, Sequence[Reply]], Awaitable[list[Score | Failure]]]
T = TypeVar("T")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class GroupReward:
    """A reward of all replies to one task: `GroupReward(rank_by_length)`; see `group_reward`."""

    function: GroupFunction


def group_reward(function: GroupFunction) -> GroupReward:
    """Marks a callable of `(task, replies)` that returns one value for each reply; a decorator."""
    return GroupReward(function)


def weighted(rewards: Mapping[Reward, float]) -> Reward:
    """The weighted sum of rewards, each logged under its function's name.

    `weighted({exact: 1.0, brevity: 0.1})`. Async if one of them is.
    """
    names = [name_of(reward) for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise ConfigError(f"is {names}.", field="rewards", hint="Give functions of distinct names.")
    parts = list(zip(names, rewards, rewards.values(), strict=True))

    def total(values: Sequence[Score]) -> Score:
        metrics: dict[str, float] = {}
        for (name, _, _), score in zip(parts, values, strict=True):
            metrics |= {name: score.reward, **score.metrics}
        return Score(sum(w * s.reward for (_, _, w), s in zip(parts, values, strict=True)), metrics)

    def sync_sum(task: Task, reply: Reply) -> Score:
        return total([as_score(reward(task, reply), name) for name, reward, _ in parts])

    async def async_sum(task: Task, reply: Reply) -> Score:
        values = []
        for name, reward, _ in parts:
            if is_async(reward):
                value = await reward(task, reply)  # type: ignore[misc]  # is_async says so
            else:
                value = await in_daemon_thread(partial(reward, task, reply))
            values.append(as_score(value, name))
        return total(values)

    return async_sum if any(map(is_async, rewards)) else sync_sum


def judge(
    sampler: AsyncSamplingClient,
    question: Callable[[Task, Reply], Prompt],
    *,
    read: Callable[[str], float] | None = None,
    sampling: SamplingParams | None = None,
) -> Reward:
    """A reward that asks another model.

    Args:
        question: makes the judge's prompt: a text, or chat messages.
        read: turns its answer into the reward; by default the last number in it. What it raises
            makes the rollout fail.
        sampling: greedy, 64 tokens by default.
    """
    params = sampling or SamplingParams(max_tokens=64, temperature=0.0)
    parse = read or last_number

    async def judged(task: Task, reply: Reply) -> float:
        agent = Agent(
            sampler, await sampler.get_tokenizer(), sampling=params, seed=params.seed or 0
        )
        answer = await agent.respond(question(task, reply))
        return parse(answer.text)

    return judged


def last_number(text: str) -> float:
    """Raises ValueError: there is no number in it."""
    numbers = NUMBER.findall(text)
    if not numbers:
        raise ValueError(f"the judge gave no number: {text!r}")
    return float(numbers[-1])


def scorer(reward: Reward | GroupReward, *, timeout_s: float = 30.0, processes: int = 0) -> Scorer:
    """What scores the replies to a task concurrently; one `Score` or `Failure` for each.

    Args:
        timeout_s: for each call, from when it begins to run. A sync one that hangs keeps its
            thread, but nothing waits for it; in a process it is killed.
        processes: at most so many worker processes for a CPU-heavy sync reward, which must be
            importable (a function of a module, not a lambda); 0: threads.

    Raises:
        ConfigError: not callable, or an async reward with processes.
    """
    grouped = isinstance(reward, GroupReward)
    function: Callable[..., Any] = reward.function if isinstance(reward, GroupReward) else reward
    if not callable(function):
        raise ConfigError(
            f"is {function!r}.", field="reward", hint="Pass a function of (task, reply)."
        )
    asynchronous = is_async(function)
    if asynchronous and processes:
        raise ConfigError("an async reward has no use for processes.", field="processes")
    if processes:
        _check_importable(function)
    places = processes or 4 * (os.cpu_count() or 1)
    # Of each event loop its own: one of asyncio cannot serve trio.
    limiters: WeakKeyDictionary[object, anyio.CapacityLimiter] = WeakKeyDictionary()

    async def run(task: Task, argument: Reply | Sequence[Reply]) -> Any:
        if asynchronous:
            return await attempt_async(partial(function, task, argument), "reward")
        if processes:
            call = partial(attempt, partial(function, dict(task), argument), "reward")
            limiter = anyio.CapacityLimiter(1)  # `timed` counts the places
            return await anyio.to_process.run_sync(call, cancellable=True, limiter=limiter)
        return await in_daemon_thread(partial(attempt, partial(function, task, argument), "reward"))

    async def timed(task: Task, argument: Reply | Sequence[Reply]) -> Any:
        limiter = anyio.CapacityLimiter(places)
        async with limiters.setdefault(current_token().native_token, limiter):
            # The time runs from when it has a place.
            with anyio.move_on_after(timeout_s):
                return await run(task, argument)
        name = name_of(function)
        return Failure("reward", "timeout", f"{name} did not return within {timeout_s:g} s.")

    async def score(task: Task, replies: Sequence[Reply]) -> list[Score | Failure]:
        if grouped:
            return _as_list(await timed(task, replies), len(replies), name_of(function))
        values = await gather([partial(timed, task, reply) for reply in replies])
        return [checked(value, name_of(function)) for value in values]

    return score


def checked(value: object, source: str, *, where: Place = "reward") -> Score | Failure:
    """A returned value as a `Score`, or the `Failure` that it is."""
    if isinstance(value, Failure):
        return value
    try:
        return as_score(value, source)
    except (TypeError, ValueError) as error:
        return Failure(where, "bad_value", str(error))


def as_score(value: object, source: str) -> Score:
    """A number or a `Score` of finite numbers as a `Score`.

    Raises:
        TypeError, ValueError: None, text, NaN ...; names `source`.
    """
    score = value if isinstance(value, Score) else Score(value)  # type: ignore[arg-type]
    for name, number in (("reward", score.reward), *score.metrics.items()):
        if not isinstance(number, (numbers.Real, np.bool_)):
            raise TypeError(
                f"{source} gave {number!r} as {name}: a reward is a float or a Score of floats."
            )
        if not np.isfinite(float(number)):
            raise ValueError(f"{source} gave {number} as {name}: it must be finite.")
    return Score(float(score.reward), {k: float(v) for k, v in score.metrics.items()})


def is_async(function: object) -> bool:
    """Whether calling it gives an awaitable: an async function, object or partial of one."""
    if isinstance(function, partial):
        return is_async(function.func)
    return inspect.iscoroutinefunction(function) or (
        callable(function) and inspect.iscoroutinefunction(type(function).__call__)
    )


def _check_importable(function: object) -> None:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"cannot be sent to a process: {error}",
            field="reward",
            hint="Define it with def in a module, or leave processes at 0.",
        ) from None


def _as_list(values: object, count: int, source: str) -> list[Score | Failure]:
    if isinstance(values, Failure):
        return [values] * count
    if not isinstance(values, (Sequence, np.ndarray)) or len(values) != count:
        message = f"{source} gave {values!r}: it must give one value for each of {count} replies."
        return [Failure("reward", "bad_value", message)] * count
    return [checked(value, source) for value in values]


def name_of(function: object) -> str:
    """Of a function, an object that is called, a partial or a group reward, for people."""
    if isinstance(function, partial):
        return name_of(function.func)
    if isinstance(function, GroupReward):
        return name_of(function.function)
    return str(getattr(function, "__name__", type(function).__name__))
