"""The recipes of the published `tinker-cookbook`, unmodified and offline, at our server.

`make test-clients` makes the environment (.venv-cookbook) and runs the quick ones; `make
test-cookbook` runs all.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import folders
from tests.clients.environments import run_python, variables
from tests.clients.server import WEAVER, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
STUDENT = f"model_name={folders.STUDENT}"
ARITHMETIC = ("groups_per_batch=4", "group_size=4", "max_tokens=5", "learning_rate=1e-3")
QUICK = {
    "sl_loop": (
        "sl_loop",
        ["batch_size=8", "max_steps=4", "save_every=2", "lora_rank=8", "learning_rate=1e-2"],
        4,
    ),
    "rl_loop": ("rl_loop", ["batch_size=4", "group_size=16", "max_tokens=4", "max_steps=2"], 2),
    "math_rl": ("math_rl.train", [*ARITHMETIC, "max_steps=2"], 2),
}
SLOW = {
    "sl_basic": ("sl_basic", [], 2),
    "rl_basic": ("rl_basic", ["max_tokens=4"], 1),
    "math_rl, asynchronous": (
        "math_rl.train",
        [*ARITHMETIC, "max_steps=3", "max_steps_off_policy=2"],
        3,
    ),
    "math_rl, streaming": (
        "math_rl.train",
        [
            *ARITHMETIC,
            "max_steps=2",
            "stream_minibatch_config.groups_per_batch=4",
            "stream_minibatch_config.num_minibatches=2",
        ],
        2,
    ),
    "math_rl, ppo": ("math_rl.train", [*ARITHMETIC, "max_steps=2", "loss_fn=ppo"], 2),
    "guess_number": (
        "multiplayer_rl.guess_number.train",
        [
            "renderer_name=qwen3_disable_thinking",
            "batch_size=4",
            "group_size=4",
            "max_tokens=4",
            "eval_every=0",
            "max_steps=2",
        ],
        2,
    ),
    "dpo": ("preference.dpo.train", ["batch_size=8", "max_steps=3", "learning_rate=1e-3"], 3),
    "on_policy_distillation": (
        "distillation.on_policy_distillation",
        [
            f"teacher_model={folders.TEACHER}",
            "groups_per_batch=4",
            "max_tokens=8",
            "lora_rank=8",
            "max_steps=2",
        ],
        2,
    ),
}
"""By what they are called here: the module, its options, the optimizer steps that it takes."""
RECIPES = {**QUICK, **SLOW}
DRIFT = "optim/kl_sample_train_v2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recipes run."""
    folder = tmp_path_factory.mktemp("cookbook")
    folders.make(folder)
    return folder


@pytest.fixture(scope="module")
def server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    names = (folders.STUDENT, folders.TEACHER)
    options = [part for name in names for part in ("--model", f"{name}={place / name}")]
    with serving(tmp_path_factory.mktemp("server"), *options) as environment:
        yield environment


def steps_of(state_path: str, server: dict[str, str]) -> int:
    """The optimizer steps of the run that a checkpoint's path names."""
    listed = subprocess.run(
        [WEAVER, "runs", "list", "-o", "json"],
        env={**os.environ, **server},
        capture_output=True,
        text=True,
        check=True,
    )
    (step,) = (
        run["step"]
        for run in json.loads(listed.stdout)
        if run["user_metadata"]["tinker"]["model_id"] in state_path
    )
    return int(step)


@pytest.mark.parametrize(
    "called", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_a_recipe_runs(server: dict[str, str], place: Path, tmp_path: Path, called: str) -> None:
    module, options, steps = RECIPES[called]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    log = tmp_path / "log"
    run_python(
        ".venv-cookbook",
        *("-m", f"tinker_cookbook.recipes.{module}", f"log_path={log}", STUDENT, *options),
        cwd=place,
        env=variables(server, tmp_path, **offline),
        timeout_s=500,
    )
    read = {
        name: [json.loads(line) for line in (log / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "checkpoints")
    }
    final = read["checkpoints"][-1]
    assert final["name"] == "final" and "sampler_weights" in final["sampler_path"]
    assert steps_of(final["state_path"], server) == steps
    check_learning(called, read["metrics"])


def check_learning(called: str, metrics: list[dict[str, Any]]) -> None:
    """What tells that it learned as it should, in as few steps."""
    match called:
        case "sl_loop" | "sl_basic":
            losses = [row["train_mean_nll"] for row in metrics if "train_mean_nll" in row]
            assert losses[-1] < losses[0], losses
        case "dpo":
            losses = [row["dpo_loss"] for row in metrics]
            assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference
            assert losses[-1] < losses[0]
        case "rl_loop":
            assert all(0 < row["reward/total"] < 1 for row in metrics), metrics
        case _:  # what was sampled from has the log-probabilities that training finds
            drifts = [row[DRIFT] for row in metrics if DRIFT in row]
            bound = 1.0 if "asynchronous" in called else 1e-6
            assert drifts and max(drifts) < bound, drifts
            assert called != "on_policy_distillation" or metrics[0]["teacher_kl"] > 0.01
