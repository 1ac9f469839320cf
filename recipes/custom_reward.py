"""A reward of your own in twelve lines, on weaver-nano: it learns to reverse words.

    python -m recipes.custom_reward                            # offline, under a minute
    python -m recipes.custom_reward --dry-run                  # try the reward on strange replies

The reward is the share of letters in their place: any function of the task and the reply that
returns a float will do. If it raises or hangs, the run says so; it is never taken for a zero. A run
that was stopped goes on where it was: give the same command again.

The README has the twelve lines; what is more here are the flags. Left out: everything else, which
`rl.train` does; `recipes.importance_sampling` shows what that is.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Literal

import tyro

import weaver_rl as rl
from weaver.types import SamplingParams

from . import _run

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["".join(Random(i).choices(LETTERS, k=3 + i % 4)) for i in range(600)]
TASKS = [{"prompt": f"rev:{word}=", "answer": word[::-1]} for word in WORDS]


def in_place(task: rl.Task, reply: rl.Reply) -> float:
    right: int = sum(a == b for a, b in zip(reply.text, task["answer"], strict=False))
    return right / max(len(reply.text), len(task["answer"]))


def main(
    *,
    steps: int = 40,
    seed: int = 0,
    max_logprob_gap: float | Literal["auto"] | None = "auto",
    out: str = "runs/custom_reward",
    dry_run: bool = False,
    base_url: str | None = None,
    wandb_project: str | None = None,
) -> float | None:
    """Trains, and answers the mean reward of held-out words; None for a dry run."""
    if dry_run:
        print(rl.check(in_place, TASKS))
        return None
    trained = rl.train(
        "weaver-nano",
        TASKS[100:],
        in_place,
        held_out=TASKS[:100],
        steps=steps,
        sampling=SamplingParams(max_tokens=12),
        seed=seed,
        max_logprob_gap=max_logprob_gap,
        folder=out,
        resume=True,
        base_url=base_url,
        wandb_project=wandb_project,
    )
    print(f"Held out, greedy: {trained.metrics['eval/mean']:.3f}\nReport: {trained.report}")
    return trained.metrics["eval/mean"]


if __name__ == "__main__":
    _run.leave(partial(tyro.cli, main, description=__doc__))
