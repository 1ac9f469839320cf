"""The house rules that a tool can check: sizes, broad excepts, unfinished marks, lazy imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("weaver", "weaver_rl", "recipes")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = (
    "torch",
    "transformers",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "wandb",
    "rich",
    "ray",
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_one_noun(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400
    tree = ast.parse(source)
    if tree.body:
        assert ast.get_docstring(tree), "says what it is and who calls it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno
            assert length <= 120, f"{node.name} has {length} lines"
    for mark in ("TODO", "FIXME", "XXX", "NotImplementedError", "noqa"):
        assert mark not in source


@pytest.mark.parametrize("package", ["weaver", "weaver_rl"])
def test_importing_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_map_names_files_that_are_there(page: str) -> None:
    named = re.findall(r"`((?:weaver|weaver_rl|recipes|tests)/[\w/.]+)`", (ROOT / page).read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
