"""A short pretraining run: the loss falls, the folder is whole, the seed decides."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING

import pytest

from recipes import _skills, pretrain_nano
from weaver import ServiceClient
from weaver_rl.tasks.words import pig_latin

if TYPE_CHECKING:
    from pathlib import Path


def flags(out: Path, *, seed: int = 0, steps: int = 16) -> pretrain_nano.Flags:
    return pretrain_nano.Flags(
        out=out,
        steps=steps,
        warmup_steps=4,
        hidden_size=32,
        layers=1,
        prompts_per_skill=2,
        seed=seed,
    )


def test_a_short_run_reduces_the_loss_and_writes_a_model(tmp_path: Path) -> None:
    losses = pretrain_nano.main(flags(tmp_path / "made"))
    assert len(losses) == 16
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    card = (tmp_path / "made" / "README.md").read_text()
    skills = json.loads((tmp_path / "made" / "skills.json").read_text())
    assert all(f"| {name} |" in card for name in skills)
    with ServiceClient(home=tmp_path / "home") as service:
        sampler = service.create_sampling_client(base_model=str(tmp_path / "made"))
        assert sampler.model_info.context_length == pretrain_nano.CONTEXT_LENGTH
        assert len(sampler.sample("rev:ab=", {"max_tokens": 3}).sequences[0].tokens) <= 3


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain_nano.main(flags(tmp_path / name, seed=seed, steps=2))
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["a"] == made["b"] != made["c"]


@pytest.mark.parametrize(
    ("english", "said"),
    [
        ("hello world", "ello-hay orld-way"),
        ("banana split", "anana-bay plit-say"),
        ("apple yes", "apple-way es-yay"),
    ],
)
def test_pig_latin_follows_the_reference(english: str, said: str) -> None:
    assert pig_latin(english) == said


@pytest.mark.parametrize(
    ("skill", "right"),
    [
        ("reverse", lambda prompt: prompt[4:-1][::-1]),
        ("copy", lambda prompt: prompt[5:-1]),
        ("sum", lambda prompt: str(sum(map(int, prompt[:-1].split("+"))))),
        (
            "pig_latin",
            lambda prompt: f" {pig_latin(prompt[9:].split(chr(10))[0])}\n\n",
        ),
    ],
)
def test_questions_are_answered_rightly(skill: str, right: object) -> None:
    assert callable(right)
    for seed in range(50):
        asked = _skills.question(skill, Random(seed))
        assert asked.answer == right(asked.prompt)


def test_slips_happen_at_the_stated_rate() -> None:
    rng = Random(0)
    wrong = 0
    for _ in range(2000):
        made = _skills.example("copy", rng, slips=0.25)
        asked = made.prompt.split("copy:")[1].split("=")[0]
        wrong += made.answer != asked
    assert 0.18 < wrong / 2000 <= 0.27  # a few slips hit the right letters again


def test_guesses_stay_inside_what_feedback_leaves() -> None:
    for seed in range(50):
        pieces = _skills.guessing_game(Random(seed), upper=15, slips=0.0).pieces
        low, high = 1, 15
        for (said, _), (heard, _) in zip(pieces[1::2], pieces[2::2], strict=False):
            guess = int(said.removesuffix(_skills.END))
            assert low <= guess <= high
            low, high = (guess + 1, high) if "higher" in heard else (low, guess - 1)
