"""The published packages `tinker` and `openai`, unmodified and in an environment of their own.

`make test-clients` makes the environment (.venv-tinker) and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients import methods
from tests.clients.environments import HERE, run_python, run_tinker
from tests.clients.server import TOOLS, WEAVER, serving
from weaver import ServiceClient, types

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.clients


def runs_of(server: dict[str, str]) -> list[dict[str, Any]]:
    listed = subprocess.run(
        [WEAVER, "runs", "list", "-o", "json"],
        env={**os.environ, **server},
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


def run_called(model_id: str, server: dict[str, str]) -> str:
    """The id of the run that the `tinker` package calls so, as `weaver runs` lists it."""
    (run,) = (
        one["run_id"]
        for one in runs_of(server)
        if one["user_metadata"].get("tinker", {}).get("model_id") == model_id
    )
    return str(run)


@pytest.mark.parametrize("release", ["0.24.1", "0.25.0", "0.30.0", "0.38.0"])
def test_its_whole_flow_runs(server: dict[str, str], tmp_path: Path, release: str) -> None:
    """Every loss, custom ones, checkpoints, resuming, samples, listings, a model that is not there.

    0.24 is the last release that sends training data as JSON. What it made is then sampled by the
    client of another protocol, and listed by our own.
    """
    out = run_tinker("tinker_flow.py", server=server, cwd=tmp_path, release=release)
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert told["version"] == release
    run = run_called(told["model_id"], server)
    run_tinker(
        "openai_flow.py", "weaver-nano", run, TOOLS, server=server, cwd=tmp_path, release=release
    )


def test_all_protocols_are_spoken_at_once(tmp_path: Path) -> None:
    """Three published clients train and sample beside each other and beside our own."""
    home = tmp_path / "server"
    home.mkdir()
    with serving(home) as server:
        speak_all(server, tmp_path)


def speak_all(server: dict[str, str], tmp_path: Path) -> None:

    def tinker(*_: object) -> str:
        folder = tmp_path / "tinker"
        folder.mkdir()
        return run_tinker("tinker_flow.py", server=server, cwd=folder, release="0.38.0")

    def weaver_rest(*_: object) -> str:
        script = str(HERE / "sync_flow.py")
        return run_python(".venv-clients", script, "default", "raw", cwd=tmp_path, env=server)

    def native(*_: object) -> str:
        with ServiceClient(server["WEAVER_BASE_URL"], api_key=server["WEAVER_API_KEY"]) as client:
            trainer = client.create_model("weaver-nano", lora_config={"rank": 4})
            datum = types.Datum(model_input=[5, 6, 7], loss_fn_inputs={"target_tokens": [6, 7, 8]})
            for _ in range(20):
                trainer.forward_backward([datum])
                trainer.optim_step(types.AdamParams(learning_rate=1e-3), wait=True)
            sampler = trainer.save_weights_and_get_sampling_client(name="kept")
            assert sampler.sample([5, 6], {"max_tokens": 4}).sequences
            return trainer.model_id

    with ThreadPoolExecutor() as pool:
        began = [pool.submit(one) for one in (tinker, weaver_rest, native)]
        theirs, rest, ours = (one.result().splitlines()[-1] for one in began)
    run = run_called(json.loads(theirs)["model_id"], server)
    made = {one["run_id"] for one in runs_of(server)}
    assert {run, ours, rest.split()[-2]} <= made
    with ServiceClient(server["WEAVER_BASE_URL"], api_key=server["WEAVER_API_KEY"]) as client:
        [path] = [
            one.path for one in client.list_checkpoints(run) if one.kind == "sampler"
        ]  # that a run of Tinker's has, for our own client
        assert client.create_sampling_client(path).sample([5, 6], {"max_tokens": 4}).sequences
    for one in (run, ours):
        run_tinker(
            "openai_flow.py",
            "weaver-nano",
            one,
            TOOLS,
            server=server,
            cwd=tmp_path,
            release="0.38.0",
        )


def test_the_page_says_what_becomes_of_each_method(server: dict[str, str], tmp_path: Path) -> None:
    """`make tinker-methods` writes what the page should have."""
    page = methods.PAGE.read_text()
    assert methods.written(page) == methods.probed(server, tmp_path)
