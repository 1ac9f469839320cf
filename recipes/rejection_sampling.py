"""Rejection sampling, on weaver-nano: it learns to reverse words from its own right answers.

    python -m recipes.rejection_sampling                       # offline, about a minute
    python -m recipes.rejection_sampling --dry-run             # validate, score four replies, leave
    python -m recipes.rejection_sampling --top-k 1 --threshold 0    # best of n

Each round (RAFT, Dong et al., arXiv:2304.06767; expert iteration, Anthony et al., 1705.08439):

1. Publish the adapter's weights, and sample G replies to each of P prompts with them.
2. Score every reply. Keep those with a reward of at least the threshold, the best `top_k` of a
   prompt first.
3. Cross-entropy on the tokens of what was kept, one step of AdamW on the LoRA adapter.

Every tenth round held-out prompts are answered greedily.

Equal replies are all kept here: a right answer has one spelling, and how often it is found is the
weight that a policy gradient would give it. `--unique` counts each once. Left out: restarts from
the first weights, and a store of what earlier rounds kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.tasks.words import exact, reverse_tasks

from . import _run

TASKS = reverse_tasks(1100, seed=1)
"""`{"prompt": "rev:abc=", "answer": "cba"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    groups_per_step: int = 32
    """P, prompts of a round."""
    group_size: int = 8
    """G, samples of each."""
    threshold: float = 1.0
    """The least reward that is kept."""
    top_k: int | None = None
    """The most replies to a prompt that are kept; none: all."""
    unique: bool = False
    """Keep equal replies to a prompt once."""
    max_logprob_gap: float | Literal["auto"] | None = "auto"
    """Nats by which trainer and sampler may differ on a token; auto: by the model's dtype."""


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    tasks, held_out = _run.split_tasks(flags, TASKS)
    keep = rl.Keep(threshold=flags.threshold, top_k=flags.top_k, unique=flags.unique)
    plan = _run.plan_of(rl.Plan, flags, evaluate_every=10)
    planned = {"keep": asdict(keep), "reward": exact, **plan.as_config()}
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            return await _run.dry_run(service, flags, tasks, exact)
        with _run.opened(service, flags, "rejection-sampling", tasks=tasks, plan=planned) as run:
            result = await rl.rejection(
                await _run.trainer(service, flags, run),
                tasks,
                rl.single_turn(exact),
                plan,
                keep=keep,
                run=run,
                evaluate=rl.evaluator(held_out, reward=exact, sampling=flags.sampling),
            )
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
