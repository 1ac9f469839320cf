"""Supervised fine-tuning, on weaver-nano: it learns pig latin from given answers.

    python -m recipes.sft                                      # offline, about a minute
    python -m recipes.sft --dry-run                            # validate, score four replies, leave
    python -m recipes.sft --tasks my.jsonl --model Qwen/Qwen3-0.6B

The algorithm:

1. An example is a prompt and its answer as one sequence of tokens, the prompt masked: the mean of
   −log p over the tokens of the answer and the end token behind it is minimised.
2. Each epoch goes through the examples in a new seeded order, cut into batches of at most
   `batch_tokens` tokens; each batch is one step of AdamW on the LoRA adapter. The next step
   is submitted before the last is awaited, so the engine never waits.
3. Every twentieth step: the loss on held-out examples, and greedy answers to their prompts.

Left out: a schedule of the learning rate (`weaver_rl.schedules` has some); packing of several
examples into one context, which the engine has no need of (it pads nothing); early stopping (the
last checkpoints are there to go back to).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import tyro

import weaver_rl as rl
from recipes import _run
from weaver import AsyncServiceClient
from weaver_rl.loops.supervised import to_datums
from weaver_rl.tasks.words import exact, pig_latin_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

TASKS = pig_latin_tasks(6100, seed=1)
"""`{"prompt": "English: hello world\\nPig Latin:", "answer": "ello-hay orld-way"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    epochs: int = 2
    steps: int = 150
    """The most, where the epochs would take more."""
    batch_tokens: int = 2048
    """The most tokens of a step."""
    max_tokens: int = 40
    """Of an answer in the evaluation."""
    learning_rate: float = 2e-3


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


async def train(flags: Flags) -> Mapping[str, float]:
    tasks, held_out = _run.split_tasks(flags, TASKS)
    examples, tests = (
        [{"prompt": one["prompt"], "completion": f" {one['answer']}"} for one in part]
        for part in (tasks, held_out)
    )
    plan = rl.SupervisedPlan(
        epochs=flags.epochs,
        steps=flags.steps,
        batch_tokens=flags.batch_tokens,
        learning_rate=flags.learning_rate,
        evaluate_every=20,
        seed=flags.seed,
    )
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            sampler = await service.create_sampling_client(base_model=flags.model)
            await to_datums(sampler, examples, plan)
            await to_datums(sampler, tests, plan, source="held_out")
            return await _run.dry_run(service, flags, tasks, exact)
        with _run.opened(service, flags, "sft", tasks=tasks, plan=plan.as_config()) as run:
            result = await rl.supervised(
                await service.create_model(flags.model, flags.lora, seed=flags.seed),
                examples,
                plan,
                held_out=tests,
                run=run,
                evaluate=rl.evaluator(held_out, reward=exact, sampling=flags.sampling),
            )
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
