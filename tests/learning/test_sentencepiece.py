"""A model learns and is sampled with a tokenizer as SentencePiece's, beside one that must not.

From random weights, a tiny model learns to say two words the other way round. What it is asked
about was never trained on, and an answer counts only if it is said to the letter and ended: so the
text that is learned must be that which is sampled, spaces and end included.
"""

from __future__ import annotations

from itertools import permutations
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.algorithms.supervised import SupervisedPlan, supervised
from weaver_rl.evaluation import evaluate
from weaver_rl.schedules import cosine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.zoo import Zoo
    from weaver_rl.types import Reply, Task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORDS = "cat sat it is Yes No The What answer user a at assistant b c sit cap tea inn yes".split()
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def tasks() -> list[Task]:
    pairs = list(permutations(WORDS, 2))
    Random(0).shuffle(pairs)
    return [
        {"prompt": [{"role": "user", "content": f"{a} {b}"}], "answer": f"{b} {a}"}
        for a, b in pairs
    ]


def said(task: Task, reply: Reply) -> float:
    return float(reply.text.strip() == task["answer"] and reply.stop_reason == "stop")


def save_model(folder: Path, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("answers", ["right", "of others"])
def test_two_words_are_said_the_other_way_round(
    answers: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    save_model(tmp_path / "model", zoo.tokenizer("phi3"))
    given, held_out = tasks()[:320], tasks()[320:]
    told = [task["answer"] for task in given]
    if answers == "of others":
        Random(1).shuffle(told)
    examples = [
        {"messages": [*task["prompt"], {"role": "assistant", "content": answer}]}
        for task, answer in zip(given, told, strict=True)
    ]

    async def learn() -> float:
        async with AsyncServiceClient(home=tmp_path / "home") as service:
            trainer = await service.create_model(str(tmp_path / "model"), training_mode="full_ft")
            plan = SupervisedPlan(
                epochs=24,
                batch_tokens=512,
                learning_rate=lambda step: cosine(3e-3, step, steps=320),
            )
            done = await supervised(trainer, examples, plan)
            found = await evaluate(done.sampler, held_out, reward=said, sampling=GREEDY)
            assert found.mean is not None
            return found.mean.value

    value = anyio.run(learn)
    assert value >= 0.8 if answers == "right" else value <= 0.05
