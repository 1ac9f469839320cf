"""Reward models on weaver-nano: they order pairs that they have not seen, and what is trained on
them becomes what the pairs prefer; of swapped pairs the opposite, of shuffled ones not. Minutes, so
`slow`."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any, Literal

import anyio
import pytest

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.proofs import LORA, MODEL
from weaver_rl.tasks.words import preference_pairs, vowel_first

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PAIRS = preference_pairs(1100, seed=1)
TRAIN, HELD_OUT = PAIRS[:1000], PAIRS[1000:]
SAMPLING = SamplingParams(max_tokens=8)
Kind = Literal["as they are", "swapped", "shuffled"]


def pairs_of(kind: Kind, seed: int) -> list[Any]:
    rng = Random(seed)
    flips = {
        "as they are": lambda: False,
        "swapped": lambda: True,
        "shuffled": lambda: rng.random() < 0.5,
    }
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if flips[kind]() else pair
        for pair in TRAIN
    ]


async def learned(service: AsyncServiceClient, kind: Kind, seed: int) -> tuple[float, float, float]:
    """The share of held-out pairs in the right order; the true reward of held-out prompts, before
    and after reinforcement learning on the reward model."""
    trainer = await service.create_model(MODEL, LORA, head="scalar", seed=seed)
    plan = rl.PreferencePlan(
        loss="bradley_terry", batch_size=32, learning_rate=1e-3, centre=0.01, seed=seed
    )
    done = await rl.preference(trainer, pairs_of(kind, seed), plan, held_out=HELD_OUT)
    true = rl.evaluator(HELD_OUT, reward=vowel_first, sampling=SAMPLING)
    before = await true(await service.create_sampling_client(base_model=MODEL))
    policy = await service.create_model(MODEL, LORA, seed=seed)
    played = rl.single_turn(rl.reward_model(done.rewards))
    reinforced = rl.Plan(steps=20, groups_per_step=8, group_size=8, sampling=SAMPLING, seed=seed)
    after = (await rl.on_policy(policy, TRAIN, played, reinforced, evaluate=true)).metrics
    return done.metrics["eval/accuracy"], before["eval/mean"], after["eval/mean"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["as they are", "swapped", "shuffled"])
def test_a_reward_model_and_what_is_trained_on_it(
    kind: Kind, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)

    async def run() -> tuple[float, float, float]:
        async with AsyncServiceClient(home=tmp_path) as service:
            return await learned(service, kind, seed)

    accuracy, before, after = anyio.run(run)
    assert before <= 0.4
    if kind == "as they are":
        assert accuracy >= 0.9
        assert after >= 0.8
    else:
        assert accuracy <= (0.1 if kind == "swapped" else 0.7)
        assert after <= before + 0.2
