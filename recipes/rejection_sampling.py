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

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import tyro

import weaver_rl as rl
from recipes import _run
from weaver import AsyncServiceClient
from weaver.types import SamplingParams
from weaver_rl.tasks.words import exact, reverse_tasks

if TYPE_CHECKING:
    from collections.abc import Mapping

TASKS = reverse_tasks(1100, seed=1)
"""`{"prompt": "rev:abc=", "answer": "cba"}`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    model: str = "weaver-nano"
    """A bundled model, a Hugging Face id or a local folder."""
    tasks: str | None = None
    """JSONL, Parquet or a dataset's folder with `prompt` and `answer`; none: TASKS."""
    held_out: int = 100
    """Tasks that are only evaluated."""
    steps: int = 60
    """Rounds."""
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
    max_tokens: int = 12
    learning_rate: float = 1e-3
    rank: int = 8
    seed: int = 0
    out: Path | None = None
    """The run's folder; none: a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out behind its last checkpoint, exactly."""
    dry_run: bool = False
    """Validate everything, score four replies, and leave."""
    base_url: str | None = None
    """A Weaver server; none: WEAVER_BASE_URL, or this process."""
    wandb_project: str | None = None


def main(flags: Flags) -> Mapping[str, float]:
    """Trains, evaluates and reports; answers the metrics of the end."""
    return anyio.run(train, flags)


async def train(flags: Flags) -> Mapping[str, float]:
    asked = ("prompt", "answer")
    everything = rl.read_tasks(Path(flags.tasks), fields=asked) if flags.tasks else TASKS
    tasks, held_out = rl.split_tasks(everything, held_out=flags.held_out)
    keep = rl.Keep(threshold=flags.threshold, top_k=flags.top_k, unique=flags.unique)
    plan = rl.Plan(
        steps=flags.steps,
        groups_per_step=flags.groups_per_step,
        group_size=flags.group_size,
        learning_rate=flags.learning_rate,
        sampling=SamplingParams(max_tokens=flags.max_tokens),
        evaluate_every=10,
        seed=flags.seed,
    )
    lora = {"rank": flags.rank, "alpha": 4 * flags.rank}
    async with AsyncServiceClient(flags.base_url) as service:
        if flags.dry_run:
            return await _run.dry_run(
                service, flags.model, tasks=tasks, reward=exact, max_tokens=flags.max_tokens
            )
        with _run.opened(
            "rejection-sampling",
            service,
            config={
                "model": flags.model,
                "lora": lora,
                "tasks": flags.tasks,
                "keep": asdict(keep),
                **plan.as_config(),
            },
            out=flags.out,
            steps=flags.steps,
            resume=flags.resume,
            wandb_project=flags.wandb_project,
        ) as run:
            trainer = await service.create_model(flags.model, lora, seed=flags.seed)
            result = await rl.rejection(
                trainer,
                tasks,
                rl.single_turn(exact),
                plan,
                keep=keep,
                run=run,
                evaluate=_run.greedily(held_out, exact, max_tokens=flags.max_tokens),
            )
        return _run.finished(run, result.metrics)


if __name__ == "__main__":
    _run.leave(partial(main, tyro.cli(Flags, description=__doc__)))
