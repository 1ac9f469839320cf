"""The pages in a browser: a recipe's report and the self-test's draw themselves, without errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes import rejection_sampling
from tests.recipes.test_recipes import short
from weaver_rl.cli import Ran, chosen, write_page
from weaver_rl.comparison import compare
from weaver_rl.proofs import Outcome

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ("--headless=new", "--no-sandbox", "--enable-logging=stderr", "--dump-dom")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def drawn(page: Path) -> str:
    """What a browser makes of the page: its HTML after its script ran."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *OPTIONS,
            f"--user-data-dir={Path('profile').resolve()}",
            page.resolve().as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=90,
    )
    assert not re.findall(r"CONSOLE.*", done.stderr)  # an error of the script, a refused script
    return done.stdout


def test_a_report() -> None:
    rows = short(rejection_sampling, "run", steps=3)
    page = drawn(Path("run/report.html"))
    assert f'aria-valuetext="step 3: {rows[-1]["reward/mean"]:.3g}"' in page
    assert page.count('class="tokens"') > 4
    assert page.count('class="t"') >= 30
    assert ">Second worst<" in page and ">groups_per_step<" in page


def test_a_self_test() -> None:
    outcome = Outcome(value=0.985, passed=True, curve=(0.5, 0.25, 0.125), note="a note")
    write_page(
        Path("page.html"),
        chosen(["supervised", "staleness 8"]),
        [Ran("supervised", 0, outcome, 3.0)],
    )
    page = drawn(Path("page.html"))
    assert "a note · 3 s" in page
    assert page.count('<path class="line"') == 1
    assert 'class="verdict passed">passed<' in page and 'class="verdict waiting">waits<' in page


def test_a_comparison() -> None:
    for seed in (0, 1):
        short(rejection_sampling, f"seed-{seed}", steps=2, seed=seed)
    page = drawn(compare(["seed-0", "seed-1"]).write_page(Path("comparison.html")))
    assert re.search(r'aria-valuetext="seed-0 step 2: [\d.]+; seed-1 step 2: [\d.]+"', page)
    assert page.count('type="checkbox"') == 2
    assert 'class="run-1"' in page and ">difference<" in page
