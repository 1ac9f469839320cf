"""The rejection-sampling recipe: dry, short, resumed, and in full."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from recipes import rejection_sampling
from weaver.errors import ConfigError, ConflictError, InvalidRequestError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


def flags(out: Path | None, *, steps: int = 2, resume: bool = False) -> rejection_sampling.Flags:
    return rejection_sampling.Flags(
        held_out=8, groups_per_step=4, group_size=4, out=out, steps=steps, resume=resume
    )


def test_a_dry_run_scores_four_replies_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = rejection_sampling.main(rejection_sampling.Flags(dry_run=True))
    assert 0 <= metrics["eval/mean"] <= 1
    assert capsys.readouterr().out.count("→") == 4
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "rev:ab="}\n')
    with pytest.raises(InvalidRequestError, match="answer"):
        rejection_sampling.main(
            rejection_sampling.Flags(dry_run=True, tasks="tasks.jsonl", held_out=0)
        )
    with pytest.raises(ConfigError, match="out"):
        rejection_sampling.main(rejection_sampling.Flags(steps=1, resume=True))


def test_a_short_run_leaves_its_report_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    rejection_sampling.main(flags(out))
    with pytest.raises(ConflictError):
        rejection_sampling.main(flags(out))
    rejection_sampling.main(flags(out, steps=3, resume=True))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["rejection/accept_rate"] <= 1 for row in rows)
    said = capsys.readouterr().out
    assert f"Report: {out / 'report.html'}" in said
    assert "Held out, greedy: " in said
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns() -> None:
    assert rejection_sampling.main(rejection_sampling.Flags())["eval/mean"] >= 0.97
