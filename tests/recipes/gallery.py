"""The drawings of docs/gallery.md: a recipe's curve over seeds, from numbers that are kept.

`tests.recipes.measure` keeps what it measured, and draws it; `python -m tests.recipes.gallery`
draws anew what is kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PAGE = Path(__file__).parents[2] / "docs/gallery.md"
FOLDER = PAGE.with_suffix("")
WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 390, 34, 150
"""Of the plot."""
LINE, TEXT, GRID = "#159a8c", "#7d7d7d", "#8886"
"""Seen on light and on dark pages: a picture does not know on which it is."""


class Kept(TypedDict):
    """Of one recipe: `{"metric": "loss", "held_out": [0.95], "curves": [[2.1, ..., 0.01]]}`"""

    metric: str
    seeds: list[int]
    held_out: list[float]
    curves: list[list[float]]
    """By seed, then step."""


def kept() -> dict[str, Kept]:
    file = FOLDER / "curves.json"
    found: dict[str, Kept] = json.loads(file.read_text()) if file.exists() else {}
    return found


def keep(name: str, metric: str, runs: Mapping[int, tuple[float, Sequence[float]]]) -> None:
    """Writes the runs of a recipe, held-out result and curve by seed, and draws them."""
    recipe = Kept(
        metric=metric,
        seeds=list(runs),
        held_out=[held_out for held_out, _ in runs.values()],
        curves=[[float(f"{value:.3g}") for value in curve] for _, curve in runs.values()],
    )
    lines = [
        f"{json.dumps(key)}: {json.dumps(one)}" for key, one in (kept() | {name: recipe}).items()
    ]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "curves.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draw(name, recipe)


def draw(name: str, recipe: Kept) -> None:
    """Its file, and what the page says in its place."""
    (FOLDER / f"{name}.svg").write_text(drawing(name, recipe))
    shown = f"(gallery/{name}.svg)"
    page = re.sub(rf"!\[[^]]*\]{re.escape(shown)}", f"![{said(recipe)}]{shown}", PAGE.read_text())
    PAGE.write_text(page)


def said(recipe: Kept) -> str:
    """`loss, 3.3 over the first five steps, 0.016 over the last`: means of all seeds."""
    curves = np.array(recipe["curves"])
    first, last = curves[:, :5].mean(), curves[:, -5:].mean()
    return f"{recipe['metric']}, {first:.2g} over the first five steps, {last:.2g} over the last"


def drawing(name: str, recipe: Kept) -> str:
    """An SVG: a thin line for each seed, a thick one for their mean, 0 and 1 within its scale."""
    curves = np.array(recipe["curves"])
    steps = curves.shape[1]
    low, high = float(min(0.0, curves.min())), float(max(1.0, curves.max()))

    def height(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    def line(curve: Sequence[float], width: float, opacity: float) -> str:
        points = " ".join(
            f"{LEFT + (RIGHT - LEFT) * at / max(steps - 1, 1):.1f},{height(value):.1f}"
            for at, value in enumerate(curve)
        )
        look = f'stroke="{LINE}" stroke-width="{width}" opacity="{opacity}"'
        return f'<polyline fill="none" {look} points="{points}"/>'

    def text(x: float, y: float, said: str, anchor: str = "start") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{said}</text>'

    held_out = ", ".join(f"{value:.2f}" for value in recipe["held_out"])
    seeds = ", ".join(map(str, recipe["seeds"]))
    rules = "".join(
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}" stroke="{GRID}"/>'
        for y in (TOP, (TOP + BOTTOM) / 2, BOTTOM)
    )
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'width="{WIDTH}" font-family="sans-serif" font-size="12" fill="{TEXT}">',
        f"<title>{name}: {recipe['metric']} by step; held out {held_out}</title>",
        rules,
        text(LEFT, 20, f"{recipe['metric']}, seeds {seeds} and their mean"),
        text(LEFT - 6, TOP + 4, f"{high:.2g}", "end"),
        text(LEFT - 6, BOTTOM + 4, f"{low:.2g}", "end"),
        text(LEFT, BOTTOM + 18, "step 1"),
        text(RIGHT, BOTTOM + 18, f"step {steps}", "end"),
        text(LEFT, BOTTOM + 36, f"held out, greedy: {held_out}"),
        *(line(curve, 1, 0.6) for curve in curves.tolist()),
        line(curves.mean(axis=0).tolist(), 2, 1),
        "</svg>",
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    for recipe in kept():
        draw(recipe, kept()[recipe])
