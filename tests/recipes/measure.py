"""Runs every recipe over seeds, as a user would, and writes the numbers into two pages.

    python -m tests.recipes.measure --seeds 0 1 2
    python -m tests.recipes.measure --pages credit --only turns kl

`recipes/README.md` gets the recipes without a flag, and the gallery their curves;
`docs/objectives.md` gets the curve of each objective, other pages those of `cards`. A recipe's run
is a process of its own, whose CPU time includes loading. What stands between a page's marks is
replaced; the rest is written by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import TYPE_CHECKING

import anyio
import numpy as np
import tyro

import weaver
from tests.recipes import gallery
from tests.recipes.cards import CARDS, Card
from weaver import AsyncServiceClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weaver_rl.proofs import Outcome

NANO = Path(weaver.__file__).parent / "models" / "nano" / "model.safetensors"
ROOT = Path(__file__).parents[2]
RECIPES = {
    "sft": ("train/loss", "loss"),
    "rejection_sampling": ("reward/mean", "mean reward"),
    "importance_sampling": ("reward/mean", "mean reward"),
    "preference": ("train/accuracy", "pairs right"),
    "reward_model": ("reward/mean", "mean score of the policy's replies"),
    "distillation": ("train/loss", "loss"),
    "custom_reward": ("reward/mean", "mean reward"),
    "agent": ("reward/mean", "games won"),
}
"""The metric whose curve is shown, and its name for people."""
OBJECTIVES = ("importance_sampling", "ppo", "cispo", "gspo", "dro", "cross_entropy")
GRPO = "--advantage standardised"
PAPERS = {
    "cispo_paper": f"{GRPO} --objective cispo --minibatches 16 --learning-rate 5e-4",
    "gspo_paper": f"{GRPO} --objective gspo --minibatches 4",
}
"""Objectives as their papers use them: one pass, cut into so many optimizer steps. CISPO's 192 in
all are at a quarter of the rate of the others' 48."""
REUSE = "--steps 12 --groups-per-step 16 --learning-rate 2e-3"
"""Flags under which the objectives differ: with one pass they are the same."""
PAGES = tuple(dict.fromkeys(("recipes", "objectives", *(one.page for one in CARDS.values()))))
BARS = "▁▂▃▄▅▆▇█"
POINTS = 24
"""Of a curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one recipe."""

    held_out: float
    curve: tuple[float, ...]
    cpu_s: float
    """Seconds, user and system, of all its threads: those of the clock depend on other work."""


def main(
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    pages: tuple[str, ...] = PAGES,
    only: tuple[str, ...] = (),
) -> None:
    """Measures one run after the other; about an hour of one core.

    Args:
        pages: recipes, objectives, and those of the cards.
        only: these of a page; none: all.
    """
    for name in pages:
        page = path_of(name)
        for mark, text in texts(name, seeds).items():
            if not only or mark in only:
                fill(page, mark, f"{text().rstrip()}\n")
        if not only:
            fill(page, "measured", f"Measured by `python -m tests.recipes.measure` {machine()}\n")


def path_of(page: str) -> Path:
    return ROOT / ("recipes/README.md" if page == "recipes" else f"docs/{page}.md")


def texts(page: str, seeds: Sequence[int]) -> dict[str, Callable[[], str]]:
    """What stands between the marks of a page, measured when it is called."""
    if page == "recipes":
        return {name: partial(recipe_table, name, seeds) for name in RECIPES}
    cards: dict[str, Callable[[], str]] = {
        mark: partial(measured_card, one, mark, seeds)
        for mark, one in CARDS.items()
        if one.page == page
    }
    if page == "objectives":
        reuse = {name: f"{REUSE} --passes 4 --objective {name}" for name in OBJECTIVES}
        papers = {mark: f"{REUSE} {flags}" for mark, flags in PAPERS.items()}
        for mark, flags in {**reuse, **papers}.items():
            cards[mark] = partial(objective_card, flags.split(), seeds)
    return cards


def recipe_table(name: str, seeds: Sequence[int]) -> str:
    runs = [measure(name, seed) for seed in seeds]
    gallery.keep(
        name,
        RECIPES[name][1],
        {seed: (run.held_out, run.curve) for seed, run in zip(seeds, runs, strict=True)},
    )
    return table(name, runs, seeds)


def objective_card(flags: Sequence[str], seeds: Sequence[int]) -> str:
    return card([measure("importance_sampling", seed, flags) for seed in seeds])


def measured_card(one: Card, mark: str, seeds: Sequence[int]) -> str:
    """Runs a card of `cards` here, each seed with a home of its own."""
    outcomes = [anyio.run(run_card, one, mark, seed) for seed in seeds]
    runs = [Measured(held_out=out.value, curve=out.curve, cpu_s=0.0) for out in outcomes]
    note = f"; {outcomes[0].note}" if outcomes[0].note else ""
    return card(runs, end=one.end, low=one.low, high=one.high) + note


async def run_card(one: Card, mark: str, seed: int) -> Outcome:
    with tempfile.TemporaryDirectory() as home:
        async with AsyncServiceClient(home=Path(home)) as service:
            outcome = await one.run(service, seed)
    print(mark, seed, f"{outcome.value:.3f}", outcome.note, flush=True)
    return outcome


def measure(name: str, seed: int, flags: Sequence[str] = ()) -> Measured:
    """Runs a recipe with these flags, its seed and its folder."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", f"recipes.{name}", "--seed", str(seed), "--out", "run"]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "WEAVER_HOME": f"{place}/home", "PYTHONPATH": path}
        before = children_cpu_s()
        done = subprocess.run(
            [*command, *flags],
            cwd=place,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        cpu_s = children_cpu_s() - before
        (said,) = [line for line in done.stdout.splitlines() if line.startswith("Held out")]
        last = max(Path(place, "run").rglob("metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        rows = [json.loads(line) for line in last.open()]  # of two runs, that of the policy
        curve = tuple(float(row[RECIPES[name][0]]) for row in rows if row["step"])
    print(name, *flags, seed, said, f"{cpu_s:.0f} s", flush=True)
    return Measured(held_out=float(said.split()[3]), curve=curve, cpu_s=cpu_s)


def children_cpu_s() -> float:
    """Seconds of all processes that this one started and that have ended."""
    usage = getrusage(RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(name: str, runs: Sequence[Measured], seeds: Sequence[int]) -> str:
    """The measured part of the recipes' page about one of them."""
    head = f"{RECIPES[name][1]}, first → last 5 of {len(runs[0].curve)} steps"
    rows = "".join(
        f"| {seed} | {run.held_out:.3f} | {np.mean(run.curve[:5]):.3f} → "
        f"{np.mean(run.curve[-5:]):.3f} | `{sparkline(run.curve)}` | {run.cpu_s:.0f} s |\n"
        for seed, run in zip(seeds, runs, strict=True)
    )
    return f"| seed | held out, greedy | {head} | curve | CPU |\n|---|---|---|---|---|\n{rows}"


def card(
    runs: Sequence[Measured], *, end: str = "held out", low: float = 0.0, high: float = 1.0
) -> str:
    """The measured line of a card: means over the seeds, and the ends of each."""
    curve = np.mean([run.curve for run in runs], axis=0)
    ends = ", ".join(f"{run.held_out:.2f}" for run in runs)
    return (
        f"`{sparkline(curve, low=low, high=high)}` {curve[:2].mean():.2f} → "
        f"{curve[-3:].mean():.2f}, {end} {ends}"
    )


def sparkline(
    curve: Sequence[float], *, low: float | None = None, high: float | None = None
) -> str:
    """A curve as one line of bars from `low` to `high`, by default its own; averaged to points."""
    parts = np.array([part.mean() for part in np.array_split(curve, min(POINTS, len(curve)))])
    low = parts.min() if low is None else low
    high = parts.max() if high is None else high
    share = np.clip((parts - low) / ((high - low) or 1.0), 0.0, 1.0)
    return "".join(BARS[round(float(value) * (len(BARS) - 1))] for value in share)


def machine() -> str:
    """What the numbers were measured on."""
    model = hashlib.sha256(NANO.read_bytes()).hexdigest()[:8]
    return (
        f"on {os.cpu_count()} CPU cores\n({platform.machine()}, load {os.getloadavg()[0]:.0f}), "
        f"with the weaver-nano whose weights have the SHA-256 {model}..."
    )


def fill(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between `<!-- MARK: begin -->` and `<!-- MARK: end -->`."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", re.DOTALL)
    filled, count = pattern.subn(lambda found: f"{found[1]}{text}{found[2]}", page.read_text())
    assert count == 1, f"{page} has {count} parts marked {mark!r}"
    page.write_text(filled)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
