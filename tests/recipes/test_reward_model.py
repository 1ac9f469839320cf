"""The recipe of a reward model: short, resumed, dry, with pairs of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes import reward_model
from weaver.errors import InvalidRequestError
from weaver_rl.storage import read_lines

FEW: dict[str, Any] = {
    "held_out": 10,
    "batch_size": 8,
    "groups_per_step": 2,
    "group_size": 4,
    "out": Path("run"),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")


def rows_of(folder: str) -> list[dict[str, Any]]:
    return list(read_lines(Path(folder, "metrics.jsonl")))


def test_a_short_run_leaves_two_reports_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    found = reward_model.main(reward_model.Flags(**FEW, steps=3, policy_steps=1))
    assert {"pairs/accuracy", "pairs/margin", "eval/mean"} <= found.keys()
    _, *learned = rows_of("run")
    assert [row["step"] for row in learned] == [1, 2, 3]
    assert all(0 <= row["train/accuracy"] <= 1 for row in learned)
    said = capsys.readouterr().out
    assert "Held-out pairs: " in said and "Held out, greedy: " in said
    assert "Report: run/report.html" in said and "Report: run/policy/report.html" in said
    more = reward_model.Flags(**FEW, steps=3, policy_steps=2, resume=True)
    assert reward_model.main(more)["pairs/accuracy"] == found["pairs/accuracy"]
    assert [row["step"] for row in rows_of("run/policy")][-2:] == [1, 2]


def test_pairs_of_ones_own_are_scored_by_what_they_taught() -> None:
    rows = [
        {
            "chosen": [
                *(asked := [{"role": "user", "content": f"{i}?"}]),
                _said("yes" * (1 + i % 3)),
            ],
            "rejected": [*asked, _said("no")],
        }
        for i in range(12)
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = reward_model.Flags(**{**FEW, "held_out": 2}, tasks="pairs.jsonl", policy_steps=1)
    assert "eval/mean" in reward_model.main(flags)


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_dry_run_names_the_broken_row(capsys: pytest.CaptureFixture[str]) -> None:
    reward_model.main(reward_model.Flags(dry_run=True))
    assert "1000 pairs for weaver-nano are sound" in capsys.readouterr().out
    rows = [*reward_model.PAIRS[:9], {"prompt": "a", "chosen": "b"}]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for dry in (True, False):
        flags = reward_model.Flags(tasks="pairs.jsonl", held_out=0, dry_run=dry, out=Path("no"))
        with pytest.raises(InvalidRequestError, match=r"pairs\.jsonl\[9\]\.rejected"):
            reward_model.main(flags)
