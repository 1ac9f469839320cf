"""The script behind the measured tables: what it writes, and that the pages have a place for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.recipes import measure
from tests.recipes.measure import Measured

if TYPE_CHECKING:
    from pathlib import Path

RUNS = [
    Measured(held_out=0.9, curve=(0.0, 0.25, 0.5, 1.0), cpu_s=41.6),
    Measured(held_out=1.0, curve=(0.0, 0.75, 0.5, 1.0), cpu_s=39.0),
]


def test_a_recipe_is_a_row_for_each_seed() -> None:
    head, _, first, second = measure.table("sft", RUNS, (3, 5)).splitlines()
    assert "loss, first → last 5 of 4 steps" in head
    assert first == "| 3 | 0.900 | 0.438 → 0.438 | `▁▃▅█` | 42 s |"
    assert second.startswith("| 5 | 1.000 |")


def test_an_objective_is_the_mean_of_its_seeds() -> None:
    assert measure.card(RUNS) == "`▁▅▅█` 0.25 → 0.67, held out 0.90, 1.00"


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    for text in ("new\n", "newer \\1\n"):
        measure.fill(page, "x", text)
        assert page.read_text() == f"a\n<!-- x: begin -->\n{text}<!-- x: end -->\nb\n"
    with pytest.raises(AssertionError, match="0 parts marked 'y'"):
        measure.fill(page, "y", "")


@pytest.mark.parametrize(
    ("page", "marks"),
    [
        ("recipes/README.md", ("measured", *measure.RECIPES)),
        ("docs/objectives.md", ("measured", *measure.OBJECTIVES)),
    ],
)
def test_the_pages_have_their_marks(page: str, marks: tuple[str, ...]) -> None:
    text = (measure.ROOT / page).read_text()
    assert all(text.count(f"<!-- {mark}: begin -->\n") == 1 for mark in marks)
