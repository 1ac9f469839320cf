"""Runs every recipe over seeds, as a user would, and writes the numbers into `recipes/README.md`.

    python -m recipes._measure --seeds 0 1 2

Each run is a process of its own: its seconds include loading. What stands between the page's two
marks is replaced; the rest of the page is written by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import weaver

NANO = Path(weaver.__file__).parent / "models" / "nano" / "model.safetensors"
PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
RECIPES = {
    "sft": ("train/loss", "loss"),
    "rejection_sampling": ("reward/mean", "mean reward"),
    "importance_sampling": ("reward/mean", "mean reward"),
    "custom_reward": ("reward/mean", "mean reward"),
}
"""The metric whose curve is shown, and its name for people."""
BARS = "▁▂▃▄▅▆▇█"
POINTS = 24
"""Of a curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one recipe."""

    held_out: float
    curve: tuple[float, ...]
    seconds: float


def main(seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Measures all recipes one after the other; some minutes."""
    sections = [section(name, [measure(name, seed) for seed in seeds], seeds) for name in RECIPES]
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{machine()}\n\n{''.join(sections)}{END}{tail}")


def measure(name: str, seed: int) -> Measured:
    """Runs a recipe with no flag but its seed and its folder."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", f"recipes.{name}", "--seed", str(seed), "--out", "run"]
        path = os.pathsep.join(filter(None, (str(PAGE.parents[1]), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "WEAVER_HOME": f"{place}/home", "PYTHONPATH": path}
        begin = time.monotonic()
        done = subprocess.run(
            command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        seconds = time.monotonic() - begin
        (said,) = [line for line in done.stdout.splitlines() if line.startswith("Held out")]
        rows = [json.loads(line) for line in Path(place, "run/metrics.jsonl").open()]
        curve = tuple(float(row[RECIPES[name][0]]) for row in rows)
    return Measured(held_out=float(said.split()[3]), curve=curve, seconds=seconds)


def section(name: str, runs: list[Measured], seeds: tuple[int, ...]) -> str:
    """The measured part of the page about one recipe."""
    metric = RECIPES[name][1]
    rows = "".join(
        f"| {seed} | {run.held_out:.3f} | {np.mean(run.curve[:5]):.3f} → "
        f"{np.mean(run.curve[-5:]):.3f} | `{sparkline(run.curve)}` | {run.seconds:.0f} s |\n"
        for seed, run in zip(seeds, runs, strict=True)
    )
    return (
        f"### `python -m recipes.{name}`\n\n"
        f"| seed | held out, greedy | {metric}, first → last 5 of {len(runs[0].curve)} steps "
        f"| curve | time |\n|---|---|---|---|---|\n{rows}\n"
    )


def sparkline(curve: tuple[float, ...]) -> str:
    """A curve as one line of bars from its least to its greatest value, averaged into points."""
    parts = np.array([part.mean() for part in np.array_split(curve, min(POINTS, len(curve)))])
    share = (parts - parts.min()) / (np.ptp(parts) or 1.0)
    return "".join(BARS[round(float(value) * (len(BARS) - 1))] for value in share)


def machine() -> str:
    """What the numbers were measured on; a load above the cores means that times are too long."""
    model = hashlib.sha256(NANO.read_bytes()).hexdigest()[:8]
    return (
        f"Measured by `python -m recipes._measure` on {os.cpu_count()} CPU cores, load "
        f"{os.getloadavg()[0]:.0f} at the end,\n"
        f"with the weaver-nano whose weights have the SHA-256 {model}..."
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
