"""The script behind the measured tables: what it writes, and that the pages have a place for it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.recipes import gallery, measure
from tests.recipes.cards import Card
from tests.recipes.measure import Measured
from weaver_rl.proofs import Outcome

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


@pytest.mark.parametrize("page", measure.PAGES)
def test_the_pages_have_their_marks_and_no_others(page: str) -> None:
    text = measure.path_of(page).read_text()
    wanted = {"measured", *measure.texts(page, (0,))}
    assert sorted(re.findall(r"<!-- (\w+): begin -->\n", text)) == sorted(wanted)
    empty = re.findall(r"<!-- \w+: begin -->\n<!-- \w+: end -->", text)
    assert not empty, "measure them"


def test_the_gallery_has_the_drawing_of_every_curve_that_is_kept() -> None:
    drawn = {name: gallery.drawing(name, one) for name, one in gallery.kept().items()}
    assert {file.stem: file.read_text() for file in gallery.FOLDER.glob("*.svg")} == drawn
    shown = re.findall(r"!\[([^]]*)\]\(gallery/(\w+)\.svg\)", gallery.PAGE.read_text())
    assert [name for _, name in shown] == list(measure.RECIPES)
    assert {name: said for said, name in shown} == {
        name: gallery.said(one) for name, one in gallery.kept().items()
    }


def test_a_curve_is_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "FOLDER", tmp_path)
    gallery.keep("one", "loss", {3: (0.5, [2.0, 1.0, 0.0])})
    gallery.keep("two", "loss", {0: (0.25, [0.5])})
    assert list(gallery.kept()) == ["one", "two"]
    drawing = (tmp_path / "one.svg").read_text()
    assert 'points="42.0,34.0 216.0,92.0 390.0,150.0"' in drawing
    assert "held out, greedy: 0.50" in drawing and "step 3" in drawing


def test_only_what_is_asked_for_is_measured_and_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(service: object, seed: int) -> Outcome:
        return Outcome(value=0.5 + seed, passed=True, curve=(-4.0, -2.0), note="a note")

    marks = "".join(f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n" for mark in "ab")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(marks)
    cards = {mark: Card("page", run, "ends", low=-4.0, high=0.0) for mark in "ab"}
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "CARDS", cards)
    measure.main(seeds=(0, 1), pages=("page",), only=("a",))
    said = "`▁▅` -3.00 → -3.00, ends 0.50, 1.50; a note"
    assert page.read_text() == marks.replace("a: begin -->\n", f"a: begin -->\n{said}\n", 1)
