"""Numbers and curves as text, for terminals: of `weaver runs watch` and of the loops' display."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weaver.keywords import suggesting

TELLING = ("reward/mean", "reward", "eval/mean", "train/loss", "loss")
"""What a run is judged by, the most telling first: in the console's list and by `runs watch`."""


def number_text(value: float) -> str:
    """Three or four figures: 0.531, 4,210, 1.2e-06."""
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 else f"{value:.1e}"


@suggesting
def draw_curve(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """A line of values as `height` rows of braille characters, the scale at the left.

    A character has 2 x 4 dots; values are averaged into the dot columns, or joined by lines.
    """
    low, high = min(values), max(values)
    columns = 2 * width
    if len(values) <= columns:
        dots = np.interp(np.linspace(0, len(values) - 1, columns), range(len(values)), values)
    else:
        dots = np.array([part.mean() for part in np.array_split(np.asarray(values), columns)])
    rows = 4 * height - 1
    levels = [round(float(value - low) / ((high - low) or 1.0) * rows) for value in dots]
    cells = [[0] * width for _ in range(height)]
    for x, level in enumerate(levels):
        before = levels[max(0, x - 1)]
        # Joins neighbours by a vertical stroke, so that a steep curve has no holes.
        for y in range(min(level, before + 1), max(level, before - 1) + 1):
            row, dot = divmod(rows - y, 4)
            cells[row][x // 2] |= BRAILLE[x % 2][dot]
    names = {0: number_text(high), height - 1: number_text(low)}
    margin = max(map(len, names.values()))
    return [
        f"{names.get(i, ''):>{margin}} │{''.join(chr(0x2800 + cell) for cell in row)}"
        for i, row in enumerate(cells)
    ]


BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the dots of a braille character: left and right column, from the top."""
