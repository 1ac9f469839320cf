"""Pace: what is left is told from the steps of this process; loops without a run show it."""

from __future__ import annotations

import inspect
import io
import pkgutil
import re
from importlib import import_module
from typing import TYPE_CHECKING

import anyio
import pytest

import weaver_rl as rl
from tests.rl.fake import fake_service, vowels
from tests.rl.test_display import Terminal
from weaver.types import SamplingParams
from weaver_rl import algorithms
from weaver_rl.algorithms.run import shows_progress
from weaver_rl.display import Progress
from weaver_rl.pace import Pace, duration

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_that_goes_on_counts_its_own_steps() -> None:
    now = 100.0
    pace = Pace(steps=60, clock=lambda: now)
    assert str(pace) == ""
    now = 130.0  # loading
    pace.expect(60, 40)
    assert str(pace) == ""
    now = 150.0
    pace.reach(50)
    assert (pace.seconds_a_step, str(pace)) == (2.0, "2.0 s a step, 20 s left")


def test_the_evaluation_before_the_first_step_is_no_step() -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    now = 50.0
    pace.reach(0)
    assert pace.seconds_a_step is None
    now = 51.0
    pace.reach(1)
    assert str(pace) == "1.0 s a step"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (120, "2 m 0 s"), (11_100, "3 h 5 m"), (187_200, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_terminal_gets_one_line_and_a_file_none_that_is_soon_over() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream=stream)
        progress.expect(3, 0)
        for step in (1, 2, 3):
            progress.log({"reward/mean": 0.25 * step, "gap/max": 0.0}, step)
        progress.close()
        progress.close()
    assert file.getvalue() == ""
    first = r"\rstep 1/3  reward 0\.250  gap 0\.000  \d+\.\d s a step, .+ left"
    assert re.match(first, terminal.getvalue())
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\n")


def test_loops_without_a_run_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weaver_rl.display.QUIET_S", 0.0)
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    sampling = SamplingParams(max_tokens=4)
    plan = rl.Plan(steps=2, groups_per_step=2, group_size=2, sampling=sampling)
    example = {"prompt": "ab", "completion": "cd"}

    async def loops() -> None:
        async with fake_service(tmp_path) as service:
            trainer = await service.create_model(base_model="fake")
            environment = rl.single_turn(vowels)
            await rl.on_policy(trainer, [{"prompt": "ab"}], environment, plan)
            await rl.supervised(trainer, [example], rl.SupervisedPlan(epochs=3))
            await rl.supervised(trainer, [example], rl.SupervisedPlan(), run=rl.Run())

    anyio.run(loops)
    said = [line.split("  ")[1] for line in terminal.getvalue().splitlines()]
    assert said == ["step 1/2", "step 2/2", "step 1/3", "step 2/3", "step 3/3"]


def test_no_loop_is_without_progress() -> None:
    loops = {
        name: function
        for one in pkgutil.iter_modules(algorithms.__path__)
        for name, function in vars(import_module(f"weaver_rl.algorithms.{one.name}")).items()
        if inspect.iscoroutinefunction(function)
        and {"trainer", "run"} <= inspect.signature(function).parameters.keys()
    }
    shown = shows_progress(rl.supervised).__code__
    silent = {
        name
        for name, function in loops.items()
        if inspect.unwrap(function, stop=lambda one: one.__code__ is shown).__code__ is not shown
    }
    assert silent == {"on_policy", "rejection"}  # these are off_policy
    assert {"off_policy", "supervised", "preference", "distil"} <= loops.keys()
