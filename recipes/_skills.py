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

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from statistics import fmean

import weaver_rl as rl
from weaver import AsyncSamplingClient, types
from weaver_rl.tasks.guess_number import guess_number, guess_number_tasks
from weaver_rl.tasks.words import LETTERS, pig_latin

END, SYSTEM, USER, ASSISTANT = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
LENGTHS = (2, 7)
ONSETS = "b c d f g h j k l m n p r s t v w y z st tr pl ch sh br gr th sp bl cl fl qu".split()
CODAS = ["", "", "", *"n r s t l d p m nd st ck ng".split()]
RANGES = (7, 7, 15, 100)
EXAMPLES_PER_STEP = {"reverse": 36, "copy": 8, "sum": 24, "pig_latin": 15, "guess": 6}
CHAT_SHARE = 0.2
SLIP_RATES = {"reverse": 0.36, "copy": 0.25, "sum": 0.25, "pig_latin": 0.2, "guess": 0.15}
"""How often the last, noisy part of the corpus is wrong: per answer, word or guess."""
Skills = dict[str, dict[str, float]]
GAMES = {"guess_7": 7, "guess_15": 15, "guess_100": 100}
"""The upper end of the range."""


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


async def measure(sampler: AsyncSamplingClient, *, prompts: int, seed: int) -> Skills:
    """The share of right answers per skill, greedy and sampled at temperature 1.

    Words have 3 to 6 letters; a pig latin answer counts when all its words are right, a game when
    it is won in as few guesses as halving needs. `{"reverse": {"greedy": 0.9, "sampled": 0.5}}`
    """
    return {
        skill: {
            how: await share_right(sampler, skill, prompts=prompts, seed=seed, temperature=at)
            for how, at in (("greedy", 0.0), ("sampled", 1.0))
        }
        for skill in (*_MAKERS, *GAMES)
    }


async def share_right(
    sampler: AsyncSamplingClient, skill: str, *, prompts: int, seed: int, temperature: float
) -> float:
    """The share of `prompts` seeded questions that are answered without a mistake."""
    environment: rl.Environment | rl.GroupEnvironment = rl.single_turn(answered)
    if skill in GAMES:
        environment = guess_number
        tasks = guess_number_tasks(prompts, upper=GAMES[skill], seed=seed)
    else:
        rng = Random(seed)
        asked = [question(skill, rng) for _ in range(prompts)]
        tasks = [{"prompt": item.prompt, "answer": item.answer} for item in asked]
    sampling = types.SamplingParams(max_tokens=64, temperature=temperature)
    found = await rl.evaluate(sampler, tasks, environment=environment, sampling=sampling, seed=seed)
    return fmean(one.reward == 1.0 for group in found.groups for one in group.rollouts)


def answered(task: rl.Task, reply: rl.Reply) -> float:
    """1 for the answer to the letter, white space included."""
    return float(reply.text == task["answer"])


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
