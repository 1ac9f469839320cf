"""Distillation on weaver-nano reaches 90 % of its teacher; a shuffled teacher's student does not.

The teacher is the same model with another prompt, which it copies (0.9 of held-out words) where the
student reverses (0.01); or a student that learned from it.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import anyio
import pytest

import weaver_rl as rl
from recipes.distillation import ROWS
from weaver import AsyncSamplingClient, AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.tasks.words import exact

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL, LORA = "weaver-nano", {"rank": 8, "alpha": 32}
TRAIN, HELD_OUT = ROWS[:1000], ROWS[1000:]
SAMPLING = SamplingParams(max_tokens=12)
PLANS = {
    "off policy": rl.DistilPlan(beta=0.0, lmbda=0.0),
    "on policy": rl.DistilPlan(beta=1.0, lmbda=1.0),
    "both": rl.DistilPlan(beta=0.5, lmbda=0.5, steps=60, epochs=2),
}


async def greedy(model: AsyncSamplingClient, *, prompt: str = "prompt") -> float:
    """The share of held-out words that are copied."""
    tasks = [{"prompt": row[prompt], "answer": row["answer"]} for row in HELD_OUT]
    sampling = SAMPLING.model_copy(update={"temperature": 0.0})
    found = await rl.evaluate(model, tasks, reward=exact, sampling=sampling)
    assert found.mean is not None
    return found.mean.value


async def taught(
    service: AsyncServiceClient, rows: Sequence[rl.Task], plan: rl.DistilPlan
) -> AsyncSamplingClient:
    teacher = await service.create_sampling_client(base_model=MODEL)
    student = await service.create_model(MODEL, LORA, seed=plan.seed)
    return (await rl.distil(student, rows, plan, teacher=teacher)).sampler


def settled(name: str, seed: int) -> rl.DistilPlan:
    plan = PLANS[name]
    more = {"top_k": 16, "learning_rate": 2e-3, "sampling": SAMPLING, "seed": seed}
    return replace(plan, steps=plan.steps or 30, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_student_reaches_its_teacher(name: str, seed: int, tmp_path: Path) -> None:
    async def run() -> tuple[float, float, float]:
        async with AsyncServiceClient(home=tmp_path) as service:
            base = await service.create_sampling_client(base_model=MODEL)
            student = await taught(service, TRAIN, settled(name, seed))
            return (
                await greedy(base),
                await greedy(base, prompt="teacher_prompt"),
                await greedy(student),
            )

    before, teacher, student = anyio.run(run)
    assert before <= 0.1 and teacher >= 0.8
    assert student >= 0.9 * teacher, (student, teacher)


@pytest.mark.parametrize("name", ["off policy", "on policy"])
def test_a_shuffled_teacher_teaches_nothing(name: str, tmp_path: Path) -> None:
    """It reads the prompts of other rows."""
    read = [row["teacher_prompt"] for row in TRAIN]
    Random(0).shuffle(read)
    rows = [
        {"prompt": row["prompt"], "teacher_prompt": other}
        for row, other in zip(TRAIN, read, strict=True)
    ]

    async def run() -> float:
        async with AsyncServiceClient(home=tmp_path) as service:
            return await greedy(await taught(service, rows, settled(name, 0)))

    assert anyio.run(run) <= 0.1


def test_so_does_the_credit_of_the_whole_distribution(tmp_path: Path) -> None:
    """The teacher is a student of above: another model, which reads the same prompt."""

    async def run() -> tuple[float, float]:
        async with AsyncServiceClient(home=tmp_path) as service:
            teacher = await taught(service, TRAIN, settled("off policy", 0))
            student = await service.create_model(MODEL, LORA, seed=1)
            plan = rl.Plan(
                steps=30,
                groups_per_step=32,
                group_size=1,
                learning_rate=2e-3,
                sampling=SAMPLING,
                credit=rl.credit.distil(teacher, top_k=16),
            )
            unpaid = rl.single_turn(lambda task, reply: 0.0)
            done = await rl.on_policy(student, TRAIN, unpaid, plan)
            return await greedy(teacher), await greedy(done.sampler)

    teacher, student = anyio.run(run)
    assert teacher >= 0.8 and student >= 0.9 * teacher, (student, teacher)
