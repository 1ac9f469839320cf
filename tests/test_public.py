"""What `weaver` exports, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import weaver
from weaver import errors, types

HEAVY = ("torch", "transformers", "starlette", "fastapi", "sqlalchemy", "sqlite3", "httpx", "rich")


def test_every_name_is_there_and_listed_once() -> None:
    assert len(weaver.__all__) == len(set(weaver.__all__))
    for name in weaver.__all__:
        assert getattr(weaver, name) is not None
    with pytest.raises(AttributeError, match="ServiceClients"):
        _ = weaver.ServiceClients


def test_all_holds_the_clients_every_error_and_every_type_users_meet() -> None:
    clients = {f"{mode}{name}Client" for mode in ("", "Async") for name in _NOUNS}
    raised = {error.__name__ for error in errors.CODES.values()}
    met = {
        name
        for name, value in vars(types).items()
        if inspect.isclass(value) and issubclass(value, types.Value) and value is not types.Value
    }
    assert set(weaver.__all__) == clients | raised | met | {
        "Handle",
        "OperationHandle",
        "TensorData",
        "types",
    }


_NOUNS = ("Service", "Training", "Sampling", "Reward")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(weaver.__file__).read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weaver"):
            names = {alias.name for alias in node.names}
            imported |= set(import_module(node.module or "").__all__) if names == {"*"} else names
    assert imported - {"errors"} == set(weaver.__all__)


@pytest.mark.parametrize("statement", ["import weaver", "from weaver import ServiceClient, types"])
def test_importing_is_light(statement: str) -> None:
    script = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
