"""`weaver serve --config`: what wins, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import typer

from weaver.cli import app
from weaver.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def options(*arguments: str) -> dict[str, Any]:
    """What `weaver serve` would be called with."""
    group = typer.main.get_command(app)
    command = group.get_command(group.make_context("weaver", ["serve"]), "serve")  # type: ignore[attr-defined]
    params: dict[str, Any] = command.make_context("serve", list(arguments)).params
    return params


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weaver.toml"
    file.write_text(
        'home = "~/kept"\nhost = "::1"\nport = 1\nthreads = 2\nmodel = ["a=b", "c/d"]\n'
        "snapshot-every = 3\nsnapshot_every_steps = 4\nauth = false\n"
    )
    monkeypatch.setenv("WEAVER_PORT", "5")
    monkeypatch.setenv("WEAVER_THREADS", "6")
    got = options("--config", str(file), "--port", "7")
    assert (got["port"], got["threads"], got["host"], got["dtype"]) == (7, 6, "::1", "auto")
    assert str(got["home"]) == "~/kept"
    assert got["model"] == ["a=b", "c/d"] and got["auth"] is False
    assert (got["snapshot_every"], got["snapshot_every_steps"]) == (3.0, 4)
    monkeypatch.setenv("WEAVER_CONFIG", str(file))
    assert options("--auth")["host"] == "::1" and options("--auth")["auth"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", r"unknown key 'prot'.*Did you mean 'port'"),
        ("config = 'x'", "unknown key 'config'"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("port = 'eight'", "port is 'eight'.*integer"),
        ("model = 'one'", "model is 'one'.*list"),
        ("port = 65536", "port is 65536.*less than or equal to 65535"),
        ("max_runs = -1", "max_runs is -1.*greater than or equal to 0"),
        ("home = 1", "home is 1.*path"),
        ("dtype = 'int8'", "dtype is 'int8'.*'auto', 'float32' or 'bfloat16'"),
        ("port =", "cannot be read"),
        ("port = 1\nhost = x", "cannot be read.*line 2"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "weaver.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        options("--config", str(file))
    with pytest.raises(ConfigError, match="No such file"):
        options("--config", str(tmp_path / "none.toml"))
