"""Groups are played at once; what the user's code did wrong is a failure of its rollout alone."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from tests.rl.helpers import group
from tests.rl.scripted import ScriptedSampler, byte_tokenizer
from weaver.errors import ConfigError, EngineError, WeaverError
from weaver.types import SamplingParams
from weaver_rl.agent import Agent, Budget
from weaver_rl.rollouts import (
    Environment,
    FailureWatch,
    GroupEnvironment,
    RolloutsFailedError,
    as_group_environment,
    each,
    sample_groups,
    single_turn,
)
from weaver_rl.types import Group, Reply, Score, Task

if TYPE_CHECKING:
    from collections.abc import Sequence

TASKS = [{"prompt": "a=", "answer": "x"}, {"prompt": "b=", "answer": "y"}]


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def exact(task: Task, reply: Reply) -> float:
    return float(reply.text == task["answer"])


async def ask(agent: Agent, task: Task) -> Score:
    reply = await agent.chat(task["prompt"])
    return Score(exact(task, reply), {"length": len(reply.tokens)})


async def play(
    environment: Environment | GroupEnvironment,
    *,
    fails: bool = False,
    budget: Budget | None = None,
) -> tuple[list[Group], ScriptedSampler]:
    def script(turn: int, prompt: list[int]) -> str:
        if fails:
            raise EngineError("out of memory")
        return "x"

    sampler = ScriptedSampler(byte_tokenizer(), script)
    groups = await sample_groups(
        sampler,  # type: ignore[arg-type]
        TASKS,
        each(environment, budget=budget) if budget else as_group_environment(environment),
        group_size=3,
        sampling=SamplingParams(),
        seed=5,
    )
    return groups, sampler


@pytest.mark.anyio
@pytest.mark.parametrize("turns", ["single", "several"])
async def test_groups_in_order(turns: str) -> None:
    environment = single_turn(exact) if turns == "single" else ask
    groups, sampler = await play(environment)
    assert [g.task for g in groups] == TASKS
    assert [len(g.rollouts) for g in groups] == [3, 3]
    assert [g.rewards for g in groups] == [(1.0,) * 3, (0.0,) * 3]
    calls = len({params.seed for params in sampler.params})
    assert calls == (2 if environment is not ask else 6)
    for rollout in (r for g in groups for r in g.rollouts):
        assert rollout.trajectory.num_sampled == 2
        assert rollout.text == "x"


@pytest.mark.anyio
@pytest.mark.parametrize("turns", ["single", "several"])
async def test_errors_of_the_service_come_out_as_they_are(turns: str) -> None:
    environment = single_turn(exact) if turns == "single" else ask
    with pytest.raises(EngineError, match="out of memory"):
        await play(environment, fails=True)


async def raises(agent: Agent, task: Task) -> float:
    await agent.chat("hello")
    return {}["gold"]  # type: ignore[no-any-return]


async def nothing(agent: Agent, task: Task) -> float:
    return None  # type: ignore[return-value]


async def sleeps(agent: Agent, task: Task) -> float:
    await anyio.sleep_forever()
    return 1.0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("environment", "kind", "turns"),
    [(raises, "raised", 1), (nothing, "bad_value", 0), (sleeps, "timeout", 0)],
)
async def test_faults_of_an_environment(environment: Environment, kind: str, turns: int) -> None:
    groups, _ = await play(environment, budget=Budget(seconds=0.2))
    for rollout in (r for g in groups for r in g.rollouts):
        assert rollout.failure is not None
        assert (rollout.failure.where, rollout.failure.kind) == ("environment", kind)
        assert rollout.trajectory.turns == turns


@pytest.mark.anyio
async def test_a_spent_budget_is_not_a_failure() -> None:
    async def forever(agent: Agent, task: Task) -> float:
        while True:
            await agent.chat("more")

    groups, _ = await play(forever, budget=Budget(turns=3))
    for rollout in groups[0].rollouts:
        assert (rollout.failure, rollout.reward) == (None, 0.0)
        assert rollout.metrics == {"budget_exceeded": 1.0}
        assert rollout.trajectory.turns == 3


def test_a_reward_is_no_environment() -> None:
    with pytest.raises(ConfigError, match="single_turn"):
        as_group_environment(exact)  # type: ignore[arg-type]


def test_failures_are_shown_once_and_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    watch = FailureWatch(max_rate=0.5)
    with caplog.at_level(logging.ERROR, logger="weaver_rl"):
        watch.check([group(1.0, None), group(0.0, None)])
        watch.check([group(1.0, None)])
    assert len(caplog.records) == 1
    assert "ValueError: no" in caplog.text
    with pytest.raises(RolloutsFailedError, match="2 of 3 rollouts failed") as caught:
        watch.check([group(1.0, None, None)])
    assert isinstance(caught.value, WeaverError)
    assert caught.value.field == "reward"


def test_nothing_failed() -> None:
    FailureWatch(max_rate=0.0).check([group(1.0)])
    FailureWatch(max_rate=0.0).check([])


@pytest.mark.anyio
async def test_an_environment_changes_a_copy_of_its_task() -> None:
    async def changes(agent: Agent, task: Task) -> float:
        task["seen"] = task.get("seen", 0) + 1  # type: ignore[index]
        return float(task["seen"])

    groups, _ = await play(changes)
    assert [g.rewards for g in groups] == [(1.0,) * 3] * 2
    assert [g.task for g in groups] == TASKS


def test_a_cancellation_within_an_environment_is_its_failure() -> None:
    async def cancelled(agent: Agent, task: Task) -> float:
        raise asyncio.CancelledError

    groups, _ = asyncio.run(play(cancelled))
    failures = [r.failure for g in groups for r in g.rollouts if r.failure is not None]
    assert [(f.where, f.kind) for f in failures] == [("environment", "raised")] * 6


@pytest.mark.anyio
@pytest.mark.parametrize("wrong", [None, [1.0], [1.0, "2", None], KeyError("gold")])
async def test_a_group_environment_of_ones_own_is_user_code_too(wrong: object) -> None:
    async def own(agents: Sequence[Agent], task: Task) -> Any:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    groups, _ = await play(GroupEnvironment(own))
    failed = [[r.failure is not None for r in g.rollouts] for g in groups]
    assert failed == [[wrong != [1.0, "2", None], True, True]] * 2
