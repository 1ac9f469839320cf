"""Sweeps: every plan and seed once, errors named, results on disk, nothing done twice."""

from __future__ import annotations

import csv
import json
import re
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import weaver_rl as rl
from weaver.errors import ConfigError, ConflictError
from weaver.files import hold_lock, release_lock
from weaver_rl.storage import append_line
from weaver_rl.sweeps import names_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PPO, CISPO = rl.Plan(steps=2, objective="ppo"), rl.Plan(steps=2, objective="cispo")


class Played:
    """Notes what it is asked, and fails where it is told to."""

    def __init__(self, *failing: str) -> None:
        self.asked: list[str] = []
        self.failing = failing

    def __call__(self, plan: rl.Plan, folder: Path) -> dict[str, Any]:
        self.asked.append(folder.name)
        if folder.name in self.failing:
            raise RuntimeError(f"no luck\nin {folder.name}")
        return {"reward/mean": 0.5 + plan.seed, "other": 1.0, "text": "x", "nan": float("nan")}


def quiet(play: Any, plans: Any, folder: Path, **more: Any) -> rl.Sweep:
    return rl.sweep(play, plans, folder=folder, display=False, **more)


def test_each_plan_and_seed_is_run_in_its_folder(tmp_path: Path) -> None:
    play = Played()
    found = rl.sweep(play, {"ppo": PPO, "cispo": CISPO}, folder=tmp_path, seeds=(0, 1))
    names = ["ppo-seed-0", "ppo-seed-1", "cispo-seed-0", "cispo-seed-1"]
    assert play.asked == names == [one.name for one in found.runs]
    assert [one.metrics for one in found.runs[:2]] == [
        {"reward/mean": 0.5, "other": 1.0},
        {"reward/mean": 1.5, "other": 1.0},
    ]
    lines = repr(found).splitlines()
    assert lines[0].split() == ["run", "reward/mean"]
    assert lines[1].split() == ["ppo-seed-0", "0.500"]
    assert [line.split(maxsplit=1) for line in lines[-2:]] == [
        ["ppo", "1.000 ± 0.707"],
        ["cispo", "1.000 ± 0.707"],
    ]
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["objective.loss_fn"] for row in rows] == ["ppo", "ppo", "cispo", "cispo"]
    assert rows[1]["reward/mean"] == "1.5"
    assert "groups_per_step" not in rows[0]
    assert json.loads((tmp_path / "results.json").read_text()) == found.rows()


def test_errors_are_named_and_what_is_done_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plans = {"a": PPO, "b": CISPO, "c": rl.Plan(steps=1)}
    found = rl.sweep(Played("b"), plans, folder=tmp_path)
    assert [one.name for one in found.failed] == ["b"]
    assert found.failed[0].failure.startswith("RuntimeError: no luck")
    assert "b                             failed: RuntimeError: no luck⏎in b" in repr(found)
    assert "The run b failed" in caplog.text and "Traceback" in caplog.text
    said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"1/3  a: reward/mean 0\.500  \d+ s, .+ left", said[0])
    assert "failed: RuntimeError" in said[1]
    again = Played()
    found = quiet(again, plans, tmp_path)
    assert again.asked == ["b"]
    assert not found.failed
    assert [one.metrics["reward/mean"] for one in found.runs] == [0.5, 0.5, 0.5]


def test_more_steps_go_on_and_another_plan_is_refused(tmp_path: Path) -> None:
    quiet(Played(), {"a": PPO}, tmp_path)
    play = Played()
    with pytest.raises(ConfigError, match="'ppo', now it is 'cispo'") as caught:
        quiet(play, {"a": CISPO, "b": PPO}, tmp_path)
    assert caught.value.field == "plans.objective.loss_fn"
    assert play.asked == []
    quiet(play, {"a": rl.Plan(steps=4, objective="ppo")}, tmp_path)
    assert play.asked == ["a"]
    (tmp_path / "a" / "result.json").write_text("{")
    quiet(play, {"a": PPO}, tmp_path)
    assert play.asked == ["a", "a"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_at_most_so_many_at_a_time(asynchronous: bool, tmp_path: Path) -> None:
    met = threading.Barrier(2)  # of threads: opens once two are there
    running: list[int] = []
    now = 0

    async def waiting(plan: rl.Plan, folder: Path) -> dict[str, float]:
        nonlocal now
        now += 1
        running.append(now)
        await anyio.sleep(0.01)
        now -= 1
        return {"x": 1.0}

    def meeting(plan: rl.Plan, folder: Path) -> dict[str, float]:
        return {"x": float(met.wait(20))}

    plans = [rl.Plan(steps=n) for n in range(1, 5)]
    found = quiet(waiting if asynchronous else meeting, plans, tmp_path, concurrency=2)
    assert [one.name for one in found.runs] == [f"steps={n}" for n in range(1, 5)]
    assert not found.failed
    assert max(running, default=2) == 2


def test_what_answers_no_metrics_has_failed(tmp_path: Path) -> None:
    async def forgotten(plan: rl.Plan, folder: Path) -> None: ...

    (one,) = quiet(forgotten, {"a": PPO}, tmp_path).runs
    assert "a NoneType" in one.failure
    assert not (tmp_path / "a" / "result.json").exists()


def test_curves_are_drawn_where_there_are_some(tmp_path: Path) -> None:
    def logs(plan: rl.Plan, folder: Path) -> dict[str, float]:
        opened = rl.open_run_folder(folder, {})
        append_line(opened.metrics, {"step": 1, "time": 1.0, "reward/mean": 0.5})
        return {}

    quiet(logs, {"a": PPO, "b": CISPO}, tmp_path)
    assert "<title>Comparison" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("plans", "more", "words"),
    [
        ([], {}, "there are none"),
        ({"a": "ppo"}, {}, "rl.Plan"),
        ({"a/b": PPO}, {}, "names a folder"),
        ({"..": PPO}, {}, "names a folder"),
        ({"lock": PPO}, {}, "names a folder"),
        ([PPO, CISPO, PPO], {}, r"plans\[2\]: is the same as plans\[0\]"),
        ([PPO], {"seeds": (1, 1)}, "each once"),
        ([PPO], {"concurrency": 0}, "At least 1"),
    ],
)
def test_bad_input_is_named(plans: Any, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    play = Played()
    with pytest.raises(ConfigError, match=words):
        quiet(play, plans, tmp_path / "new", **more)
    assert play.asked == []
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="function of a plan"):
        quiet("train", {"a": PPO}, tmp_path)


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path) -> None:
    lock = hold_lock(tmp_path, what="it", hint="")
    try:
        with pytest.raises(ConflictError, match="sweep's folder"):
            quiet(Played(), {"a": PPO}, tmp_path)
    finally:
        release_lock(lock)


@pytest.mark.parametrize(
    ("configs", "names"),
    [
        ([{"a": "1"}], ["plan"]),
        ([{"o.loss": "ppo", "x": "1"}, {"o.loss": "dro", "x": "1"}], ["loss=ppo", "loss=dro"]),
        ([{"x": "<a b>"}, {"y": "1"}], ["x=-a-b-,y=None", "x=None,y=1"]),
        ([{"x": "?"}, {"x": "!"}], ["plan-0", "plan-1"]),
        ([{"x": "a" * 90}, {"x": "b"}], ["plan-0", "plan-1"]),
    ],
)
def test_names(configs: Sequence[dict[str, str]], names: list[str]) -> None:
    assert names_of(configs) == names
