"""The published client `nex-weaver`, unmodified and in an environment of its own, at our server.

`make test-clients` makes the environment (.venv-clients) and runs this. The client owns the import
name `weaver`, so it cannot live in the same one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
CLIENT = HERE.parents[1] / ".venv-clients" / "bin"


def run(program: str, *arguments: str, env: dict[str, str], cwd: Path) -> str:
    """The output of a program of the client's environment."""
    done = subprocess.run(
        [CLIENT / program, *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def flow(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The whole flow over JSON: the id of its model and its checkpoint's path."""
    folder = tmp_path_factory.mktemp("flow")
    out = run("python", str(HERE / "sync_flow.py"), "default", "raw", env=server, cwd=folder)
    return out.split()[-2:]


def test_its_whole_flow_runs(flow: list[str]) -> None:
    model_id, path = flow
    assert path.startswith(f"weaver://{model_id}/")


@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_its_whole_flow_runs_with_binary_tensors(
    server: dict[str, str], tmp_path: Path, compression: str
) -> None:
    script = str(HERE / "sync_flow.py")
    run("python", script, "http-binary", compression, env=server, cwd=tmp_path)


def test_its_async_flow_runs(server: dict[str, str], tmp_path: Path) -> None:
    run("python", str(HERE / "async_flow.py"), env=server, cwd=tmp_path)


def test_its_command_line_runs(server: dict[str, str], tmp_path: Path, flow: list[str]) -> None:
    model_id, path = flow

    def weaver(*arguments: str) -> str:
        return run("weaver", *arguments, env={**server, "COLUMNS": "200"}, cwd=tmp_path)

    for noun in ("models", "training-runs"):
        rows = json.loads(weaver("list", noun, "--limit", "100", "--format", "json"))
        assert model_id in json.dumps(rows)
    assert "weaver-nano" in weaver("list", "supported-models", "--format", "json")
    assert model_id in weaver("show", "model", model_id)
    assert path in weaver("show", "training-run", model_id)
    weaver("checkpoint", "export", path)
    weaver("checkpoint", "download", path, "--output", "exported")
    assert (tmp_path / "exported" / "adapter_config.json").is_file()


def test_a_wrong_key_is_named(server: dict[str, str], tmp_path: Path) -> None:
    code = "from weaver import ServiceClient; ServiceClient().connect()"
    wrong = {**server, "WEAVER_API_KEY": "wv-wrong"}
    done = subprocess.run(
        [CLIENT / "python", "-c", code], env=wrong, cwd=tmp_path, capture_output=True, text=True
    )
    assert "[401] unauthenticated" in done.stderr
