"""Settings come from WEAVER_* and from nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import weaver
from weaver.config import Settings, load_settings
from weaver.errors import ConfigError


def test_defaults() -> None:
    assert load_settings({}) == Settings(home=Path("~/.weaver").expanduser())


def test_all_variables() -> None:
    settings = load_settings(
        {
            "WEAVER_BASE_URL": "http://localhost:8000",
            "WEAVER_API_KEY": "secret",
            "WEAVER_HOME": "/data",
            "WEAVER_DEVICE": "cuda",
            "WEAVER_DTYPE": "bfloat16",
            "WEAVER_THREADS": "2",
            "WEAVER_DETERMINISTIC": "1",
        }
    )
    assert settings.base_url == "http://localhost:8000"
    assert (settings.home, settings.device, settings.dtype) == (Path("/data"), "cuda", "bfloat16")
    assert (settings.threads, settings.deterministic) == (2, True)
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WEAVER_BASE_URL", "localhost:8000"),
        ("WEAVER_DTYPE", "int8"),
        ("WEAVER_THREADS", "many"),
        ("WEAVER_DETERMINISTIC", "yes"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_settings({name: value})


def test_only_config_reads_the_environment() -> None:
    root = Path(weaver.__file__).parent
    for path in root.rglob("*.py"):
        if path == root / "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            assert name not in ("environ", "getenv"), f"{path}:{getattr(node, 'lineno', 0)}"
