"""Environments of `verifiers` and OpenEnv, as published: played, and trained, by this package.

`make test-clients` makes the environment (.venv-others) and runs this. The harness of `verifiers`
is a program of its own, with the published `openai`, which it installs when it first runs.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.environments import HERE, ROOT, run_python

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.clients
FOLDER = HERE / "others"


def said(program: str, cwd: Path) -> dict[str, Any]:
    env = {
        **os.environ,
        "PATH": f"{ROOT / '.venv-others' / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{FOLDER}",
        "OMP_NUM_THREADS": "1",
        "WEAVER_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    lines = run_python(".venv-others", str(FOLDER / program), cwd=cwd, env=env, timeout_s=500)
    return dict(json.loads(lines.splitlines()[-1]))


def test_an_environment_of_verifiers_is_played_as_in_python(tmp_path: Path) -> None:
    found = said("verifiers_flow.py", tmp_path)
    assert found["failures"] == []
    assert found["same"] is True  # to the last bit: tokens, log-probabilities, messages
    theirs, ours = found["rewards"]
    assert theirs == ours
    assert set(found["metrics"]) == {"length", "right"}
    assert 0 <= found["trained"] <= 1


def test_a_server_of_openenv_is_played_over_several_turns(tmp_path: Path) -> None:
    found = said("openenv_flow.py", tmp_path)
    assert found["failures"] == []
    assert [sum(rewards) for rewards in found["turn_rewards"]] == found["rewards"]
    assert list(map(len, found["turn_rewards"])) == found["turns"]
    assert max(found["turns"]) > 1
    assert found["said"][0] == "Guess a number from 1 to 7."
    assert set(found["said"][2::2]) <= {"higher", "lower"}
    assert "Failed to connect" in found["refused"]
    assert 0 <= found["trained"] <= 1
