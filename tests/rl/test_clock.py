"""Seconds are kept with the group that spent them, by kind, whatever task they were spent in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from tests.rl.scripted import ScriptedSampler, byte_tokenizer
from weaver.types import SamplingParams
from weaver_rl.clock import SPENT, recording, spend, timed
from weaver_rl.rollouts import each, sample_groups, single_turn
from weaver_rl.tools import ToolCall, run_call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver_rl.agent import Agent
    from weaver_rl.rollouts import GroupEnvironment
    from weaver_rl.types import Group, Reply, Task

SAMPLING_S = 0.03


class Slow(ScriptedSampler):
    async def sample(self, *args: object, **more: object) -> object:  # type: ignore[override]
        await anyio.sleep(SAMPLING_S)
        return await super().sample(*args, **more)  # type: ignore[arg-type]


async def played(environment: GroupEnvironment) -> Sequence[Group]:
    sampler = Slow(byte_tokenizer(), lambda turn, prompt: "hello")
    tasks = [{"prompt": "a", "wait": 0.01}, {"prompt": "b", "wait": 0.05}]
    return await sample_groups(
        sampler, tasks, environment, group_size=2, sampling=SamplingParams(max_tokens=3), seed=0  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.anyio
async def test_rewards_of_a_single_turn() -> None:
    async def slow(task: Task, reply: Reply) -> float:
        await anyio.sleep(task["wait"])
        return 1.0

    first, second = await played(single_turn(slow))
    assert set(first.spent) == {"sampling", "reward"}
    assert len(first.spent["sampling"]) == 1  # one prefill, one wait
    assert min(first.spent["sampling"]) >= SAMPLING_S
    assert [len(group.spent["reward"]) for group in (first, second)] == [2, 2]
    assert min(first.spent["reward"]) >= 0.01
    assert min(second.spent["reward"]) >= 0.05
    assert SPENT.get() is None


@pytest.mark.anyio
async def test_an_environment_without_its_sampler_and_its_tools() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    async def play(agent: Agent, task: Task) -> float:
        await agent.complete("x")
        await agent.complete("y")
        await anyio.sleep(task["wait"])
        for arguments in ({"a": 1, "b": 2}, {"a": 1}):
            await run_call(ToolCall("add", arguments), [add])
        await run_call(ToolCall("subtract", {}), [add])
        return 1.0

    first, second = await played(each(play))
    for group, wait in ((first, 0.01), (second, 0.05)):
        assert {kind: len(every) for kind, every in group.spent.items()} == {
            "sampling": 4, "environment": 2, "tool": 6, "tool_failed": 4
        }  # fmt: skip
        assert min(group.spent["sampling"]) >= SAMPLING_S
        assert min(group.spent["environment"]) >= wait


def test_outside_nothing_is_kept() -> None:
    spend("tool", 1.0)
    with recording() as outer, timed("reward"):
        with recording() as inner:
            spend("tool", 1.0)
    assert (list(outer), inner) == (["reward"], {"tool": [1.0]})
