"""How often weaver-nano is right, measured by sampling; for its model card and its tests."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from recipes import _curriculum
from weaver import types

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver import SamplingClient

ANSWERED = ("reverse", "copy", "sum", "pig_latin")
GAMES = {"guess_7": (7, 3), "guess_15": (15, 4), "guess_100": (100, 7)}
"""The upper end of the range, and the guesses that suffice for whoever halves it."""


def measure(sampler: SamplingClient, *, prompts: int, seed: int) -> dict[str, dict[str, float]]:
    """The share of right answers per skill, greedy and sampled at temperature 1.

    Words have 3 to 6 letters; a pig latin answer counts when all its words are right, a game when
    it is won in as few guesses as halving needs. `{"reverse": {"greedy": 0.9, "sampled": 0.5}}`
    """
    return {
        skill: {
            "greedy": share_right(sampler, skill, prompts=prompts, seed=seed, temperature=0.0),
            "sampled": share_right(sampler, skill, prompts=prompts, seed=seed, temperature=1.0),
        }
        for skill in (*ANSWERED, *GAMES)
    }


def share_right(
    sampler: SamplingClient, skill: str, *, prompts: int, seed: int, temperature: float
) -> float:
    """The share of `prompts` seeded questions that are answered without a mistake."""
    if skill in GAMES:
        upper, guesses = GAMES[skill]
        targets = [1 + i % upper for i in range(prompts)]
        return games_won(sampler, targets, upper=upper, guesses=guesses, temperature=temperature)
    rng = Random(seed)
    asked = [_curriculum.question(skill, rng) for _ in range(prompts)]
    replies = answers(sampler, [item.prompt for item in asked], temperature=temperature)
    return sum(r == item.answer for r, item in zip(replies, asked, strict=True)) / prompts


def answers(
    sampler: SamplingClient,
    prompts: Sequence[str | list[types.Message]],
    *,
    temperature: float,
) -> list[str]:
    """One reply for each prompt, all in flight at once, each with a seed of its own."""
    handles = [
        sampler.sample(
            prompt,
            types.SamplingParams(max_tokens=64, temperature=temperature, seed=i),
            wait=False,
        )
        for i, prompt in enumerate(prompts)
    ]
    return [handle.result().sequences[0].text for handle in handles]


def games_won(
    sampler: SamplingClient,
    targets: Sequence[int],
    *,
    upper: int,
    guesses: int,
    temperature: float,
) -> float:
    """The share of numbers that are found with so many guesses; all games are played abreast."""
    opening = types.Message(role="user", content=f"Guess a number from 1 to {upper}.")
    running = {game: [opening] for game in range(len(targets))}
    won = 0
    for _ in range(guesses):
        replies = answers(sampler, list(running.values()), temperature=temperature)
        for (game, chat), reply in zip(list(running.items()), replies, strict=True):
            if not reply.isascii() or not reply.isdigit() or int(reply) == targets[game]:
                won += reply == str(targets[game])
                del running[game]
                continue
            feedback = "higher" if int(reply) < targets[game] else "lower"
            chat += [
                types.Message(role="assistant", content=reply),
                types.Message(role="user", content=feedback),
            ]
    return won / len(targets)
