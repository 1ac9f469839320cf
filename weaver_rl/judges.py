"""`judge`: a language model as a reward. It asks a sampling client and reads a number."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from weaver.types import SamplingParams
from weaver_rl.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Callable

    from weaver import AsyncSamplingClient
    from weaver_rl.agent import Prompt
    from weaver_rl.rewards import Reward
    from weaver_rl.types import Reply, Task

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


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
