"""Runs every recipe over seeds, as a user would, and writes the numbers into two pages.

    python -m tests.recipes.measure --seeds 0 1 2

`recipes/README.md` gets the recipes without a flag; `docs/objectives.md` gets the curve of each
objective. Each run is a process of its own, whose CPU time includes loading. What stands between a
page's marks is replaced; the rest is written by hand.
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
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

import weaver

if TYPE_CHECKING:
    from collections.abc import Sequence

NANO = Path(weaver.__file__).parent / "models" / "nano" / "model.safetensors"
ROOT = Path(__file__).parents[2]
RECIPES = {
    "sft": ("train/loss", "loss"),
    "rejection_sampling": ("reward/mean", "mean reward"),
    "importance_sampling": ("reward/mean", "mean reward"),
    "custom_reward": ("reward/mean", "mean reward"),
}
"""The metric whose curve is shown, and its name for people."""
OBJECTIVES = ("importance_sampling", "ppo", "cispo", "gspo", "dro", "cross_entropy")
REUSE = "--steps 12 --groups-per-step 16 --passes 4 --learning-rate 2e-3"
"""Flags under which the objectives differ: with one pass they are the same."""
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
    pages: tuple[Literal["recipes", "objectives"], ...] = ("recipes", "objectives"),
) -> None:
    """Measures one run after the other; about half an hour of one core."""
    if "recipes" in pages:
        page = ROOT / "recipes" / "README.md"
        for name in RECIPES:
            runs = [measure(name, seed) for seed in seeds]
            fill(page, name, table(name, runs, seeds))
        fill(page, "measured", f"Measured by `python -m tests.recipes.measure` {machine()}\n")
    if "objectives" in pages:
        page = ROOT / "docs" / "objectives.md"
        for name in OBJECTIVES:
            flags = [*REUSE.split(), "--objective", name]
            runs = [measure("importance_sampling", seed, flags) for seed in seeds]
            fill(page, name, f"{card(runs)}\n")
        fill(page, "measured", f"Measured by `python -m tests.recipes.measure` {machine()}\n")


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
        rows = [json.loads(line) for line in Path(place, "run/metrics.jsonl").open()]
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


def card(runs: Sequence[Measured]) -> str:
    """The measured line of an objective: means over the seeds, and the held-out ends of each."""
    curve = np.mean([run.curve for run in runs], axis=0)
    ends = ", ".join(f"{run.held_out:.2f}" for run in runs)
    return (
        f"`{sparkline(curve, low=0.0, high=1.0)}` {curve[:2].mean():.2f} → "
        f"{curve[-3:].mean():.2f}, held out {ends}"
    )


def sparkline(
    curve: Sequence[float], *, low: float | None = None, high: float | None = None
) -> str:
    """A curve as one line of bars from `low` to `high`, by default its own; averaged to points."""
    parts = np.array([part.mean() for part in np.array_split(curve, min(POINTS, len(curve)))])
    low = parts.min() if low is None else low
    high = parts.max() if high is None else high
    share = (parts - low) / ((high - low) or 1.0)
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
