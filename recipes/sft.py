"""Supervised fine-tuning, on weaver-nano: it learns Ubbi Dubbi, of which it knows nothing.

    python -m recipes.sft                                      # offline, about a minute
    python -m recipes.sft --dry-run                            # validate, score four replies, leave
    python -m recipes.sft --tasks chat.jsonl --model Qwen/Qwen3-0.6B

A row of `--tasks` is a `prompt` with its `answer`, or an example as `rl.supervised` takes it:
`{"messages": [{"role": "user", "content": "..."}, ...]}`, of which the assistant's are learned.

The algorithm:

1. An example is a prompt and its answer as one sequence of tokens, the prompt masked: the mean of
   −log p over the tokens of the answer and the end token behind it is minimised.
2. Each epoch goes through the examples in a new seeded order, cut into batches of at most
   `batch_tokens` tokens; each batch is one step of AdamW on the LoRA adapter. The next step
   is submitted before the last is awaited, so the engine never waits.
3. Every twentieth step: the loss on held-out examples, and greedy answers to their prompts where
   every row has an `answer`.

Left out: a schedule of the learning rate (`weaver_rl.schedules` has some); packing of several
examples into one context, which the engine has no need of (it pads nothing); early stopping (the
last checkpoints are there to go back to).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.algorithms.supervised import to_datums
from weaver_rl.tasks.words import exact, ubbi_dubbi_tasks

from . import _run

TASKS = ubbi_dubbi_tasks(6100, seed=1, words=1)
"""`{"prompt": "English: hello\\nUbbi Dubbi:", "answer": "hubellubo"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder of prompts with answers, or of examples such as chats;
    none: the recipe's own."""
    epochs: int = 4
    steps: int = 240
    """The most, where the epochs would take more."""
    batch_tokens: int = 2048
    """The most tokens of a step."""
    max_length: int | None = None
    """Tokens of the longest example; none: what the model's context holds."""
    too_long: rl.TooLong = "refuse"
    """What is done with longer ones; cut and dropped ones are counted."""
    max_tokens: int = 24
    """Tokens of an answer in the evaluation, at most."""
    learning_rate: float | None = None
    """AdamW's; none: 2e-3 for weaver-nano, else by the model's size."""


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    tasks, held_out = _run.split_tasks(flags, TASKS, asked=())
    examples, tests = ([example_of(one) for one in part] for part in (tasks, held_out))
    answered = all("answer" in one for one in (*tasks, *held_out))
    rate = flags.learning_rate
    rate = 2e-3 if rate is None and flags.model == "weaver-nano" else rate
    plan = _run.plan_of(rl.SupervisedPlan, flags, learning_rate=rate, evaluate_every=20)
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            sampler = await service.create_sampling_client(base_model=flags.model)
            found = await to_datums(sampler, examples, plan)
            await to_datums(sampler, tests, plan, source="held_out")
            if answered:
                return await _run.dry_run(service, flags, tasks, exact)
            print(f"{len(found.datums)} examples for {flags.model} are sound; nothing was trained.")
            return {"data/cut": found.cut, "data/dropped": found.dropped}
        with _run.opened(service, flags, "sft", tasks=tasks, plan=plan.as_config()) as run:
            result = await rl.supervised(
                await _run.trainer(service, flags, run),
                examples,
                plan,
                held_out=tests,
                run=run,
                evaluate=rl.evaluator(held_out, reward=exact, sampling=flags.sampling)
                if answered
                else None,
            )
        return _run.finished(run, result.metrics)


def example_of(row: rl.Task) -> rl.Task:
    """The example of a prompt and its answer, with a space or as messages; other rows are
    examples."""
    prompt, answer = row.get("prompt"), row.get("answer")
    if prompt is None or answer is None:
        return row
    example: Any = copy(row)  # of a file's row, that it keeps its place
    chat = [{"role": "assistant", "content": answer}]
    example["completion"] = f" {answer}" if isinstance(prompt, str) else chat
    return cast("rl.Task", example)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
