"""An engine that trains in torch and samples by workers: what its settings must be."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine.cluster.kit import WAIT_S
from tests.engine.cluster.torch_standin import an_environment
from weaver import ServiceClient
from weaver.config import load_settings
from weaver.engine.cluster.beside import beside_torch
from weaver.errors import ConfigError, InvalidParamsError
from weaver.types import Datum

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """Settings of an engine of stand-ins."""
    return {
        "WEAVER_HOME": str(tmp_path / "home"),
        "WEAVER_DEVICE": "cpu",
        "WEAVER_SAMPLER": "vllm",
        "WEAVER_SAMPLER_ENV": str(an_environment(tmp_path / "env")),
    }


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WEAVER_QUANTIZE", "int8", "another base"),
        ("WEAVER_DETERMINISTIC", "1", "what else runs"),
        ("WEAVER_SAMPLER_MAX_RANK", "513", "512 at most"),
        ("WEAVER_SAMPLER_ENV", "/no/such", "install-sampler"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    given: dict[str, str], name: str, value: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        beside_torch(load_settings({**given, name: value}))
    assert refused.value.field == name.removeprefix("WEAVER_").lower()


def test_what_an_engine_that_was_killed_has_left_goes(given: dict[str, str]) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **PIPED)
    folder = Path(given["WEAVER_HOME"], "sampler")
    names = [f"{socket.gethostname()}-{gone.stdout.strip()}-x", "elsewhere-1-x", "logs"]
    for name in names:
        (folder / name).mkdir(parents=True)
    engine = beside_torch(load_settings(given))
    try:
        assert [(folder / name).exists() for name in names] == [False, True, True]
        assert "vLLM" in engine.description
    finally:
        engine.close()
    assert sorted(p.name for p in folder.iterdir()) == ["elsewhere-1-x", "logs"]


PIPED: dict[str, object] = {"capture_output": True, "text": True, "check": True}


@pytest.fixture
def server(given: dict[str, str]) -> Iterator[str]:
    """The address of `weaver serve --sampler vllm`."""
    options = ["--home", given["WEAVER_HOME"], "--sampler-env", given["WEAVER_SAMPLER_ENV"]]
    options += ["--sampler", "vllm", "--sampler-max-rank", "16"]
    options += ["--device", "cpu", "--port", "0", "--no-auth"]
    program = "from weaver.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", *options], stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Weaver at "):
                yield line.split()[2]
                break
        process.terminate()
        process.communicate(timeout=WAIT_S)


@pytest.mark.timeout(300)
def test_a_server_trains_and_its_workers_sample(server: str) -> None:
    with ServiceClient(server) as service:
        with pytest.raises(InvalidParamsError, match="16 at most"):
            service.create_model("weaver-nano", {"rank": 32})
        trainer = service.create_model("weaver-nano", {"rank": 4})
        datum = Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})
        trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step({"learning_rate": 0.01}).result()
        sampler = trainer.save_weights_and_get_sampling_client()
        result = sampler.sample("hello", {"max_tokens": 4, "temperature": 0.5}, num_samples=3)
        assert {s.weights_version for s in result.sequences} == {1}
        scores = sampler.compute_logprobs([1, 2, 3])
        assert scores[0] is None and len(scores) == 3
