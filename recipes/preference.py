"""Preferences, on weaver-nano: it learns from pairs which of two replies is liked.

    python -m recipes.preference                               # offline, under a minute
    python -m recipes.preference --loss simpo
    python -m recipes.preference --dry-run                     # validate all pairs, and leave
    python -m recipes.preference --tasks pairs.jsonl --model Qwen/Qwen3-0.6B

A row of `--tasks` is `{"prompt": ..., "chosen": ..., "rejected": ...}`, texts or lists of messages.
The recipe's own pairs are two random replies each, of which the one that begins with a vowel is
preferred; the base model knows nothing of it.

The algorithm, DPO (arXiv:2305.18290):

1. What the policy says of all replies is kept as it is before the first step: log π_ref.
2. A step takes a batch of pairs and minimises −log σ(β·Δ), Δ = log π/π_ref of the chosen reply less
   that of the rejected one, by one step of AdamW on the LoRA adapter.
3. Every twentieth step: the share of held-out pairs whose chosen reply has the larger log π/π_ref.

Other losses (`--loss`) are functions of the same sums; `weaver_rl/preference_losses.py` has them.

Left out: a loss of likelihood beside DPO's, which helps where both replies become unlikely (look at
`train/chosen_logprob`: in DPO only the difference counts, and it may fall).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import anyio
import tyro

import weaver_rl as rl
from weaver import AsyncServiceClient
from weaver_rl.tasks.words import preference_pairs, vowel_first

from . import _run

PAIRS = preference_pairs(1100, seed=1)
"""`{"prompt": "rev:abcd=", "chosen": "ozvq", "rejected": "kwib"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(_run.Flags):
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder of pairs; none: the recipe's own."""
    loss: Literal["dpo", "ipo", "kto", "simpo", "orpo"] = "dpo"
    beta: float | None = None
    """How much the loss weighs its margin; none: its paper's."""
    epochs: int = 2
    steps: int = 60
    """The most, where the epochs would take more."""
    batch_size: int = 32
    """Pairs of a step."""
    max_length: int | None = None
    """Tokens of the longest prompt with its reply; none: what the model's context holds."""


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


@_run.once
async def train(flags: Flags) -> Mapping[str, float]:
    pairs, held_out = _run.split_tasks(flags, PAIRS, asked=())
    plan = _run.plan_of(rl.PreferencePlan, flags, evaluate_every=20)
    evaluate = None
    if flags.tasks is None:  # of these it is known what a reply is worth
        evaluate = rl.evaluator(held_out, reward=vowel_first, sampling=flags.sampling)
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            sampler = await service.create_sampling_client(base_model=flags.model)
            await rl.check_pairs(sampler, [*pairs, *held_out], plan)
            print(f"{len(pairs)} pairs for {flags.model} are sound; nothing was trained.")
            return {}
        with _run.opened(service, flags, "preference", tasks=pairs, plan=plan.as_config()) as run:
            result = await rl.preference(
                await _run.trainer(service, flags, run),
                pairs,
                plan,
                held_out=held_out,
                run=run,
                evaluate=evaluate,
            )
        print(f"Held-out pairs: {result.metrics.get('eval/accuracy', 0.5):.3f} right")
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(lambda: main(tyro.cli(Flags, description=__doc__)))
