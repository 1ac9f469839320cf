"""Evaluation: estimators against brute force and known numbers, and a run over scripted replies."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rl.helpers import group
from tests.rl.scripted import ScriptedSampler, byte_tokenizer
from weaver.errors import ConfigError, InvalidRequestError
from weaver.types import SamplingParams
from weaver_rl.evaluation import evaluate, mean_estimate, normal, pass_at_k, summarise, wilson

if TYPE_CHECKING:
    from weaver_rl.agent import Agent
    from weaver_rl.types import Reply, Task


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_pass_at_k_is_the_mean_of_all_subsets(counts: tuple[int, int], data: st.DataObject) -> None:
    n, c = counts
    k = data.draw(st.integers(1, n))
    outcomes = [i < c for i in range(n)]
    subsets = list(combinations(outcomes, k))
    assert pass_at_k(n, c, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_is_exact() -> None:
    assert pass_at_k(10_000, 1, k=5_000) == 0.5
    assert pass_at_k(200, 0, k=200) == 0.0


def test_wilson_against_published_numbers() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for passed, tasks, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        estimate = wilson(passed / tasks, tasks)
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_normal_by_hand() -> None:
    estimate = normal(np.array([1.0, 2.0, 3.0, 6.0]))
    assert estimate.value == 3.0
    assert estimate.high - 3.0 == pytest.approx(1.959964 * (14 / 3) ** 0.5 / 2)
    assert normal(np.array([2.0])).low == 2.0


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    covered = {"wilson": 0, "normal": 0}
    for _ in range(400):
        coins = mean_estimate([np.array([x]) for x in (rng.random(50) < 0.8).astype(float)])
        sizes = mean_estimate([rng.normal(task, 1.0, 4) for task in rng.normal(3.0, 2.0, 50)])
        assert coins is not None
        assert sizes is not None
        covered[coins.method] += coins.low <= 0.8 <= coins.high
        covered[sizes.method] += sizes.low <= 3.0 <= sizes.high
    assert all(0.92 <= count / 400 <= 0.98 for count in covered.values())


def test_a_task_counts_once_however_often_it_is_sampled() -> None:
    once = summarise([group(1.0), group(0.0)]).mean
    often = summarise([group(*[1.0] * 50), group(0.0)]).mean
    assert once == often


def test_failures_are_counted_and_in_no_other_number() -> None:
    found = summarise([group(1.0, None), group(None, None), group(0.0, 1.0)], pass_at=(1, 2))
    assert found.failed == 3
    assert found.mean is not None
    assert (found.mean.value, found.mean.tasks) == (0.75, 2)
    assert (found.pass_at[1].value, found.pass_at[1].tasks) == (0.75, 2)
    assert (found.pass_at[2].value, found.pass_at[2].tasks) == (1.0, 1)
    nothing = summarise([group(None)], pass_at=(1,))
    assert nothing.mean is None
    assert set(nothing.metrics) == {"eval/failed", "eval/truncated_fraction"}


TASKS = [{"prompt": f"{word}=", "answer": word} for word in ("ab", "cd", "ef", "gh")]


def exact(task: Task, reply: Reply) -> float:
    return float(reply.text == task["answer"])


def echo(turn: int, prompt: list[int]) -> str:
    """Right but for the word ef."""
    text = str(byte_tokenizer().decode(prompt)).rstrip("=")
    return "" if text == "ef" else text


@pytest.mark.anyio
async def test_evaluate_with_a_reward() -> None:
    sampler = ScriptedSampler(byte_tokenizer(), echo)
    found = await evaluate(sampler, TASKS, reward=exact)
    assert found.mean is not None
    assert (found.mean.value, found.mean.method, found.mean.tasks) == (0.75, "wilson", 4)
    assert str(found.mean) == "0.750 [0.301, 0.954]"
    assert {params.temperature for params in sampler.params} == {0.0}
    assert found.metrics["eval/mean"] == 0.75
    assert len(found.groups) == 4


@pytest.mark.anyio
async def test_evaluate_with_an_environment_and_pass_at_k() -> None:
    async def play(agent: Agent, task: Task) -> float:
        return 2.0 * exact(task, await agent.complete(task["prompt"]))

    sampler = ScriptedSampler(byte_tokenizer(), echo)
    found = await evaluate(
        sampler, TASKS, environment=play, num_samples=3, pass_at=(1, 3), passing=2.0
    )
    assert found.mean is not None
    assert (found.mean.value, found.mean.method) == (1.5, "normal")
    assert found.metrics["eval/pass@3"] == 0.75
    assert {params.temperature for params in sampler.params} == {1.0}
    assert len({params.seed for params in sampler.params}) == 12


@pytest.mark.anyio
async def test_what_makes_no_sense_is_refused() -> None:
    sampler = ScriptedSampler(byte_tokenizer(), echo)

    async def play(agent: Agent, task: Task) -> float:
        return 0.0

    greedy = SamplingParams(temperature=0)
    with pytest.raises(ConfigError, match="a reward or an environment"):
        await evaluate(sampler, TASKS)
    with pytest.raises(ConfigError, match="a reward or an environment"):
        await evaluate(sampler, TASKS, reward=exact, environment=play)
    with pytest.raises(ConfigError, match="num_samples is 1"):
        await evaluate(sampler, TASKS, reward=exact, pass_at=(2,))
    with pytest.raises(ConfigError, match="all the same"):
        await evaluate(sampler, TASKS, reward=exact, num_samples=2, sampling=greedy)
    with pytest.raises(InvalidRequestError, match="no tasks"):
        await evaluate(sampler, [], reward=exact)
    with pytest.raises(InvalidRequestError, match="'prompt'"):
        await evaluate(sampler, [{"text": "a"}], reward=exact)
    assert not sampler.prompts
