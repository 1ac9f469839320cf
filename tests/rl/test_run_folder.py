"""Run folders: what may go on in one, and that no step stands twice after a resume."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.rl.fake import fake_service, vowels
from weaver.errors import ConfigError, ConflictError, StorageError
from weaver_rl.agent import Budget
from weaver_rl.algorithms.policy import on_policy
from weaver_rl.algorithms.run import Run, open_run
from weaver_rl.plan import Plan
from weaver_rl.rewards import GroupReward
from weaver_rl.rollouts import each, single_turn
from weaver_rl.run_folder import open_run_folder, read_config, release_run_folder, rewind
from weaver_rl.storage import append_line, read_lines
from weaver_rl.tasks.words import exact

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from weaver_rl.agent import Agent
    from weaver_rl.types import Task

CONFIG = {"model": "weaver-nano", "steps": 60, "objective": {"loss_fn": "ppo", "config": {}}}


def test_a_new_folder_and_the_same_one_again(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "run", CONFIG)
    assert read_config(folder) == CONFIG
    assert open_run_folder(tmp_path / "run", CONFIG, resume=True) == folder


async def halves(agent: Agent, task: Task) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (exact, "exact"),
        (partial(exact), "exact"),
        (single_turn(exact), "exact"),
        (single_turn(GroupReward(halves)), "halves"),  # type: ignore[arg-type]
        (GroupReward(halves), "halves"),  # type: ignore[arg-type]
        (halves, "halves"),
        (each(halves, budget=Budget(turns=2)), "halves"),
    ],
    ids=itertools.count(),
)
def test_another_process_knows_a_reward_or_an_environment_by_its_name(
    given: object, name: str, tmp_path: Path
) -> None:
    with open_run(tmp_path, {"reward": given}, tasks=[], steps=1, display=False) as run:
        assert run.folder is not None
        assert read_config(run.folder)["reward"] == name


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    open_run_folder(tmp_path, CONFIG)
    with pytest.raises(ConflictError, match="resume=True"):
        open_run_folder(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "other"}, "model"),
        ({"objective": {"loss_fn": "gspo", "config": {}}}, "objective.loss_fn"),
        ({"objective": {"loss_fn": "ppo", "config": {"beta": 1}}}, "objective.config.beta"),
        ({"seed": 0}, "seed"),
    ],
)
def test_another_config_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], field: str
) -> None:
    open_run_folder(tmp_path, CONFIG)
    with pytest.raises(ConfigError) as caught:
        open_run_folder(tmp_path, {**CONFIG, **change}, resume=True)
    assert caught.value.field == field


def test_what_may_differ_is_taken_over(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path, CONFIG)
    open_run_folder(tmp_path, {**CONFIG, "steps": 90}, resume=True, may_differ=("steps",))
    assert read_config(folder)["steps"] == 90


def test_damaged_or_unwritable(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "run", CONFIG)
    folder.config.write_text('{"model": ')
    with pytest.raises(ConfigError, match="not JSON"):
        open_run_folder(tmp_path / "run", CONFIG, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        open_run_folder(tmp_path / "file" / "run", CONFIG)


def test_rewind(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path, CONFIG)
    rewind(folder, 0)
    for step in range(1, 6):
        append_line(folder.metrics, {"step": step})
        append_line(folder.transcripts / f"{step:06d}.jsonl", {"step": step})
    rewind(folder, 3)
    assert [row["step"] for row in read_lines(folder.metrics)] == [1, 2, 3]
    assert sorted(file.stem for file in folder.transcripts.iterdir())[-1] == "000003"


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    program = """
import sys
from functools import partial
from pathlib import Path
import weaver_rl as rl
from weaver import ConflictError
try:
    rl.open_run_folder(Path(sys.argv[1]), {"a": 1}, resume=True)
except ConflictError as error:
    print(error)
"""

    def other() -> str:
        command = [sys.executable, "-c", program, tmp_path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with open_run(tmp_path, {"a": 1}, tasks=[], steps=1, display=False):
        assert f"(process {os.getpid()} on" in other()
    (tmp_path / "config.json").unlink()
    assert other() == ""
    folder = open_run_folder(tmp_path, {"a": 1}, resume=True)
    assert open_run_folder(tmp_path, {"a": 1}, resume=True) == folder  # in one process
    assert "in use" in other()
    with pytest.raises(ConfigError, match="started with"):
        open_run_folder(tmp_path, {"a": 2}, resume=True)
    assert "in use" in other()  # it is held still
    release_run_folder(folder)
    with pytest.raises(ConfigError, match="started with"):
        open_run_folder(tmp_path, {"a": 2}, resume=True)
    assert other() == ""  # what was refused holds nothing


@pytest.mark.anyio
async def test_a_notebook_shows_what_a_run_is_called_and_how_far_it_is(tmp_path: Path) -> None:
    config, tasks = {"model": "fake"}, [{"prompt": "a="}]
    plan = Plan(steps=2, groups_per_step=1, group_size=2)

    def opened() -> AbstractContextManager[Run]:
        return open_run(
            tmp_path / "<b>", config, tasks=tasks, steps=2, resume=True, name="words", display=False
        )

    with opened() as run:
        assert "words" in run._repr_html_() and "step" not in run._repr_html_()
        async with fake_service(tmp_path / "home") as service:
            trainer = await run.open_trainer(service, "fake")
            await on_policy(trainer, tasks, single_turn(vowels), plan, run=run)
        shown = run._repr_html_()
        assert "<td>step</td><td><pre>2</pre></td>" in shown and "finished" not in shown
        assert "reward/mean" in shown and trainer.model_id in shown
        assert "&lt;b&gt;" in shown and "<b>" not in shown
        run.finish({"eval/mean": 0.5}, weights="weaver://x")
    with opened() as same:
        assert same.finished is not None
        for one in (run, same):
            for words in ("finished", "<td>eval/mean</td><td><pre>0.500</pre></td>", "weaver://x"):
                assert words in one._repr_html_()
