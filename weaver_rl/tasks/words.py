"""Reversing strings, pig latin, Ubbi Dubbi: tasks without a download, in weaver-nano's words."""

from __future__ import annotations

from random import Random

from weaver_rl.types import Reply, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
SPEAKABLE = LETTERS + 3 * VOWELS
"""With as many vowels as English words have."""


def reverse_tasks(count: int, *, seed: int = 0, lengths: tuple[int, int] = (3, 6)) -> list[Task]:
    """Distinct tasks `{"prompt": "rev:abc=", "answer": "cba"}`, the same for the same seed."""
    words = _words(count, seed=seed, lengths=lengths)
    return [{"prompt": f"rev:{word}=", "answer": word[::-1]} for word in words]


def pig_latin_tasks(count: int, *, seed: int = 0, words: int = 2) -> list[Task]:
    """Tasks `{"prompt": "English: hello world\\nPig Latin:", "answer": "ello-hay orld-way"}`."""
    rng = Random(seed)
    texts = [" ".join(_word(rng, (3, 6)) for _ in range(words)) for _ in range(count)]
    return [{"prompt": f"English: {text}\nPig Latin:", "answer": pig_latin(text)} for text in texts]


def ubbi_dubbi_tasks(count: int, *, seed: int = 0, words: int = 2) -> list[Task]:
    """Tasks `{"prompt": "English: hello apple\\nUbbi Dubbi:", "answer": "hubellubo ubapplube"}`.

    Other than pig latin, weaver-nano was made without a word of it.
    """
    rng = Random(seed)
    texts = [" ".join(_word(rng, (3, 7), SPEAKABLE) for _ in range(words)) for _ in range(count)]
    return [
        {"prompt": f"English: {text}\nUbbi Dubbi:", "answer": ubbi_dubbi(text)} for text in texts
    ]


def preference_pairs(count: int, *, seed: int = 0) -> list[Task]:
    """`{"prompt": "rev:abcd=", "chosen": "ozvq", "rejected": "kwib"}`: random replies, of which the
    one that begins with a vowel is preferred."""
    rng = Random(seed)
    chosen = [rng.choice(VOWELS) + _word(rng, (3, 3)) for _ in range(count)]
    rejected = [rng.choice(CONSONANTS) + _word(rng, (3, 3)) for _ in range(count)]
    return [
        {"prompt": f"rev:{word}=", "chosen": good, "rejected": bad}
        for word, good, bad in zip(
            _words(count, seed=seed, lengths=(3, 6)), chosen, rejected, strict=True
        )
    ]


def vowel_first(task: Task, reply: Reply) -> float:
    """1 if the reply begins with a vowel, as preferred ones of `preference_pairs` do."""
    return float(reply.text.strip()[:1] in tuple(VOWELS))


def pig_latin(text: str) -> str:
    """`hello apple` becomes `ello-hay apple-way`: a first consonant moves behind, then "ay"."""
    return " ".join(map(_pig_word, text.split()))


def ubbi_dubbi(text: str) -> str:
    """`hello apple` becomes `hubellubo ubapplube`: "ub" before each vowel."""
    return "".join(f"ub{letter}" if letter in VOWELS else letter for letter in text)


def exact(task: Task, reply: Reply) -> float:
    """1 if the reply is the task's answer, but for white space around it."""
    return float(reply.text.strip() == task["answer"])


def closeness(task: Task, reply: Reply) -> float:
    """The share of characters that stand where they should; partial credit for `exact`."""
    said, answer = reply.text.strip(), task["answer"]
    right: int = sum(a == b for a, b in zip(said, answer, strict=False))
    return right / max(len(said), len(answer), 1)


def _pig_word(word: str) -> str:
    return f"{word}-way" if word[0] in VOWELS else f"{word[1:]}-{word[0]}ay"


def _word(rng: Random, lengths: tuple[int, int], letters: str = LETTERS) -> str:
    return "".join(rng.choices(letters, k=rng.randint(*lengths)))


def _words(count: int, *, seed: int, lengths: tuple[int, int]) -> list[str]:
    rng = Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words[_word(rng, lengths)] = None
    return list(words)
