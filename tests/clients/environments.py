"""Runs programs in the environments of other projects' clients, which the Makefile makes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def variables(server: dict[str, str], cwd: Path, **more: str) -> dict[str, str]:
    """What a program finds in its environment that knows the server by any protocol."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "TINKER_BASE_URL": server["WEAVER_BASE_URL"],
        "TINKER_API_KEY": f"tml-{server['WEAVER_API_KEY']}",
        "OPENAI_BASE_URL": f"{server['WEAVER_BASE_URL']}/v1",
        "OPENAI_API_KEY": server["WEAVER_API_KEY"],
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def run_python(
    environment: str, *arguments: str, cwd: Path, env: dict[str, str], timeout_s: float = 200
) -> str:
    """What the environment's Python prints, which must not fail."""
    done = subprocess.run(
        [ROOT / environment / "bin" / "python", *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def run_tinker(
    program: str, *arguments: str, server: dict[str, str], cwd: Path, release: str
) -> str:
    """A program of this folder, with a release of the package `tinker`."""
    env = variables(server, cwd, PYTHONPATH=str(ROOT / ".venv-tinker" / release))
    return run_python(".venv-tinker", str(HERE / program), *arguments, cwd=cwd, env=env)
