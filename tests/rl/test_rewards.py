"""Rewards: every kind of callable scores; every kind of fault is a failure, never a zero."""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from weaver.errors import ConfigError
from weaver_rl.rewards import Reward, group_reward, scorer, weighted
from weaver_rl.types import Failure, Reply, Score

if TYPE_CHECKING:
    from collections.abc import Sequence

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
