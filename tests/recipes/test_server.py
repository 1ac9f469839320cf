"""Every recipe against a real `weaver serve`: the same metrics, step by step, as embedded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from recipes import (
    agent,
    custom_reward,
    demo,
    distillation,
    importance_sampling,
    preference,
    reward_model,
)
from tests.recipes.test_recipes import RECIPES, short
from weaver_rl.storage import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

SERVE = "from weaver.cli import main; main()"
WALL = ("time", "tokens/per_second")
"""What the clock decides: metrics that differ between any two runs."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_THREADS", "1")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server process with a home of its own, on a free port, without keys."""
    place = tmp_path_factory.mktemp("server")
    with serving(place) as process:
        deadline = time.monotonic() + 60
        while "Weaver at " not in (said := (place / "log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        yield said.partition("Weaver at ")[2].split()[0]


@contextmanager
def serving(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    settings = {"WEAVER_HOME": str(place / "home"), "WEAVER_PORT": "0", "WEAVER_THREADS": "1"}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", "--no-auth"],
            stderr=log,
            env={**os.environ, **settings},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def timeless(rows: list[dict[str, Any]], *, without: str = "time") -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith((*WALL, without))} for row in rows]


@RECIPES
def test_metrics_are_the_same_at_every_step(recipe: ModuleType, address: str) -> None:
    here = timeless(short(recipe, "here", steps=3))
    there = timeless(short(recipe, "there", steps=3, base_url=address))
    assert len(here) == 3 and len(here[0]) > 5
    assert here == there


def test_a_run_on_a_server_goes_on_exactly(address: str) -> None:
    whole = short(importance_sampling, "whole", steps=3, base_url=address)
    short(importance_sampling, "torn", base_url=address)  # evaluated behind its own last step, too
    torn = short(importance_sampling, "torn", steps=3, resume=True, base_url=address)
    assert timeless(torn, without="eval/") == timeless(whole, without="eval/")


def test_so_are_those_of_a_reward_model_and_of_its_policy(address: str) -> None:
    few = {"held_out": 8, "steps": 2, "policy_steps": 1, "groups_per_step": 2, "group_size": 4}
    for name, base_url in (("here", None), ("there", address)):
        flags = reward_model.Flags(**few, batch_size=8, out=Path(name), base_url=base_url)
        reward_model.main(flags)
    for folder in ("", "policy"):
        here, there = (
            timeless(read_lines(Path(name, folder, "metrics.jsonl"))) for name in ("here", "there")
        )
        assert len(here) > 1
        assert here == there


def test_so_are_metrics_of_a_custom_reward(address: str) -> None:
    custom_reward.main(steps=1, out="here")
    custom_reward.main(steps=1, out="there", base_url=address)
    here, there = (timeless(read_lines(Path(name, "metrics.jsonl"))) for name in ("here", "there"))
    assert here[1]["reward/mean"] > 0
    assert here == there


def test_a_program_is_trained_there_as_here(address: str) -> None:
    for name, base_url in (("here", None), ("there", address)):
        few = {"steps": 2, "upper": 3, "groups_per_step": 2, "group_size": 2}
        agent.main(agent.Flags(out=Path(name), base_url=base_url, **few))
    here, there = (read_lines(Path(name, "metrics.jsonl")) for name in ("here", "there"))
    shown = ("step", "reward/mean", "score/rated", "eval/mean")
    told = [[[row.get(name) for name in shown] for row in rows] for rows in (here, there)]
    assert told[0] == told[1]
    assert [row["step"] for row in here] == [0, 1, 2]


def test_so_are_those_of_preferences(address: str) -> None:
    found = []
    for name, base_url in (("here", None), ("there", address)):
        more = {"held_out": 4, "steps": 2, "batch_size": 4, "base_url": base_url}
        preference.main(preference.Flags(out=Path(name), **more))
        found.append(timeless(read_lines(Path(name, "metrics.jsonl"))))
    assert len(found[0]) == 3 and found[0][1]["train/loss"] > 0
    assert found[0] == found[1]


def test_so_are_those_of_distillation(address: str) -> None:
    found = []
    for name, base_url in (("here", None), ("there", address)):
        more = {"held_out": 4, "steps": 2, "batch_size": 4, "lmbda": 0.5, "base_url": base_url}
        distillation.main(distillation.Flags(out=Path(name), **more))
        found.append(timeless(read_lines(Path(name, "metrics.jsonl"))))
    assert len(found[0]) == 3 and found[0][1]["distil/on_policy_fraction"] == 0.5
    assert found[0] == found[1]


def test_the_demo_shows_the_same(address: str) -> None:
    said = []
    for base_url in (None, address):
        screen = StringIO()
        console = Console(file=screen, width=100)
        flags = demo.Flags(steps=3, rl_steps=2, base_url=base_url)
        demo.fine_tune(flags, console)
        demo.reinforce(flags, console)
        said.append(re.sub(r"  [0-9.]+ s a step.*", "", screen.getvalue()))
    own = ("Fine-tuning", "Checkpoint", "  in ", "Report")  # with a time, or a name of its own
    here, there = ([x for x in text.splitlines() if not x.startswith(own)] for text in said)
    assert any(line.startswith("step 1/3  loss") for line in here)
    assert here == there
    one, other = (timeless(read_lines(f)) for f in Path("runs").glob("demo-*/metrics.jsonl"))
    assert one == other
