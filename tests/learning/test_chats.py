"""A chat that is learned is what sampling the same chat gives, to its end, with every tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.zoo import TOKENIZERS, Zoo
from weaver import AsyncServiceClient, types
from weaver_rl.algorithms.supervised import SupervisedPlan, supervised

if TYPE_CHECKING:
    from pathlib import Path

ASKED = [{"role": "user", "content": "What is it?"}]
REPLY = {"role": "assistant", "content": "Yes. The cat."}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "plain"])
async def test_a_learned_chat_is_sampled_to_its_end(
    zoo: Zoo, name: str, home: Path, anyio_backend: str
) -> None:
    greedy = types.SamplingParams(max_tokens=24, temperature=0)
    folder = str(zoo.model("llama", name))
    async with AsyncServiceClient(home=home) as service:
        trainer = await service.create_model(folder, training_mode="full_ft")
        before = await trainer.save_weights_and_get_sampling_client()
        untaught = (await before.sample(ASKED, greedy)).sequences[0]
        plan = SupervisedPlan(epochs=30, learning_rate=1e-2)
        learned = await supervised(trainer, [{"messages": [*ASKED, REPLY]}], plan)
        (said,) = (await learned.sampler.sample(ASKED, greedy)).sequences
    assert untaught.text != REPLY["content"]
    assert (said.text.strip(), said.stop_reason) == (REPLY["content"], "stop")
