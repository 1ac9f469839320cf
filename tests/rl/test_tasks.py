"""The bundled tasks: seeded, solvable, and scored as they say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio
import pytest

import weaver_rl as rl
from tests.rl.scripted import TOOLS, ScriptedSampler, byte_tokenizer
from weaver.errors import ConfigError
from weaver.types import SamplingParams
from weaver_rl.rewards import scorer
from weaver_rl.tasks import arithmetic, guess_number, math_answers, reasoning_gym, words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver_rl.types import Task


def reply(text: str) -> rl.Reply:
    return rl.Reply(text=text, tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")


MAKERS: dict[str, Callable[..., list[Task]]] = {
    "reverse": words.reverse_tasks,
    "pig_latin": words.pig_latin_tasks,
    "ubbi_dubbi": words.ubbi_dubbi_tasks,
    "sum": arithmetic.sum_tasks,
    "calculator": arithmetic.calculator_tasks,
    "countdown": arithmetic.countdown_tasks,
    "guess": guess_number.guess_number_tasks,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_seed_makes_the_same_tasks(name: str) -> None:
    maker = MAKERS[name]
    assert maker(20, seed=3) == maker(20, seed=3) != maker(20, seed=4)
    assert len(maker(20)) == 20


def test_words() -> None:
    task = words.reverse_tasks(1)[0]
    assert task["prompt"] == f"rev:{task['answer'][::-1]}="
    assert words.exact(task, reply(f" {task['answer']}\n")) == 1.0
    assert words.exact(task, reply("nope")) == 0.0
    assert len({t["prompt"] for t in words.reverse_tasks(500)}) == 500
    assert words.pig_latin("hello apple split") == "ello-hay apple-way plit-say"
    assert words.ubbi_dubbi("hello apple") == "hubellubo ubapplube"
    assert words.closeness({"answer": "abcd"}, reply("abxd")) == 0.75
    assert words.closeness({"answer": "ab"}, reply("abab")) == 0.5


def test_sums() -> None:
    for task in arithmetic.sum_tasks(20):
        a, b = task["prompt"][:-1].split("+")
        assert int(a) + int(b) == int(task["answer"])


@pytest.mark.parametrize(
    ("text", "value"), [("1 + 2 * 3", 7), ("(1 + 2) * 3", 9), ("-4 / 8", -0.5), ("0.1 + 0.2", 0.3)]
)
def test_the_calculator_is_exact(text: str, value: float) -> None:
    assert float(arithmetic.evaluate(text)) == value


@pytest.mark.parametrize(
    "text", ["", "1 +", "__import__('os')", "2 ** 9", "a", "True", "(" * 150, "1" * 201, "'1'"]
)
def test_the_calculator_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        arithmetic.evaluate(text)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3 * 5 + 1", 1.0),
        ("(3 * 5) + 1 = 16", 1.0),
        ("16", 0.0),
        ("3 * 5 + 1 + 0", 0.0),
        ("5 + 5 + 5 + 1", 0.0),
        ("1 / 0", 0.0),
        ("sixteen", 0.0),
    ],
)
def test_countdown(text: str, reward: float) -> None:
    task = {"numbers": [3, 5, 1], "target": 16}
    assert arithmetic.countdown(task, reply(text)) == reward


def test_every_countdown_can_be_solved() -> None:
    for task in arithmetic.countdown_tasks(50):
        assert arithmetic.countdown(task, reply(task["answer"])) == 1.0


def play(
    environment: rl.Environment, task: Task, says: Sequence[str], template: str = TOOLS
) -> rl.Score | float:
    tokenizer = byte_tokenizer(template)
    sampler = ScriptedSampler(tokenizer, lambda turn, prompt: says[min(turn, len(says) - 1)])
    agent = rl.Agent(sampler, tokenizer, sampling=SamplingParams(max_tokens=500), seed=0)  # type: ignore[arg-type]

    async def run() -> rl.Score | float:
        return await environment(agent, task)

    return anyio.run(run)


@pytest.mark.parametrize(
    ("says", "reward", "won"),
    [
        (["4", "6", "5"], 1.0, 1.0),
        (["1", "2", "3", "5"], 0.75, 0.0),
        (["1"], 0.0, 0.0),
        (["four"], 0.0, 0.0),
        (["5"], 1.0, 1.0),
    ],
)
def test_guessing(says: list[str], reward: float, won: float) -> None:
    score = play(guess_number.guess_number, {"upper": 7, "answer": 5}, says)
    assert isinstance(score, rl.Score)
    assert (score.reward, score.metrics["won"]) == (reward, won)


def H(*sizes: int) -> float:
    """The entropy of a split into these many, in bits."""
    return -sum(n / sum(sizes) * math.log2(n / sum(sizes)) for n in sizes)


@pytest.mark.parametrize(
    ("says", "reward", "won"),
    [
        (["4", "6", "5"], 0.0, 1.0),
        (["5"], (H(4, 1, 2) / H(3, 1, 3)) - 1, 1.0),
        (["4", "2", "6", "5"], -1.0, 0.0),
        (["x"], -6.0, 0.0),
        (["4", "six"], -5.0, 0.0),
        (["4", "6", "6", "6", "6", "6", "5"], -4.0, 0.0),
    ],
)
def test_guesses_are_rewarded_by_how_they_split(says: list[str], reward: float, won: float) -> None:
    score = play(guess_number.guess_by_halving, {"upper": 7, "answer": 5}, says)
    assert isinstance(score, rl.Score)
    assert (score.reward, score.metrics["won"]) == (pytest.approx(reward), won)


def test_optimal_guesses() -> None:
    assert [guess_number.optimal_guesses(n) for n in (1, 2, 3, 7, 8, 100)] == [1, 2, 2, 3, 4, 7]


def test_with_calculator() -> None:
    task = arithmetic.calculator_tasks(1)[0]
    expression = task["prompt"].removeprefix("What is ").rstrip("?")
    arguments = f'{{"expression": "{expression}"}}'
    call = f'<tool_call>{{"name": "calculate", "arguments": {arguments}}}</tool_call>'
    right = [call, f"It is {task['answer']}."]
    assert play(arithmetic.with_calculator, task, right) == 1.0
    assert play(arithmetic.with_calculator, task, ["It is 3"]) == 0.0


def test_reasoning_gym() -> None:
    tasks = reasoning_gym.reasoning_gym_tasks("chain_sum", 3, seed=1)
    assert tasks == reasoning_gym.reasoning_gym_tasks("chain_sum", 3, seed=1)
    reward = reasoning_gym.reasoning_gym_reward()
    assert reward(tasks[0], reply(tasks[0]["answer"])) == 1.0
    assert reward(tasks[0], reply("no idea")) < 0.5
    with pytest.raises(ConfigError, match="pays for any answer"):
        reasoning_gym.reasoning_gym_tasks("game_of_life_halting", 1)
    with pytest.raises(ConfigError, match="Did you mean 'chain_sum'"):
        reasoning_gym.reasoning_gym_tasks("chain_sums", 1)


def test_math_answers_in_threads() -> None:
    score = scorer(math_answers.math_answer)
    texts = [r"So it is $\frac{1}{2}$.", r"\boxed{0.5}", "the answer is 2", ""]
    scores = anyio.run(score, {"answer": "1/2"}, [reply(text) for text in texts])
    assert [getattr(s, "reward", s) for s in scores] == [1.0, 1.0, 0.0, 0.0]
