"""The notebooks of docs/ run from top to bottom, by nbmake; the one about a server on a server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.clients.server import serving

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_what_it_said_and_no_paths_of_a_machine(notebook: Path) -> None:
    text = notebook.read_text()
    assert "/home/" not in text and "/tmp/" not in text and "Traceback" not in text
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code)
    assert {o.get("name", "stdout") for cell in code for o in cell["outputs"]} == {"stdout"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    shutil.copy(notebook, tmp_path)
    env = {k: v for k, v in os.environ.items() if not k.startswith("WEAVER_")}
    env |= {"WEAVER_HOME": str(tmp_path / "home"), "WEAVER_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        if "server" in notebook.stem:
            (tmp_path / "server").mkdir()
            there = stack.enter_context(serving(tmp_path / "server"))
            env |= {k: v for k, v in there.items() if k.startswith("WEAVER_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake",
             "--overwrite", f"--rootdir={tmp_path}", notebook.name],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if "server" in notebook.stem:
        cells = json.loads((tmp_path / notebook.name).read_text())["cells"]
        assert "on a server" in str([cell.get("outputs") for cell in cells])
