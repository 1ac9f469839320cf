"""The twelve-line recipe: its reward, dry, short, repeated, and in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import custom_reward
from weaver_rl import Reply

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("said", "reward"), [("cba", 1.0), ("cb", 2 / 3), ("cbax", 0.75), ("abc", 1 / 3), ("", 0.0)]
)
def test_the_reward_is_the_share_of_letters_in_place(said: str, reward: float) -> None:
    reply = Reply(text=said, tokens=(), logprobs=(), sampling_logprobs=(), stop_reason="stop")
    assert custom_reward.in_place({"prompt": "rev:abc=", "answer": "cba"}, reply) == reward


def test_a_dry_run_tries_the_reward(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert custom_reward.main(dry_run=True) is None
    said = capsys.readouterr().out
    assert "answer 1" in said
    assert "raised" not in said
    assert not (tmp_path / "runs").exists()


def test_given_again_the_command_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    custom_reward.main(steps=1)
    custom_reward.main(steps=2)
    lines = (tmp_path / "runs/custom_reward/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3  # steps 0, before training, 1 and 2
    assert capsys.readouterr().out.count("runs/custom_reward/report.html") == 2


def test_the_readme_has_it_in_twelve_lines() -> None:
    blocks = README.read_text().split("```python\n")[1:]
    (block,) = [block.partition("```")[0] for block in blocks if "rl.train(" in block]
    assert sum(bool(line.strip()) for line in block.splitlines()) == 12


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns() -> None:
    held_out = custom_reward.main()
    assert held_out is not None
    assert held_out >= 0.97
