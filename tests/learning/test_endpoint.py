"""An agent that is a program of its own learns what the same agent learns in Python.

The program knows OpenAI's protocol alone. On a deterministic service, which is slow, both runs are
the same to the last bit, step by step. The control's advantages have the wrong sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import weaver_rl as rl
from recipes.agent import play
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.proofs import LORA, flipped
from weaver_rl.tasks.guess_number import guess_by_halving, guess_number_tasks

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def learned(
    environment: rl.Environment,
    home: Path,
    *,
    steps: int = 12,
    credit: rl.Credit | None = None,
    deterministic: bool = False,
) -> list[float]:
    """The mean rating of each step's games."""
    plan = rl.Plan(
        steps=steps,
        groups_per_step=7,
        group_size=8,
        learning_rate=4e-3,
        sampling=SamplingParams(max_tokens=4),
        credit=credit or rl.credit.turns(discount=0.0),
    )

    async def run() -> list[float]:
        async with AsyncServiceClient(home=home, deterministic=deterministic) as service:
            trainer = await service.create_model("weaver-nano", LORA, seed=plan.seed)
            await rl.off_policy(trainer, guess_number_tasks(7), rl.each(environment), plan)
            return [point.value for point in await trainer.read_metrics("score/rated")]

    return anyio.run(run)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


def gained(rewards: list[float]) -> float:
    return float(np.mean(rewards[-3:]) - np.mean(rewards[:3]))


async def halving(agent: rl.Agent, task: rl.Task) -> rl.Score:
    """`play`, in Python."""
    score = await guess_by_halving(agent, task)
    return rl.Score(score.metrics["won"], {"rated": score.reward})


def test_a_program_learns_what_the_agent_in_python_learns(tmp_path: Path) -> None:
    agents = {"inside": halving, "program": play}
    exact = [
        learned(agent, tmp_path / f"exact-{name}", steps=3, deterministic=True)
        for name, agent in agents.items()
    ]
    assert exact[0] == exact[1] and len(set(exact[0])) == 3
    gains = {name: gained(learned(agent, tmp_path / name)) for name, agent in agents.items()}
    assert min(gains.values()) >= 0.4, gains


def test_with_the_wrong_sign_the_program_unlearns(tmp_path: Path) -> None:
    credit = rl.credit.turns(flipped, discount=0.0)
    assert gained(learned(play, tmp_path, steps=6, credit=credit)) <= 0
