"""`rl.train` on weaver-nano: a folder with everything, an exact resume, and named refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import weaver_rl as rl
from weaver.errors import ConfigError, ConflictError, InvalidRequestError
from weaver.types import SamplingParams
from weaver_rl.storage import read_lines
from weaver_rl.tasks.words import closeness, exact, reverse_tasks

if TYPE_CHECKING:
    from pathlib import Path

TASKS = reverse_tasks(40)
SMALL: dict[str, Any] = {
    "groups_per_step": 4,
    "group_size": 4,
    "sampling": SamplingParams(max_tokens=10),
    "checkpoint_every": 2,
    "display": False,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


def numbers(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith("time") and "per_second" not in k}
        for row in read_lines(folder / "metrics.jsonl")
    ]


def test_a_run_leaves_everything_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = rl.train("weaver-nano", TASKS, exact, steps=4, folder=tmp_path / "1", **SMALL)
    rl.train("weaver-nano", TASKS, exact, steps=3, folder=tmp_path / "2", **SMALL)
    again = rl.train(
        "weaver-nano", TASKS, exact, steps=4, folder=tmp_path / "2", resume=True, **SMALL
    )
    assert numbers(tmp_path / "2") == numbers(tmp_path / "1")
    assert again.report == tmp_path / "2" / "report.html"
    assert again.report.stat().st_size > 1000
    assert whole.metrics["reward/mean"] == again.metrics["reward/mean"]
    assert len(list((tmp_path / "1" / "transcripts").iterdir())) == 4
    with pytest.raises(ConflictError, match="resume=True"):
        rl.train("weaver-nano", TASKS, exact, steps=4, folder=tmp_path / "1", **SMALL)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tasks": TASKS[:30]}, "task_set.count"),
        ({"tasks": TASKS[::-1]}, "task_set.sha256"),
        ({"reward": closeness}, "reward"),
        ({"objective": "ppo"}, "objective.loss_fn"),
        ({"learning_rate": lambda step: 2e-3}, "learning_rate"),
        ({"lora_config": {"rank": 4}}, "lora_config.alpha"),
        ({"group_size": 8}, "group_size"),
    ],
)
def test_another_run_is_not_gone_on_with(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    folder = rl.RunFolder(tmp_path)
    given: dict[str, Any] = {"tasks": TASKS, "reward": exact, "steps": 0, **SMALL}
    rl.train("weaver-nano", folder=tmp_path, **given)
    before = folder.config.read_bytes()
    with pytest.raises(ConfigError, match="Resume with the old") as caught:
        rl.train("weaver-nano", folder=tmp_path, resume=True, **{**given, "steps": 1, **change})
    assert caught.value.field == field
    assert folder.config.read_bytes() == before
    assert folder.metrics.read_bytes() == b""


def test_held_out_tasks_are_evaluated() -> None:
    done = rl.train("weaver-nano", TASKS[:30], exact, steps=1, held_out=TASKS[30:], **SMALL)
    assert 0.3 < done.metrics["eval/mean"] <= 1.0
    assert done.report is None


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({}, ConfigError),
        ({"reward": exact, "tasks": []}, InvalidRequestError),
        ({"reward": exact, "tasks": [{"question": "x"}]}, InvalidRequestError),
        ({"reward": exact, "resume": True}, ConfigError),
        ({"reward": exact, "objective": "ppoo"}, ConfigError),
        ({"reward": exact, "max_staleness": 2}, ConfigError),
        ({"environment": exact}, ConfigError),
    ],
)
def test_refusals(kwargs: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        rl.train("weaver-nano", **{"tasks": TASKS, "steps": 1, **SMALL, **kwargs})
