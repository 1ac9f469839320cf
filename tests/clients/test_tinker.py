"""The published packages `tinker` and `openai`, unmodified and in an environment of their own.

`make test-clients` makes the environment (.venv-tinker) and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import TOOLS, WEAVER

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venv-tinker"


def run(program: str, *arguments: str, server: dict[str, str], cwd: Path, release: str) -> str:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "PYTHONPATH": str(ENVIRONMENT / release),
        "TINKER_BASE_URL": server["WEAVER_BASE_URL"],
        "TINKER_API_KEY": f"tml-{server['WEAVER_API_KEY']}",
        "OPENAI_BASE_URL": f"{server['WEAVER_BASE_URL']}/v1",
        "OPENAI_API_KEY": server["WEAVER_API_KEY"],
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", HERE / program, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("release", ["0.24.1", "0.25.0", "0.30.0", "0.38.0"])
def test_its_whole_flow_runs(server: dict[str, str], tmp_path: Path, release: str) -> None:
    """Every loss, custom ones, checkpoints, resuming, samples, listings, a model that is not there.

    0.24 is the last release that sends training data as JSON. What it made is then sampled by the
    client of another protocol, and listed by our own.
    """
    out = run("tinker_flow.py", server=server, cwd=tmp_path, release=release)
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert told["version"] == release
    listed = subprocess.run(
        [WEAVER, "runs", "list", "--json"],
        env={**os.environ, **server},
        capture_output=True,
        text=True,
        check=True,
    )
    made = [
        one
        for one in json.loads(listed.stdout)
        if one["user_metadata"].get("tinker", {}).get("model_id") == told["model_id"]
    ]
    assert len(made) == 1
    run(
        "openai_flow.py",
        "weaver-nano",
        made[0]["run_id"],
        TOOLS,
        server=server,
        cwd=tmp_path,
        release=release,
    )
