"""A reward that is noise is named by the hints; the same run with the clean reward is not."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

import weaver_rl as rl
from weaver_rl.metrics import find_hints
from weaver_rl.proofs import SAMPLING, TRAIN
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import closeness, exact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 6


def flipped(dice: Random) -> rl.Reward:
    """One verdict in five is the wrong one."""
    return lambda task, reply: abs(exact(task, reply) - float(dice.random() < 0.2))


def thrown(dice: Random) -> rl.Reward:
    return lambda task, reply: float(dice.random() < 0.5)


def blurred(dice: Random) -> rl.Reward:
    """Partial credit, as a judge gives it: a third of a point off, either way."""
    return lambda task, reply: closeness(task, reply) + dice.gauss(0.0, 0.3)


def hinted(reward: rl.Reward, folder: Path, seed: int) -> tuple[list[int], str]:
    """The steps after which the reward was called noisy, and the report."""
    done = rl.train(
        "weaver-nano",
        TRAIN,
        reward,
        steps=STEPS,
        groups_per_step=16,
        sampling=SAMPLING,
        seed=seed,
        folder=folder,
        display=False,
    )
    rows = read_lines(folder / "metrics.jsonl")
    said = [i for i in range(1, STEPS + 1) if "noisy" in find_hints(rows[:i])]
    assert done.report is not None
    return said, done.report.read_text()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noisy", [flipped, thrown, blurred])
def test_a_noisy_reward_is_named(
    noisy: Callable[[Random], rl.Reward], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    said, report = hinted(noisy(Random(seed)), tmp_path / "run", seed)
    assert len(said) >= STEPS - 1
    assert "the reward is noisy" in report


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("clean", [exact, closeness])
def test_a_clean_one_is_not(
    clean: rl.Reward, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    said, report = hinted(clean, tmp_path / "run", seed)
    assert said == []
    assert "the reward is noisy" not in report
