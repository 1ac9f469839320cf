"""The demo: both of its parts learn what the model did not know, or it says that they did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from recipes import demo

if TYPE_CHECKING:
    from pathlib import Path


def test_it_notices_when_neither_part_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = demo.Flags(steps=4, rl_steps=5, learning_rate=0.0)
    assert not demo.fine_tune(flags, Console())
    assert not demo.reinforce(flags, Console())
    assert "Report: runs/demo-" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/demo-*/report.html"))) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_parts_learn() -> None:
    assert demo.main(demo.Flags())
