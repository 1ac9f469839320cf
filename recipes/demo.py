"""Teaches weaver-nano two skills in about a minute, shown as it learns: the whole of Weaver, once.

    make demo                                                # or: python -m recipes.demo

Fine-tuning, by the API's complete training loop:

1. Sample held-out phrases from the bundled model, which gets some of them right in pig latin.
2. Fine-tune a LoRA adapter on other phrases: `forward_backward` by cross-entropy on the answers,
   then `optim_step`, both submitted before the last step's loss is awaited.
3. Save a checkpoint, sample the same phrases again, and compare. No phrase shares a word with the
   held-out ones.

Reinforcement learning, from a reward of one line: `rl.train` samples replies, scores them, and
makes the better ones likelier; it is told what is right, never shown it. The reward's curve rises
as it learns to reverse words, and the report shows every reply.

It fails, with exit code 1, unless the loss falls by more than half, and the distance of the reward
from 1 as well.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from statistics import fmean

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import weaver_rl as rl
from weaver import SamplingClient, ServiceClient, TrainingClient, types
from weaver_rl.conversations import from_pieces
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import pig_latin, reverse_tasks

WORDS = """
    hello world banana split summer garden winter light river stone yellow flower music paper
    little train green apple open window silver moon purple cloud happy dog magic forest orange
    juice tiny planet golden bridge early bird simple secret brave knight quiet ocean
""".split()
HELD_OUT = ("coffee table", "blue sky", "strong wind", "under water", "chess player", "new idea")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    base_model: str = "weaver-nano"
    steps: int = 60
    """Steps of fine-tuning."""
    rl_steps: int = 40
    batch_size: int = 24
    learning_rate: float | None = None
    """None: by the model's size."""
    rank: int = 8
    seed: int = 0
    base_url: str | None = None
    """A Weaver server; none: WEAVER_BASE_URL, or this process."""


def main(flags: Flags) -> bool:
    """Runs the demo; answers whether both parts learned."""
    console = Console()
    console.rule("1 of 2: fine-tuning, pig latin")
    tuned = fine_tune(flags, console)
    console.rule("2 of 2: reinforcement learning from a reward, reversed words")
    rewarded = reinforce(flags, console)
    return tuned and rewarded


def fine_tune(flags: Flags, console: Console) -> bool:
    """Whether the loss fell by more than half."""
    with ServiceClient(flags.base_url) as service:
        trainer = service.create_model(flags.base_model, {"rank": flags.rank}, seed=flags.seed)
        before = answers(service.create_sampling_client(base_model=flags.base_model))
        losses = train(trainer, flags, console)
        checkpoint = trainer.save_state("pig-latin")
        after = answers(trainer.save_weights_and_get_sampling_client())
    console.print(comparison(before, after))
    first, last = losses[0], fmean(losses[-5:])
    console.print(f"Loss {first:.3f} → {last:.3f} (mean of the last 5 steps)")
    where = checkpoint.folder or "the server's home"
    console.print(f"Checkpoint {checkpoint.path}\n  in {where}", soft_wrap=True)
    return last < first / 2


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
    rng = Random(flags.seed)
    rate = flags.learning_rate or rl.schedules.for_model(trainer.model_info.num_parameters)
    adam = types.AdamParams(learning_rate=rate, grad_clip_norm=1.0)
    losses: list[float] = []
    with closing(rl.Display(steps=flags.steps, stream=console.file)) as display:
        for step in range(flags.steps):
            phrases = [" ".join(rng.sample(WORDS, 2)) for _ in range(flags.batch_size)]
            datums = [
                from_pieces(tokenizer, [(prompt_of(one), False), (f" {pig_latin(one)}\n\n", True)])
                for one in phrases
            ]
            gradients = trainer.forward_backward(datums, "cross_entropy")
            trainer.optim_step(adam)
            losses.append(gradients.result().metrics["loss"])
            display.log({"train/loss": losses[-1]}, step + 1)
    return losses


def prompt_of(phrase: str) -> str:
    return f"English: {phrase}\nPig Latin:"


def answers(sampler: SamplingClient) -> list[str]:
    """One sample, at temperature 1, for each held-out phrase."""
    params = types.SamplingParams(max_tokens=40, temperature=1.0, stop=["\n"], seed=0)
    results = sampler.sample([prompt_of(phrase) for phrase in HELD_OUT], params)
    return [result.sequences[0].text.strip() for result in results]


def comparison(before: list[str], after: list[str]) -> Table:
    table = Table("held out", "before", "after", title="Sampled at temperature 1")
    for phrase, *said in zip(HELD_OUT, before, after, strict=True):
        right = pig_latin(phrase)
        table.add_row(phrase, *(Text(s, "green" if s == right else "red") for s in said))
    return table


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Flags, description=__doc__)) else 1)
