"""Distillation, on weaver-nano: it learns what it would have said to another prompt.

    python -m recipes.distillation                               # offline, under a minute
    python -m recipes.distillation --lmbda 0 --beta 0            # off policy, by the forward KL
    python -m recipes.distillation --dry-run                     # validate all rows, and leave
    python -m recipes.distillation --tasks rows.jsonl --model my/student --teacher my/teacher

A row of `--tasks` has a `prompt`, text or messages; with a `completion` that is the reply, where
the student samples none; with a `teacher_prompt` the teacher reads that instead; with an `answer`
the student is evaluated by it. The teacher is another model (`--teacher`), or the same one as it
was. The recipe's own rows ask to reverse a word, while the teacher is asked to copy it: so the
student, who could only do as it was asked, learns to do as its teacher was.

The algorithm, GKD (arXiv:2306.13649) with a context that the student has not (arXiv:2209.15189):

1. A share λ (`--lmbda`) of a batch's prompts is answered by the student as it is now, the others by
   the teacher.
2. The teacher tells its K likeliest tokens at each token of the replies, behind its own prompt.
3. The student's divergence from them and the rest as one more token is minimised by one step of
   AdamW on the LoRA adapter: `--beta` 0 is the forward KL, 1 the reverse KL.
4. Every twentieth step: greedy answers to held-out prompts.

Left out: rewards beside it, for which `rl.credit.distil(teacher, top_k=)` is a credit of `rl.Plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.tasks.words import exact, reverse_tasks

from . import _run

ROWS: list[rl.Task] = [
    {"prompt": one["prompt"], "teacher_prompt": f"copy:{word}=", "answer": word}
    for one in reverse_tasks(1100, seed=1)
    for word in [one["answer"][::-1]]
]
"""`{"prompt": "rev:abc=", "teacher_prompt": "copy:abc=", "answer": "abc"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder of prompts; none: the recipe's own."""
    teacher: str | None = None
    """Another model, or a checkpoint's path, `weaver://...`; none: the student as it was."""
    beta: float = 1.0
    """0: forward KL; 1: reverse KL; between them the Jensen-Shannon divergence of GKD."""
    lmbda: float = 1.0
    """The share of replies that the student samples."""
    top_k: int = 32
    """Tokens of each place that the teacher tells."""
    temperature: float = 1.0
    """Of both distributions, among those tokens."""
    epochs: int = 2
    steps: int = 60
    """The most, where the epochs would take more."""
    batch_size: int = 32
    """Replies of a step."""
    max_length: int | None = None
    """Tokens of the longest prompt with its given reply; none: what the model's context holds."""


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    rows, held_out = _run.split_tasks(flags, ROWS, asked=())
    plan = _run.plan_of(rl.DistilPlan, flags, evaluate_every=20)
    evaluate = None
    if held_out and all({"prompt", "answer"} <= row.keys() for row in held_out):
        evaluate = rl.evaluator(held_out, reward=exact, sampling=flags.sampling)
    async with AsyncServiceClient(flags.base_url) as service:
        name = flags.teacher or flags.model
        teacher = await (
            service.create_sampling_client(name)
            if name.startswith("weaver://")
            else service.create_sampling_client(base_model=name)
        )
        if flags.dry_run:
            student = await service.create_sampling_client(base_model=flags.model)
            await rl.check_distil(student, [*rows, *held_out], plan, teacher=teacher)
            print(f"{len(rows)} rows for {flags.model} and {name} are sound; nothing was trained.")
            return {}
        config = {"teacher": name, **plan.as_config()}
        with _run.opened(service, flags, "distillation", tasks=rows, plan=config) as run:
            result = await rl.distil(
                await _run.trainer(service, flags, run),
                rows,
                plan,
                teacher=teacher,
                held_out=held_out,
                run=run,
                evaluate=evaluate,
            )
        if held_out:
            print(f"Of held-out tokens {result.metrics['eval/agreement']:.3f} are the teacher's")
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
