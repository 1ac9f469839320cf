"""The five small skills of weaver-nano: the text that teaches them, and how often it is right.

The text is made from a seed, partly wrong. `pretrain_nano` trains on it and measures with it.

| skill     | prompt                                                  | answer                     |
|-----------|---------------------------------------------------------|----------------------------|
| reverse   | `rev:word=`                                             | `drow`                     |
| copy      | `copy:word=`                                            | `word`                     |
| sum       | `12+34=`                                                | `46`                       |
| pig_latin | `English: hello world` NEWLINE `Pig Latin:`             | ` ello-hay orld-way`, 2 NL |
| guess     | `Guess a number from 1 to 7.`, then `higher` or `lower` | numbers, until it is found |

Guess is chat; the others are plain text and, one time in five, chat. Every answer ends with END.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from weaver import types
from weaver_rl.tasks.words import LETTERS, pig_latin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weaver import SamplingClient

END, SYSTEM, USER, ASSISTANT = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
LENGTHS = (2, 7)
ONSETS = "b c d f g h j k l m n p r s t v w y z st tr pl ch sh br gr th sp bl cl fl qu".split()
CODAS = ["", "", "", *"n r s t l d p m nd st ck ng".split()]
RANGES = (7, 7, 15, 100)
EXAMPLES_PER_STEP = {"reverse": 36, "copy": 8, "sum": 24, "pig_latin": 15, "guess": 6}
CHAT_SHARE = 0.2
SLIP_RATES = {"reverse": 0.36, "copy": 0.25, "sum": 0.25, "pig_latin": 0.2, "guess": 0.15}
"""How often the last, noisy part of the corpus is wrong: per answer, word or guess."""
ANSWERED = ("reverse", "copy", "sum", "pig_latin")
GAMES = {"guess_7": (7, 3), "guess_15": (15, 4), "guess_100": (100, 7)}
"""The upper end of the range, and the guesses that suffice for whoever halves it."""


@dataclass(frozen=True, slots=True)
class Example:
    """Pieces of text in order: `(("rev:ab=", False), ("ba<|end|>", True))`, True where learned."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def prompt(self) -> str:
        return self.pieces[0][0]

    @property
    def answer(self) -> str:
        """The answer to the first prompt, without END."""
        return self.pieces[1][0].removesuffix(END)


def word(rng: Random, lengths: tuple[int, int] = LENGTHS) -> str:
    """Something that can be pronounced or, two times in five, random letters.

    Those come from few letters half of the time: only counting, not matching, reverses `abba`.
    """
    shortest, longest = lengths
    if rng.random() < 0.4:
        letters = rng.sample(LETTERS, rng.choice((2, 3, 4, 26, 26, 26)))
        return "".join(rng.choices(letters, k=rng.randint(shortest, longest)))
    while True:
        syllables = rng.randint(1, 3)
        made = "".join(_syllable(rng) for _ in range(syllables))
        if shortest <= len(made) <= longest:
            return made


def question(skill: str, rng: Random) -> Example:
    """A plain example without mistakes, for measuring; its words have 3 to 6 letters."""
    return plain(*_MAKERS[skill](rng, 0.0, (3, 6)))


def example(skill: str, rng: Random, *, slips: float) -> Example:
    """One example of a skill; with probability `slips` (per answer, word or guess) it is wrong."""
    if skill == "guess":
        return guessing_game(rng, upper=rng.choice(RANGES), slips=slips)
    prompt, answer = _MAKERS[skill](rng, slips, LENGTHS)
    return chat(rng, prompt, answer) if rng.random() < CHAT_SHARE else plain(prompt, answer)


def batch(rng: Random, *, noisy: bool) -> list[Example]:
    """The examples of one training step; words have 2 to 7 letters."""
    rates: Mapping[str, float] = SLIP_RATES if noisy else dict.fromkeys(SLIP_RATES, 0.0)
    return [
        example(skill, rng, slips=rates[skill])
        for skill, count in EXAMPLES_PER_STEP.items()
        for _ in range(count)
    ]


def plain(prompt: str, answer: str) -> Example:
    return Example(((prompt, False), (answer + END, True)))


def chat(rng: Random, prompt: str, answer: str) -> Example:
    """The same as one turn of chat, at times behind a system message; surrounding space goes."""
    system = f"{SYSTEM}{word(rng)} {word(rng)}{END}" if rng.random() < 0.25 else ""
    return plain(f"{system}{USER}{prompt}{END}{ASSISTANT}", answer.strip())


def guessing_game(rng: Random, *, upper: int, slips: float) -> Example:
    """A whole game in chat, its guesses among what the feedback leaves possible.

    They lean towards the low end, so that the likeliest guess is far from the best one, the middle.
    """
    target, low, high = rng.randint(1, upper), 1, upper
    pieces = [(f"{USER}Guess a number from 1 to {upper}.{END}{ASSISTANT}", False)]
    while True:
        top = rng.choice((high, rng.randint(low, high)))
        guess = rng.randint(1, upper) if rng.random() < slips else rng.randint(low, top)
        pieces.append((f"{guess}{END}", True))
        if guess == target:
            return Example(tuple(pieces))
        low, high = (max(low, guess + 1), high) if guess < target else (low, min(high, guess - 1))
        feedback = "higher" if guess < target else "lower"
        pieces.append((f"{USER}{feedback}{END}{ASSISTANT}", False))


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
    asked = [question(skill, rng) for _ in range(prompts)]
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


def _reverse(rng: Random, slips: float, lengths: tuple[int, int]) -> tuple[str, str]:
    text = word(rng, lengths)
    return f"rev:{text}=", _slipped(rng, text[::-1], slips, instead=text)


def _copy(rng: Random, slips: float, lengths: tuple[int, int]) -> tuple[str, str]:
    text = word(rng, lengths)
    return f"copy:{text}=", _slipped(rng, text, slips, instead=text[::-1])


def _sum(rng: Random, slips: float, lengths: tuple[int, int]) -> tuple[str, str]:
    limit = rng.choice((10, 100, 100))
    a, b = rng.randrange(limit), rng.randrange(limit)
    off = rng.choice((-10, -1, 1, 10)) if rng.random() < slips else 0
    return f"{a}+{b}=", str(abs(a + b + off))


def _pig_latin(rng: Random, slips: float, lengths: tuple[int, int]) -> tuple[str, str]:
    words = [word(rng, lengths) for _ in range(rng.choice((1, 2, 2)))]
    said = [_slipped(rng, pig_latin(item), slips, instead=f"{item}-ay") for item in words]
    return f"English: {' '.join(words)}\nPig Latin:", f" {' '.join(said)}\n\n"


_MAKERS = {"reverse": _reverse, "copy": _copy, "sum": _sum, "pig_latin": _pig_latin}


def _slipped(rng: Random, text: str, slips: float, *, instead: str) -> str:
    """With probability `slips` a mistake: another rule's answer, or two letters swapped, or one
    lost or wrong."""
    if rng.random() >= slips:
        return text
    at = rng.randrange(len(text) - 1)
    head, pair, tail = text[:at], text[at : at + 2], text[at + 2 :]
    mistakes = (pair[::-1], pair[1], rng.choice(LETTERS) + pair[1])
    return rng.choice((instead, instead, *(head + mistake + tail for mistake in mistakes)))


def _syllable(rng: Random) -> str:
    onset = rng.choice(ONSETS) if rng.random() < 0.85 else ""
    return onset + rng.choice("aeiou") + rng.choice(CODAS)
