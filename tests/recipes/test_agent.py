"""The recipe whose agent is another program: dry, short, refused, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import agent
from weaver.errors import InvalidRequestError
from weaver_rl.storage import read_lines

FEW = {"steps": 2, "upper": 3, "groups_per_step": 2, "group_size": 2}


def short(out: str, **more: Any) -> list[dict[str, Any]]:
    agent.main(agent.Flags(out=Path(out), **FEW, **more))
    return read_lines(Path(out, "metrics.jsonl"))


def test_a_dry_run_plays_four_games(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = agent.main(agent.Flags(dry_run=True))
    assert 0 <= metrics["eval/mean"] <= 1
    assert capsys.readouterr().out.count("←") == 4
    assert not Path("runs").exists()
    Path("tasks.jsonl").write_text('{"upper": 7}\n')
    with pytest.raises(InvalidRequestError, match="answer"):
        agent.main(agent.Flags(dry_run=True, tasks="tasks.jsonl"))


def test_a_short_run_leaves_its_report_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    rows = short("run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[1]["rollout/turns_mean"] >= 1
    assert rows[1]["rollout/failed_fraction"] == 0
    assert all(0 <= row["eval/mean"] <= 1 for row in (rows[0], rows[2]))
    assert "Report: run/report.html" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_learns() -> None:
    metrics = agent.main(agent.Flags(out=Path("run")))
    before, *rows = read_lines(Path("run/metrics.jsonl"))
    rewards = [row["reward/mean"] for row in rows]
    assert before["eval/mean"] <= 0.6 and metrics["eval/mean"] >= 0.8
    assert sum(rewards[-4:]) / 4 >= sum(rewards[:3]) / 3 + 0.1
