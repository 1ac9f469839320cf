"""Each benchmark runs, at its smallest: that its figures are good is for a quiet machine to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.__main__ import BENCHMARKS
from tests.benchmarks.figures import Figure

OF_RAY = ("cluster", "ray")
"""These start processes on a Ray, again and again."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in OF_RAY else ()) for n in BENCHMARKS]
)
def test_a_benchmark_of_the_service_runs(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks", name, "--smoke", "--out", str(out)]
    subprocess.run(command, check=True, timeout=300)
    result = json.loads(out.read_text())
    assert result["machine"]["cores"] > 0
    figures = result["benchmarks"][name]
    assert figures
    assert len({one["name"] for one in figures}) == len(figures)
    assert all(one["low"] <= one["median"] <= one["high"] for one in figures)


def test_a_figure_is_held_to_its_bound() -> None:
    assert Figure("x", (1.0, 2.0, 9.0), "ms", at_most=2.0).reached is True
    assert Figure("x", (1.0, 2.5, 9.0), "ms", at_most=2.0).reached is False
    assert Figure("x", (1.0,), "times", at_least=1.3).reached is False
    assert Figure("x", (1.0,), "ms").reached is None
