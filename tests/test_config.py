"""Settings come from WEAVER_* and from nowhere else."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import weaver
from weaver.config import Option, Settings, changed, load_settings, options, setting
from weaver.errors import ConfigError
from weaver.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterable

DOCS = Path(__file__).parents[1] / "docs"


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
            "WEAVER_MEMORY_GB": "1.5",
            "WEAVER_KV_CACHE_GB": "0.5",
            "WEAVER_SAMPLE_ROWS": "7",
            "WEAVER_DETERMINISTIC": "1",
        }
    )
    assert settings.base_url == "http://localhost:8000"
    assert (settings.home, settings.device, settings.dtype) == (Path("/data"), "cuda", "bfloat16")
    assert (settings.threads, settings.memory_gb, settings.deterministic) == (2, 1.5, True)
    assert (settings.kv_cache_gb, settings.sample_rows) == (0.5, 7)
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WEAVER_BASE_URL", "localhost:8000"),
        ("WEAVER_DTYPE", "int8"),
        ("WEAVER_THREADS", "many"),
        ("WEAVER_MEMORY_GB", "-1"),
        ("WEAVER_RECOMPUTE", "some"),
        ("WEAVER_MEMORY_GB", "nan"),
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


@dataclass(frozen=True, kw_only=True)
class Inner:
    size_bytes: int = setting(5, "Of a thing.", name="max_bytes", least=1)
    unset: int = 7


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner(size_bytes=6)
    home: Path = setting(Path("~/things"), "Of things.", variables=("THINGS",))
    token: str | None = setting(None, "Of access.", secret=True)


def test_a_field_is_all_that_a_setting_needs() -> None:
    size, home, token = options(Outer())
    assert (size.name, size.default, size.type, size.least) == ("max_bytes", 6, int, 1)
    assert home.variables == ("WEAVER_HOME", "THINGS") and token.help == "Of access."
    made = changed(Outer(), {"max_bytes": 9, "token": "s3cret", "other": 1})
    assert made == Outer(inner=Inner(size_bytes=9), home=Path.home() / "things", token="s3cret")
    assert "s3cret" not in repr(made)


def test_the_pages_have_every_setting() -> None:
    flags = table(("option", "variable", "default", ""), map(flag_row, options(ServerSettings())))
    assert flags in (DOCS / "serving.md").read_text(), flags
    variables = table(("variable", "meaning", "default"), map(variable_row, options(Settings())))
    assert variables in (DOCS / "embedded.md").read_text(), variables


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(cells)} |\n".replace("  ", " ") for cells in lines)


def flag_row(option: Option) -> tuple[str, ...]:
    name = option.name.replace("_", "-")
    flag = f"`--{'no-' if option.default is True else ''}{name}`"
    names = ", ".join(f"`{variable}`" for variable in option.variables)
    return flag, names, written(option.default), option.help


def variable_row(option: Option) -> tuple[str, ...]:
    return f"`{option.variables[0]}`", option.help, written(option.default)


def written(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 2**28:
        return f"{default // 2**20} MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)
