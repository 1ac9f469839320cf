"""Guessing a number by "higher" and "lower": a task of several turns, in weaver-nano's words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from random import Random

import weaver_rl as rl


def guess_number_tasks(count: int, *, upper: int = 7, seed: int = 0) -> list[rl.Task]:
    """Tasks `{"upper": 7, "answer": 5}`; every number comes up equally often."""
    answers = [1 + i % upper for i in range(count)]
    Random(seed).shuffle(answers)
    return [{"upper": upper, "answer": answer} for answer in answers]


def optimal_guesses(upper: int) -> int:
    """Guesses that always suffice for whoever halves the range: 3 for 7, 7 for 100."""
    return upper.bit_length()


def split_bits(low: int, high: int, guess: int) -> float:
    """What the answer to a guess tells on average, in bits, all of low..high being as likely."""
    if not low <= guess <= high:
        return 0.0
    count = high - low + 1
    shares = [size / count for size in (guess - low, 1, high - guess) if size]
    return -sum(share * math.log2(share) for share in shares)


def rate_guesses(guesses: Sequence[str], task: rl.Task) -> list[float]:
    """A reward for each guess by how well it splits what is left: from −1 to 0.

    0 for the middle, −1 for what tells nothing, such as a number that is out of the question; what
    is no number ends the game, and has −1 for each guess that was left.
    """
    low, high, most_guesses = 1, task["upper"], 2 * optimal_guesses(task["upper"])
    rewards: list[float] = []
    for turn, text in enumerate(guesses):
        if not re.fullmatch(r"\d{1,9}", text):
            return [*rewards, float(turn - most_guesses)]
        guess = int(text)
        most = split_bits(low, high, (low + high) // 2)
        told = split_bits(low, high, guess)
        rewards.append(told / most - 1 if most else float(guess == low) - 1)
        if low <= guess <= high:
            low, high = (guess + 1, high) if guess < task["answer"] else (low, guess - 1)
    return rewards


def score_guesses(guesses: Sequence[str], task: rl.Task) -> rl.Score:
    """The sum of `rate_guesses`; the metric `won` is 1 if the number was found by the optimum."""
    won = guesses[-1:] == [str(task["answer"])] and len(guesses) <= optimal_guesses(task["upper"])
    return rl.Score(math.fsum(rate_guesses(guesses, task)), {"won": float(won)})


async def guess_by_halving(agent: rl.Agent, task: rl.Task) -> rl.Score:
    """An environment that rewards each guess by `rate_guesses`; the result is `score_guesses`.

    It ends as `guess_number` does.
    """
    guesses: list[str] = []
    said = f"Guess a number from 1 to {task['upper']}."
    for _ in range(2 * optimal_guesses(task["upper"])):
        guesses.append((await agent.chat(said)).text.strip())
        agent.reward(rate_guesses(guesses, task)[-1])
        if not re.fullmatch(r"\d{1,9}", guesses[-1]) or int(guesses[-1]) == task["answer"]:
            break
        said = "higher" if int(guesses[-1]) < task["answer"] else "lower"
    return score_guesses(guesses, task)


async def guess_number(agent: rl.Agent, task: rl.Task) -> rl.Score:
    """An environment: 1 for a number found within the optimal guesses, less for each one more.

    It ends when the number is found, after twice the optimal guesses, or with a reply that is no
    number. The metric `won` is 1 if it was found within the optimal guesses.
    """
    best = optimal_guesses(task["upper"])
    said = f"Guess a number from 1 to {task['upper']}."
    for turn in range(2 * best):
        guess = (await agent.chat(said)).text.strip()
        if not re.fullmatch(r"\d{1,9}", guess):
            return rl.Score(0.0, {"won": 0.0, "numbers": 0.0})
        if int(guess) == task["answer"]:
            late = max(0, turn + 1 - best)
            return rl.Score(1.0 - late / (best + 1), {"won": float(not late), "numbers": 1.0})
        said = "higher" if int(guess) < task["answer"] else "lower"
    return rl.Score(0.0, {"won": 0.0, "numbers": 1.0})
