"""Teaches weaver-nano two skills in about a minute, shown as it learns: the whole of Weaver, once.

    make demo                                                # or: python -m recipes.demo
    python -m recipes.demo --cluster                         # the same, trained by two ranks

Fine-tuning, by the API's complete training loop:

1. Ask the bundled model for phrases in Ubbi Dubbi ("ub" before each vowel), of which it knows
   nothing: it was made without a word of it, and gets every one wrong.
2. Fine-tune a LoRA adapter on made-up words: `forward_backward` by cross-entropy on the answers,
   then `optim_step`, both submitted before the last step's loss is awaited.
3. Save a checkpoint, ask for the same phrases again, and compare: none was trained on.

Reinforcement learning, from a reward of one line: `rl.train` samples replies, scores them, and
makes the better ones likelier; it is told what is right, never shown it. The reward's curve rises
as it learns to reverse words, and the report shows every reply.

It fails, with exit code 1, unless half of the phrases are right then that were all wrong, and the
distance of the reward from 1 falls by more than half.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import weaver_rl as rl
from recipes._cluster import served
from weaver import SamplingClient, ServiceClient, TrainingClient, types
from weaver_rl.conversations import from_pieces
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import reverse_tasks, ubbi_dubbi, ubbi_dubbi_tasks

HELD_OUT = (
    "coffee table", "blue sky", "strong wind", "under water",
    "chess player", "new idea", "hello world", "magic garden",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    base_model: str = "weaver-nano"
    steps: int = 200
    """Steps of fine-tuning."""
    rl_steps: int = 40
    batch_size: int = 24
    learning_rate: float | None = None
    """None: by the model's size, twice as large for fine-tuning."""
    rank: int = 16
    seed: int = 0
    base_url: str | None = None
    """A Weaver server; none: WEAVER_BASE_URL, or this process."""
    cluster: bool = False
    """On a server that is started here, whose gradients two processes compute, placed by Ray
    (extras `server` and `cluster`). The numbers are those of one process."""


def main(flags: Flags) -> bool:
    """Runs the demo; answers whether both parts learned."""
    if flags.cluster:
        with served(flags.base_model) as address:
            return main(replace(flags, cluster=False, base_url=address))
    console = Console()
    console.rule("1 of 2: fine-tuning, Ubbi Dubbi")
    tuned = fine_tune(flags, console)
    console.rule("2 of 2: reinforcement learning from a reward, reversed words")
    rewarded = reinforce(flags, console)
    return tuned and rewarded


def fine_tune(flags: Flags, console: Console) -> bool:
    """Whether no held-out phrase was right before, and half of them are now."""
    with ServiceClient(flags.base_url) as service:
        trainer = service.create_model(flags.base_model, {"rank": flags.rank}, seed=flags.seed)
        before = answers(service.create_sampling_client(base_model=flags.base_model))
        losses = train(trainer, flags, console)
        checkpoint = trainer.save_state("ubbi-dubbi")
        after = answers(trainer.save_weights_and_get_sampling_client())
    console.print(comparison(before, after))
    first, last = losses[0], fmean(losses[-5:])
    console.print(f"Loss {first:.3f} → {last:.3f} (mean of the last 5 steps)")
    where = checkpoint.folder or "the server's home"
    console.print(f"Checkpoint {checkpoint.path}\n  in {where}", soft_wrap=True)
    return not any(map(is_right, HELD_OUT, before)) and 2 * sum(
        map(is_right, HELD_OUT, after)
    ) >= len(HELD_OUT)


def reinforce(flags: Flags, console: Console) -> bool:
    """Whether the mean reward came at least half as close to 1 as it was."""
    tasks = reverse_tasks(600, seed=1)
    folder = Path("runs", f"demo-{datetime.now():%Y%m%d-%H%M%S-%f}")
    trained = rl.train(
        flags.base_model,
        tasks[100:],
        backwards,
        held_out=tasks[:100],
        steps=flags.rl_steps,
        learning_rate=flags.learning_rate,
        sampling=types.SamplingParams(max_tokens=12),
        lora_config={"rank": flags.rank, "alpha": 4 * flags.rank},
        seed=flags.seed,
        folder=folder,
        base_url=flags.base_url,
    )
    rows = read_lines(folder / "metrics.jsonl")
    rewards: list[float] = [row["reward/mean"] for row in rows if row["step"]]
    if not console.is_terminal:  # there, the curve was drawn as it rose
        console.print("\n".join(rl.draw_curve(rewards, width=64, height=6)))
    first, last = fmean(rewards[:3]), fmean(rewards[-5:])
    console.print(f"Reward {first:.3f} → {last:.3f} (mean of the first 3 and the last 5 steps)")
    console.print(f"Held out, greedy: {trained.metrics['eval/mean']:.3f}")
    console.print(f"Report: {trained.report}", soft_wrap=True)
    return 1 - last < (1 - first) / 2


def backwards(task: rl.Task, reply: rl.Reply) -> float:
    return float(reply.text == task["answer"])


def train(trainer: TrainingClient, flags: Flags, console: Console) -> list[float]:
    """The training loop; answers the loss of every step, in nats per answer token."""
    tokenizer = trainer.get_tokenizer()
    size = flags.batch_size
    tasks = ubbi_dubbi_tasks(flags.steps * size, seed=flags.seed)
    rate = flags.learning_rate
    if rate is None:
        rate = 2 * rl.schedules.for_model(trainer.model_info.num_parameters)
    adam = types.AdamParams(learning_rate=rate, grad_clip_norm=1.0)
    losses: list[float] = []
    with closing(rl.Display(steps=flags.steps, stream=console.file)) as display:
        for step in range(flags.steps):
            datums = [
                from_pieces(tokenizer, [(one["prompt"], False), (f" {one['answer']}\n\n", True)])
                for one in tasks[step * size : (step + 1) * size]
            ]
            gradients = trainer.forward_backward(datums, "cross_entropy")
            trainer.optim_step(adam)
            losses.append(gradients.result().metrics["loss"])
            display.log({"train/loss": losses[-1]}, step + 1)
    return losses


def prompt_of(phrase: str) -> str:
    return f"English: {phrase}\nUbbi Dubbi:"


def is_right(phrase: str, said: str) -> bool:
    return said == ubbi_dubbi(phrase)


def answers(sampler: SamplingClient) -> list[str]:
    """The likeliest reply to each held-out phrase."""
    params = types.SamplingParams(max_tokens=40, temperature=0.0, stop=["\n"])
    results = sampler.sample([prompt_of(phrase) for phrase in HELD_OUT], params)
    return [result.sequences[0].text.strip() for result in results]


def comparison(before: list[str], after: list[str]) -> Table:
    table = Table("held out", "before", "after", title="The likeliest reply")
    for phrase, *said in zip(HELD_OUT, before, after, strict=True):
        colours = ("green" if is_right(phrase, one) else "red" for one in said)
        table.add_row(phrase, *map(Text, said, colours))
    return table


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Flags, description=__doc__)) else 1)
