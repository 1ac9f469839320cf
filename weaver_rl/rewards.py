"""Rewards: any sync or async callable of `(task, reply)` that returns a float or a `Score`.

`scorer` turns one into what environments call: sync ones run off the event loop, all have a
time-out, and what raises, hangs or is not a finite number becomes a `Failure`, never a zero.
`weighted` composes them, `group_reward` marks one that looks at all samples of a task together, and
`judge` asks a language model.
"""

from __future__ import annotations

import copy
import inspect
import numbers
import os
import pickle
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.to_process
import numpy as np
from anyio.lowlevel import current_token

from weaver import AsyncSamplingClient
from weaver.errors import ConfigError
from weaver.threads import in_daemon_thread
from weaver.types import SamplingParams
from weaver_rl import clock
from weaver_rl.agent import Agent, Prompt
from weaver_rl.guard import attempt, attempt_async, call_pickled, gather, is_async, name_of
from weaver_rl.serving import sampler_of
from weaver_rl.types import Failure, Place, Reply, Score, Task

__all__ = ["GroupReward", "Reward", "group_reward", "judge", "weighted"]

Value = float | Score
Reward = Callable[[Task, Reply], Value | Awaitable[Value]]
GroupFunction = Callable[[Task, Sequence[Reply]], Sequence[Value] | Awaitable[Sequence[Value]]]
Scorer = Callable[[Task, Sequence[Reply]], Awaitable[list[Score | Failure]]]
T = TypeVar("T")
LARGEST = float(np.finfo(np.float32).max)
"""Rewards are at most so large: what is trained on has 32 bits."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class GroupReward:
    """A reward of all replies to one task: `GroupReward(rank_by_length)`; see `group_reward`."""

    function: GroupFunction

    @property
    def __name__(self) -> str:
        return name_of(self.function)


def group_reward(function: GroupFunction) -> GroupReward:
    """Marks a callable of `(task, replies)` that returns one value for each reply; a decorator."""
    return GroupReward(function)


def weighted(rewards: Mapping[Reward, float]) -> Reward:
    """The weighted sum of rewards, each logged under its function's name.

    `weighted({exact: 1.0, brevity: 0.1})`. It answers an awaitable if one of them does.
    """
    names = [name_of(reward) for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise ConfigError(f"is {names}.", field="rewards", hint="Give functions of distinct names.")
    parts = dict(rewards)

    def total(values: Sequence[Any]) -> Score:
        scores = [as_score(value, name) for name, value in zip(names, values, strict=True)]
        metrics: dict[str, float] = {}
        for name, score in zip(names, scores, strict=True):
            metrics |= {name: score.reward, **score.metrics}
        weights = parts.values()
        return Score(sum(w * s.reward for w, s in zip(weights, scores, strict=True)), metrics)

    async def finish(values: Sequence[Any]) -> Score:
        return total([await v if inspect.isawaitable(v) else v for v in values])

    def weigh(task: Task, reply: Reply) -> Score | Awaitable[Score]:
        values: list[Any] = []
        with ExitStack() as unused:  # where a later one raises
            for reward in parts:
                values.append(reward(task, reply))
                if inspect.iscoroutine(values[-1]):
                    unused.callback(values[-1].close)
            unused.pop_all()
        return finish(values) if any(map(inspect.isawaitable, values)) else total(values)

    return weigh


def judge(
    model: AsyncSamplingClient | str,
    question: Callable[[Task, Reply], Prompt],
    *,
    read: Callable[[str], float] | None = None,
    sampling: SamplingParams | None = None,
) -> Reward:
    """A reward that asks another model.

    Args:
        model: its sampler; inside `rl.train` the name of a base model or a `weaver://` path as
            well, which is opened on the run's own service.
        question: makes the judge's prompt: a text, or chat messages.
        read: turns its answer into the reward; by default the last number in it. What it raises
            makes the rollout fail.
        sampling: greedy, 64 tokens by default.
    """
    params = sampling or SamplingParams(max_tokens=64, temperature=0.0)
    parse = read or last_number

    async def judged(task: Task, reply: Reply) -> float:
        sampler = await sampler_of(model) if isinstance(model, str) else model
        tokenizer = await sampler.get_tokenizer()
        agent = Agent(sampler, tokenizer, sampling=params, seed=params.seed or 0)
        answer = await agent.respond(question(task, reply))
        return parse(answer.text)

    return judged


def last_number(text: str) -> float:
    """Raises ValueError: there is no number in it."""
    numbers = NUMBER.findall(text)
    if not numbers:
        raise ValueError(f"the judge gave no number: {text!r}")
    return float(numbers[-1])


def scorer(
    reward: Reward | GroupReward,
    *,
    timeout_s: float = 30.0,
    processes: int = 0,
    concurrency: int = 256,
) -> Scorer:
    """What scores the replies to a task concurrently; one `Score` or `Failure` for each.

    Each call gets a copy of the task of its own, and what it answers is awaited if it can be.

    Args:
        timeout_s: for each call, from when it begins to run. A sync one that hangs keeps its
            thread, but nothing waits for it; in a process it is killed.
        processes: at most so many worker processes for a CPU-heavy sync reward, which must be
            importable (a function of a module, not a lambda); 0: threads, four a processor.
        concurrency: at most so many async calls wait at the same time.

    Raises:
        ConfigError: not callable, an async reward with processes, or a concurrency below 1.
    """
    grouped = isinstance(reward, GroupReward)
    function: Callable[..., Any] = reward.function if isinstance(reward, GroupReward) else reward
    _check_callable(function, processes=processes, concurrency=concurrency)
    asynchronous = is_async(function)
    name = name_of(function)
    # Of each event loop its own: one of asyncio cannot serve trio.
    limiters: WeakKeyDictionary[object, tuple[anyio.CapacityLimiter, anyio.CapacityLimiter]]
    limiters = WeakKeyDictionary()

    async def timed(call: Callable[[], Awaitable[Any]], limiter: anyio.CapacityLimiter) -> Any:
        async with limiter:
            # The time runs from when it has a place.
            with clock.timed("reward"), anyio.move_on_after(timeout_s):
                return await call()
        return Failure("reward", "timeout", f"{name} did not return within {timeout_s:g} s.")

    async def run(task: Task, argument: Reply | Sequence[Reply]) -> Any:
        places = processes or 4 * (os.cpu_count() or 1)
        new = anyio.CapacityLimiter(places), anyio.CapacityLimiter(concurrency)
        working, waiting = limiters.setdefault(current_token().native_token, new)
        call = partial(_with_copy, function, task, argument)
        if not asynchronous:
            work = partial(attempt, call, "reward")
            begin = partial(_in_process, name=name) if processes else in_daemon_thread
            value = await timed(partial(begin, work), working)
            if not inspect.isawaitable(value):
                return value
            call = partial(_same, value)
        return await timed(partial(attempt_async, call, "reward"), waiting)

    async def score(task: Task, replies: Sequence[Reply]) -> list[Score | Failure]:
        if grouped:
            return scores_of(await run(task, replies), len(replies), name)
        values = await gather([partial(run, task, reply) for reply in replies])
        return [checked(value, name) for value in values]

    return score


def copy_of(task: Task) -> Task:
    """A task that user code may change; what cannot be copied in it is shared."""
    copied = attempt(partial(copy.deepcopy, task), "reward")
    return dict(task) if isinstance(copied, Failure) else copied


def _with_copy(function: Callable[..., Any], task: Task, argument: object) -> Any:
    return function(copy_of(task), argument)


def _same(value: T) -> T:
    return value


async def _in_process(work: Callable[[], Any], *, name: str) -> Any:
    async def run() -> Any:
        pickled = partial(call_pickled, pickle.dumps(work))
        limiter = anyio.CapacityLimiter(1)  # `timed` counts the places
        try:
            return await anyio.to_process.run_sync(pickled, cancellable=True, limiter=limiter)
        except anyio.BrokenWorkerProcess as error:
            raise ChildProcessError(
                f"the worker process of {name} ended: a crash, a kill, or no memory."
            ) from error

    return await attempt_async(run, "reward")


def checked(value: object, source: str, *, where: Place = "reward") -> Score | Failure:
    """A returned value as a `Score`, or the `Failure` that it is."""
    if isinstance(value, Failure):
        return value
    try:
        return as_score(value, source)
    except (TypeError, ValueError) as error:
        return Failure(where, "bad_value", str(error))


def scores_of(
    values: object, count: int, source: str, *, where: Place = "reward"
) -> list[Score | Failure]:
    """What was given for a group of `count`, one for each; a `Failure` of it all is everybody's."""
    if isinstance(values, Failure):
        return [values] * count
    unordered = isinstance(values, (str, bytes, Mapping, Set))
    listed = attempt(lambda: list(islice(values, count + 1)), where)  # type: ignore[call-overload]
    if unordered or isinstance(listed, Failure) or len(listed) != count:
        message = f"{source} gave {_shown(values)}: it must give one value for each of"
        return [Failure(where, "bad_value", f"{message} {count} replies.")] * count
    return [checked(value, source, where=where) for value in listed]


def as_score(value: object, source: str) -> Score:
    """A number or a `Score` of finite numbers as a `Score`.

    Raises:
        TypeError, ValueError: None, text, NaN ...; names `source`.
    """
    score = value if isinstance(value, Score) else Score(value)  # type: ignore[arg-type]
    if not isinstance(score.metrics, Mapping):
        raise TypeError(f"{source} gave {_shown(score.metrics)} as metrics: a mapping is needed.")
    metrics = {str(k): _as_float(v, source, str(k)) for k, v in score.metrics.items()}
    return Score(_as_float(score.reward, source, "reward"), metrics)


def _as_float(value: Any, source: str, name: str) -> float:
    gave = f"{source} gave {_shown(value)} as {name}"
    try:
        number = value.item() if hasattr(value, "item") else value  # an array or tensor of one
        if not isinstance(number, (numbers.Real, Decimal)):
            raise TypeError("it is no number")
        found = float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{gave}: a reward is a float or a Score of floats ({error}).") from None
    if not abs(found) <= LARGEST:
        raise ValueError(f"{gave}: it must be finite, in 32 bits too.")
    return found


def _shown(value: object) -> str:
    text = attempt(partial(repr, value), "reward")
    return type(value).__name__ if isinstance(text, Failure) else text[:200]


def _check_callable(function: object, *, processes: int, concurrency: int) -> None:
    if not callable(function):
        raise ConfigError(
            f"is {function!r}.", field="reward", hint="Pass a function of (task, reply)."
        )
    if is_async(function) and processes:
        raise ConfigError("an async reward has no use for processes.", field="processes")
    if concurrency < 1:
        raise ConfigError(f"is {concurrency}.", field="concurrency", hint="At least 1.")
    try:
        pickle.dumps(function if processes else None)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"cannot be sent to a process: {error}",
            field="reward",
            hint="Define it with def in a module, or leave processes at 0.",
        ) from None
