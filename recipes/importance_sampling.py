"""Reinforcement learning by importance sampling, on weaver-nano: it learns to reverse words.

    python -m recipes.importance_sampling                      # offline, about a minute
    python -m recipes.importance_sampling --dry-run            # validate, score four replies, leave
    python -m recipes.importance_sampling --tasks my.jsonl --model Qwen/Qwen3-0.6B

Each step:

1. Publish the adapter's weights, and sample G replies to each of P prompts with them.
2. Score every reply. Its advantage A is its reward minus the mean reward of its group.
3. Minimise the mean of −r·A over all sampled tokens, by one step of AdamW on the LoRA adapter. r is
   a token's probability now over the one it was sampled with: 1 here, where the weights are the
   same, so this is REINFORCE with a baseline (Williams, 1992). With `--max-staleness 4 --correction
   ratio` sampling runs up to four steps ahead, while the engine trains, and r makes up for it.

Every tenth step held-out prompts are answered greedily.

Left out: a penalty for leaving the base model (`Objective(kl_loss=...)`); clipping (`--objective
ppo`); several passes over the same samples (`--passes 2`); division by the group's standard
deviation (`--advantage standardised`), with which it would be GRPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """P, prompts of a step."""
    group_size: int = 8
    """G, samples of each."""
    objective: str = "importance_sampling"
    """Or ppo, cispo, gspo, dro, cross_entropy."""
    advantage: str = "group_centred"
    """Or standardised, leave_one_out, reinforce_pp."""
    passes: int = 1
    """How often the samples of a step are trained on."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    max_staleness: int = 0
    """Steps by which sampling may run ahead of training; above 0, name a correction."""
    correction: Literal["ratio", "token", "sequence", "none"] | None = None
    """What makes up for samples of older weights."""
    max_logprob_gap: float | Literal["auto"] | None = "auto"
    """Nats by which trainer and sampler may differ on a token; auto: by the model's dtype."""


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    tasks, held_out = _run.split_tasks(flags, TASKS)
    objective = rl.Objective(loss_fn=flags.objective, correction=flags.correction)
    plan = _run.plan_of(rl.Plan, flags, objective=objective, evaluate_every=10)
    ahead = flags.max_staleness > 0  # where rollouts of several steps share the engine
    async with AsyncServiceClient(flags.base_url, deterministic=ahead) as service:
        if flags.dry_run:
            return await _run.dry_run(service, flags, tasks, exact)
        planned = {"reward": exact, **plan.as_config()}
        with _run.opened(service, flags, "importance-sampling", tasks=tasks, plan=planned) as run:
            result = await rl.off_policy(  # the synchronous on_policy where staleness is 0
                await _run.trainer(service, flags, run),
                tasks,
                rl.single_turn(exact),
                plan,
                run=run,
                evaluate=rl.evaluator(held_out, reward=exact, sampling=flags.sampling),
            )
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
