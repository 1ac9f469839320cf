"""The published package `tinker`, unmodified and in an environment of its own, at our server.

`make test-clients` makes the environment (.venv-tinker) and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venv-tinker"


@pytest.mark.parametrize("release", ["0.24.1", "0.25.0", "0.30.0", "0.38.0"])
def test_its_whole_flow_runs(server: dict[str, str], tmp_path: Path, release: str) -> None:
    """Every loss, custom ones, checkpoints, resuming, samples, listings, a model that is not there.

    0.24 is the last release that sends training data as JSON.
    """
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ENVIRONMENT / release),
        "TINKER_BASE_URL": server["WEAVER_BASE_URL"],
        "TINKER_API_KEY": f"tml-{server['WEAVER_API_KEY']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", HERE / "tinker_flow.py"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["version"] == release
