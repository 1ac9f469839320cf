"""A run that goes on is one run of the service too, with one curve; a finished one is answered."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

import weaver_rl as rl
from weaver import ServiceClient
from weaver.types import SamplingParams
from weaver_rl.tasks.words import exact, reverse_tasks

if TYPE_CHECKING:
    from pathlib import Path

    from weaver.types import TrainingRun

TASKS = reverse_tasks(40)
GIVEN: dict[str, Any] = {
    "tasks": TASKS,
    "reward": exact,
    "groups_per_step": 4,
    "group_size": 4,
    "sampling": SamplingParams(max_tokens=10),
    "checkpoint_every": 2,
    "resume": True,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WEAVER_THREADS", "1")
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)


def train(folder: Path, **more: Any) -> rl.Trained:
    return rl.train("weaver-nano", folder=folder, **{**GIVEN, **more})


def on_the_service() -> tuple[list[TrainingRun], list[int | None]]:
    """Its runs, and the steps of the rewards that the last of them has."""
    with ServiceClient() as service:
        runs = service.list_training_runs()
        points = service.attach(runs[-1].run_id).read_metrics("reward/mean")
    return runs, [point.step for point in points]


def failing_from(call: int) -> rl.Reward:
    """`exact`, which raises from call number `call` on, so that the run ends with an error."""
    calls = 0

    def exact(task: rl.Task, reply: rl.Reply) -> float:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise ValueError("the process ends")
        return float(reply.text.strip() == task["answer"])

    return exact


def test_it_is_one_run_with_one_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "words"
    with pytest.raises(rl.RolloutsFailedError):
        train(folder, steps=6, reward=failing_from(49))
    (run,), steps = on_the_service()
    assert (run.name, run.step, steps) == ("words", 3, [1, 2, 3])  # one beyond the checkpoint
    done = train(folder, steps=6)
    (same,), steps = on_the_service()
    assert (same.run_id, same.name, same.step) == (run.run_id, "words", 6)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert done.weights.startswith(f"weaver://{run.run_id}/")
    assert f"run words ({run.run_id})" in capsys.readouterr().out
    assert done.report is not None and f"words ({run.run_id})" in done.report.read_text()


def test_a_finished_run_is_answered_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "words"
    done = train(folder, steps=2, name="mine", display=False)
    before = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["weaver_rl.train"], "AsyncServiceClient", None)
        assert train(folder, steps=2, name="mine") == done
    said = capsys.readouterr().out
    number = done.metrics["reward/mean"]
    assert before == "" and said.count("\n") == 1
    assert said.startswith(f"{folder} is finished (2 steps, reward/mean ") and number >= 0
    longer = train(folder, steps=3, name="mine", display=False)
    asked = train(folder, steps=3, held_out=TASKS[:4], name="mine", display=False)
    assert "eval/mean" in asked.metrics and "eval/mean" not in longer.metrics
    runs, steps = on_the_service()
    assert ([run.name for run in runs], steps) == (["mine"], [1, 2, 3])


def test_one_that_ended_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "words"
    with pytest.raises(rl.RolloutsFailedError):
        train(folder, steps=2, reward=failing_from(17), display=False)
    (first,), steps = on_the_service()
    assert steps == [1]
    train(folder, steps=2, display=False)
    (run,), steps = on_the_service()
    assert (run.name, steps) == ("words", [1, 2]) and run.run_id != first.run_id
    assert f"{first.run_id} had no checkpoint yet" in caplog.text


def test_a_run_that_the_service_lost_goes_on_as_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, whole = tmp_path / "words", tmp_path / "whole"
    train(folder, steps=2, display=False)
    with ServiceClient() as service:
        service.delete_training_run("words")
    with caplog.at_level(logging.WARNING):
        done = train(folder, steps=4, display=False)
    (run,), steps = on_the_service()
    assert (run.name, steps) == ("words", [3, 4])
    assert "does not have" in caplog.text and "metrics.jsonl" in caplog.text
    assert (
        done.metrics["reward/mean"] == train(whole, steps=4, display=False).metrics["reward/mean"]
    )
