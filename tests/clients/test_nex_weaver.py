"""The published client `nex-weaver`, unmodified and in an environment of its own, at our server.

`make test-clients` makes the environment (.venv-clients) and runs this. The client owns the import
name `weaver`, so it cannot live in the same one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
CLIENT = HERE.parents[1] / ".venv-clients" / "bin"
WEAVER = Path(sys.executable).with_name("weaver")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with keys; what its clients have in their environment."""
    folder = tmp_path_factory.mktemp("server")
    home, log = str(folder / "home"), folder / "log"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("WEAVER_")}
    key = subprocess.run(
        [WEAVER, "keys", "create", "--project", "clients", "--home", home],
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = [WEAVER, "serve", "--port", "0", "--home", home, "--threads", "1"]
    with log.open("w") as stderr, subprocess.Popen(command, env=plain, stderr=stderr) as process:
        while (address := re.search(r"Weaver at (\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        secret = re.search(r"wv-\S+", key)
        assert secret is not None
        yield {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "WEAVER_BASE_URL": address[1],
            "WEAVER_API_KEY": secret[0],
        }
        process.terminate()
    assert process.returncode == 0, log.read_text()


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
