"""Rewards: every kind of callable scores; every kind of fault is a failure, never a zero."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch

from weaver.errors import ConfigError
from weaver_rl.rewards import Reward, as_score, checked, group_reward, scorer, weighted
from weaver_rl.types import Failure, Reply, Score

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from weaver_rl.types import Task

TASK = {"prompt": "rev:abc=", "answer": "cba"}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reply(text: str) -> Reply:
    return Reply(text=text, tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")


REPLIES = [reply("cba"), reply("abc")]


def exact(task: Task, reply: Reply) -> float:
    return float(reply.text == task["answer"])


async def async_exact(task: Task, reply: Reply) -> Score:
    await anyio.lowlevel.checkpoint()
    return Score(exact(task, reply), {"length": len(reply.text)})


class Exact:
    def __call__(self, task: Task, reply: Reply) -> bool:
        return bool(exact(task, reply))


class AsyncExact:
    async def __call__(self, task: Task, reply: Reply) -> float:
        return exact(task, reply)


@group_reward
def best(task: Task, replies: Sequence[Reply]) -> Sequence[float]:
    return np.array([float(r is replies[0]) for r in replies])  # type: ignore[return-value]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reward",
    [
        exact,
        async_exact,
        Exact(),
        AsyncExact(),
        functools.partial(exact),
        functools.partial(async_exact),
        lambda task, reply: np.float32(exact(task, reply)),
        best,
    ],
)
async def test_every_kind_of_callable(reward: Reward) -> None:
    scores = await scorer(reward)(TASK, REPLIES)
    assert [score.reward for score in scores if isinstance(score, Score)] == [1.0, 0.0]


@pytest.mark.parametrize("reward", [exact, async_exact, best])
def test_one_scorer_serves_one_event_loop_after_another(reward: Reward) -> None:
    score = scorer(reward)
    for backend in ("asyncio", "trio", "asyncio"):
        (right, _) = anyio.run(score, TASK, REPLIES, backend=backend)
        assert isinstance(right, Score)
        assert right.reward == 1.0


def raising(task: Task, reply: Reply) -> float:
    raise KeyError("gold")


def exiting(task: Task, reply: Reply) -> float:
    sys.exit(3)


async def async_raising(task: Task, reply: Reply) -> float:
    raise KeyError("gold")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        (raising, "raised", "KeyError: 'gold'"),
        (async_raising, "raised", "KeyError: 'gold'"),
        (exiting, "raised", "SystemExit: 3"),
        (lambda task, reply: None, "bad_value", "<lambda> gave None as reward"),
        (lambda task, reply: "1", "bad_value", "gave '1' as reward"),
        (lambda task, reply: float("nan"), "bad_value", "must be finite"),
        (lambda task, reply: float("inf"), "bad_value", "must be finite"),
        (lambda task, reply: Score(1.0, {"x": float("nan")}), "bad_value", "nan as x"),
        (group_reward(lambda task, replies: [1.0]), "bad_value", "one value for each of 2"),
        (group_reward(lambda task, replies: 1 / 0), "raised", "ZeroDivisionError"),
    ],
)
async def test_faults_are_failures(reward: Reward, kind: str, message: str) -> None:
    for failure in await scorer(reward)(TASK, REPLIES):
        assert isinstance(failure, Failure)
        assert (failure.where, failure.kind) == ("reward", kind)
        assert message in failure.message
        assert ("Traceback" in failure.traceback) == (kind == "raised")


@pytest.mark.anyio
async def test_only_the_bad_reply_fails() -> None:
    def picky(task: Task, reply: Reply) -> float:
        return 1.0 / (reply.text == "cba")

    good, bad = await scorer(picky)(TASK, REPLIES)
    assert good == Score(1.0)
    assert isinstance(bad, Failure)


@pytest.mark.anyio
async def test_a_hang_is_given_up() -> None:
    def hangs(task: Task, reply: Reply) -> float:
        time.sleep(1.0)
        return 1.0

    async def async_hangs(task: Task, reply: Reply) -> float:
        await anyio.sleep_forever()
        return 1.0

    for reward in (hangs, async_hangs):
        begin = time.monotonic()
        scores = await scorer(reward, timeout_s=0.05)(TASK, REPLIES)
        assert time.monotonic() - begin < 0.8
        assert [s.kind for s in scores if isinstance(s, Failure)] == ["timeout"] * 2


@pytest.mark.anyio
async def test_sync_rewards_leave_the_event_loop_free() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.sleep(0.01)
            ticks += 1

    def slow(task: Task, reply: Reply) -> float:
        time.sleep(0.3)
        return 1.0

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        begin = time.monotonic()
        await scorer(slow)(TASK, REPLIES)
        assert time.monotonic() - begin < 0.55  # both at the same time
        tasks.cancel_scope.cancel()
    assert ticks > 3


def spins(task: Task, reply: Reply) -> float:
    while reply.text == "abc":
        pass
    return 1.0


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
async def test_processes_are_killed_when_they_hang() -> None:
    (good,) = await scorer(spins, timeout_s=60, processes=1)(TASK, REPLIES[:1])
    (bad,) = await scorer(spins, timeout_s=0.3, processes=1)(TASK, REPLIES[1:])
    assert good == Score(1.0)
    assert isinstance(bad, Failure)
    assert bad.kind == "timeout"


def test_processes_want_importable_functions() -> None:
    with pytest.raises(ConfigError, match="cannot be sent"):
        scorer(lambda task, reply: 1.0, processes=1)
    with pytest.raises(ConfigError, match="no use for processes"):
        scorer(async_exact, processes=1)
    with pytest.raises(ConfigError, match="function of"):
        scorer(3.0)  # type: ignore[arg-type]


def gives_none(task: Task, reply: Reply) -> None:
    return None


def brevity(task: Task, reply: Reply) -> float:
    return -float(len(reply.text))


@pytest.mark.anyio
@pytest.mark.parametrize("first", [exact, async_exact])
async def test_weighted(first: Reward) -> None:
    scores = await scorer(weighted({first: 1.0, brevity: 0.1}))(TASK, REPLIES)
    name = first.__name__
    expected = {name: 1.0, "brevity": -3.0} | ({"length": 3.0} if first is async_exact else {})
    assert scores[0] == Score(pytest.approx(0.7), expected)
    failed = await scorer(weighted({first: 1.0, raising: 1.0}))(TASK, REPLIES)
    assert all(isinstance(score, Failure) for score in failed)
    nothing = await scorer(weighted({first: 1.0, gives_none: 1.0}))(TASK, REPLIES)
    assert isinstance(nothing[0], Failure)
    assert "gives_none gave None" in nothing[0].message


def test_weighted_wants_names_that_differ() -> None:
    with pytest.raises(ConfigError, match="distinct names"):
        weighted({exact: 1.0, functools.partial(exact): 1.0})
    with pytest.raises(ConfigError, match="distinct names"):
        weighted({})


class Panic(BaseException):
    """As pyo3 raises where Rust panics."""


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


async def cancelled_elsewhere(task: Task, reply: Reply) -> float:
    raise asyncio.CancelledError


async def gives_up(task: Task, reply: Reply) -> float:
    gone = asyncio.ensure_future(asyncio.sleep(60))
    gone.cancel()
    await gone
    return 1.0


async def cancels_itself(task: Task, reply: Reply) -> float:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()
    await asyncio.sleep(60)
    return 1.0


def raises(error: BaseException) -> Reward:
    def reward(task: Task, reply: Reply) -> float:
        raise error

    return reward


def raises_async(error: BaseException) -> Reward:
    async def reward(task: Task, reply: Reply) -> float:
        raise error

    return reward


@pytest.mark.parametrize(
    "reward",
    [
        cancelled_elsewhere,
        gives_up,
        cancels_itself,
        *(form(e) for form in (raises, raises_async) for e in (Panic("x"), Mute(), SystemExit(3))),
        raises(asyncio.CancelledError()),
        group_reward(cancelled_elsewhere),  # type: ignore[arg-type]
    ],
)
def test_no_exception_of_a_reward_ends_the_run(reward: Reward) -> None:
    for failure in asyncio.run(scorer(reward)(TASK, REPLIES)):
        assert isinstance(failure, Failure)
        assert (failure.where, failure.kind) == ("reward", "raised")


def test_a_cancellation_of_the_caller_goes_through() -> None:
    async def sleeps(task: Task, reply: Reply) -> float:
        await anyio.sleep_forever()
        return 1.0

    async def main(reward: Reward) -> None:
        scoring = asyncio.ensure_future(scorer(reward)(TASK, REPLIES))
        await asyncio.sleep(0.02)
        scoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scoring

    for reward in (sleeps, group_reward(sleeps)):  # type: ignore[arg-type]
        asyncio.run(main(reward))  # type: ignore[arg-type]


def wrapped(task: Task, reply: Reply) -> Awaitable[Score]:
    return async_exact(task, reply)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reward",
    [
        wrapped,
        functools.partial(wrapped),
        lambda task, reply: async_exact(task, reply),
        weighted({lambda task, reply: async_exact(task, reply): 1.0}),
        weighted({async_exact: 1.0}),
    ],
)
async def test_an_awaitable_is_awaited_wherever_it_comes_from(reward: Reward) -> None:
    scores = await scorer(reward)(TASK, REPLIES)
    assert [score.reward for score in scores if isinstance(score, Score)] == [1.0, 0.0]


@pytest.mark.anyio
async def test_a_group_may_be_awaited_and_listed_in_any_way() -> None:
    async def ranks(task: Task, replies: Sequence[Reply]) -> Sequence[float]:
        return [1.0, 0.0]

    for function in (
        lambda task, replies: ranks(task, replies),
        lambda task, replies: torch.tensor([1.0, 0.0]),
        lambda task, replies: (float(r is replies[0]) for r in replies),
        lambda task, replies: map(np.array, [1, 0]),
    ):
        scores = await scorer(group_reward(function))(TASK, REPLIES)
        assert [score.reward for score in scores if isinstance(score, Score)] == [1.0, 0.0]
    for wrong in (lambda task, replies: {1.0, 0.0}, lambda task, replies: itertools.count()):
        failures = await scorer(group_reward(wrong))(TASK, REPLIES)
        assert [f.kind for f in failures if isinstance(f, Failure)] == ["bad_value"] * 2


@pytest.mark.parametrize(
    "value",
    [
        np.array(0.5),
        np.array([0.5]),
        np.float16(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([0.5], dtype=torch.bfloat16),
        Decimal("0.5"),
        Fraction(1, 2),
        Score(np.array(0.5)),  # type: ignore[arg-type]
    ],
)
def test_every_number_counts(value: Any) -> None:
    assert as_score(value, "it").reward == 0.5
    assert as_score(Score(0.0, {"x": value.reward if isinstance(value, Score) else value}), "it")


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 1, np.int8(1)])
def test_so_does_a_truth(value: Any) -> None:
    assert as_score(value, "it") == Score(1.0)


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        10**5000,  # too long for a text
        1e300,
        Fraction(10**400),
        Decimal("1e400"),
        Decimal("sNaN"),
        np.float64("nan"),
        np.array([0.5, 0.5]),
        np.array("0.5"),
        torch.tensor([0.5, 0.5]),
        torch.tensor([]),
        1j,
        b"1",
        [0.5],
        Score(Score(1.0)),  # type: ignore[arg-type]
        Score(1.0, [0.5]),  # type: ignore[arg-type]
        Score(1.0, {"x": None}),  # type: ignore[dict-item]
        Score(1.0, {"x": 10**400}),
        raises,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_named(value: object) -> None:
    failure = checked(value, "it")
    assert isinstance(failure, Failure)
    assert failure.kind == "bad_value"
    assert failure.message.startswith("it gave ")


@pytest.mark.anyio
async def test_a_reward_changes_a_copy_of_its_task() -> None:
    def greedy(task: Task, reply: Reply) -> float:
        task["gold"].append(reply.text)
        task["seen"] = True  # type: ignore[index]
        return float(len(task["gold"]))

    async def async_greedy(task: Task, reply: Reply) -> float:
        return greedy(task, reply)

    for reward in (greedy, async_greedy):
        task = {"prompt": "a", "gold": ["b"], "lock": threading.Lock()}
        shared = scorer(reward)
        assert [s for s in await shared({"gold": ["b"]}, REPLIES)] == [Score(2.0), Score(2.0)]
        await shared(task, REPLIES)  # what cannot be copied is shared
        assert "seen" not in task


def dies(task: Task, reply: Reply) -> float:
    if reply.text == "abc":
        os._exit(139)
    return 1.0


def unsendable(task: Task, reply: Reply) -> Any:
    return lambda: 1.0


def unreadable(task: Task, reply: Reply) -> float:
    os.write(1, b"not of the protocol")
    return 1.0


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
async def test_a_worker_process_that_dies_fails_one_rollout() -> None:
    scores = await scorer(dies, processes=1)(TASK, [*REPLIES, REPLIES[0]])
    assert [isinstance(score, Failure) for score in scores] == [False, True, False]
    [failure] = [score for score in scores if isinstance(score, Failure)]
    assert "worker process of dies ended" in failure.message
    for reward in (unsendable, unreadable):
        (failed,) = await scorer(reward, processes=1)(TASK, REPLIES[:1])
        assert isinstance(failed, Failure)


@pytest.mark.anyio
@pytest.mark.parametrize("declared", [True, False])
async def test_async_rewards_wait_together(declared: bool) -> None:
    waiting = most = 0

    async def asks(task: Task, reply: Reply) -> float:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await anyio.sleep(0.5)
        waiting -= 1
        return 1.0

    reward = asks if declared else (lambda task, reply: asks(task, reply))
    assert all(isinstance(s, Score) for s in await scorer(reward)(TASK, REPLIES * 32))
    assert most == 64
    most = 0
    await scorer(reward, concurrency=3)(TASK, REPLIES * 4)
    assert most == 3
    with pytest.raises(ConfigError, match="concurrency"):
        scorer(reward, concurrency=0)
