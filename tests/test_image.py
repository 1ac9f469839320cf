"""The quick start of docs/deployment.md, against the image `weaver` that its first line builds."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from weaver import ServiceClient
from weaver.types import Datum

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NAME = "weaver-image-test"
TEXT = [5 + i % 50 for i in range(60)]
DATUM = Datum(model_input=TEXT[:-1], loss_fn_inputs={"target_tokens": TEXT[1:]})


def podman(*words: str) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture
def container() -> Iterator[str]:
    if not shutil.which("podman"):
        pytest.skip("needs podman")
    if subprocess.run(["podman", "image", "exists", "weaver"]).returncode:
        pytest.skip("podman has no image weaver: podman build -f deploy/Dockerfile -t weaver .")
    volume = f"{NAME}:/var/lib/weaver"
    try:
        podman("run", "--rm", "--entrypoint=id", "weaver")
    except AssertionError as error:
        pytest.skip(f"podman runs no container here: {error}")
    podman("run", "--detach", "--name", NAME, "--publish=127.0.0.1::8000", "--volume", volume,
           "weaver")  # fmt: skip
    try:
        yield NAME
    finally:
        podman("rm", "--force", "--volumes", NAME)
        podman("volume", "rm", NAME)


def ready() -> str:
    """The server's address, once it is."""
    url = f"http://{podman('port', NAME, '8000')}"
    end = time.monotonic() + 120
    while True:
        try:
            urlopen(f"{url}/readyz", timeout=5).close()
        except (URLError, ConnectionError):
            assert time.monotonic() < end, podman("logs", NAME)
            time.sleep(0.2)
        else:
            return url


def test_it_serves_without_root_keeps_its_runs_and_ends_in_order(container: str) -> None:
    url = ready()
    assert podman("exec", container, "id", "-u") == "10001"
    key = podman("exec", container, "weaver", "keys", "create", "--project", "research")
    with ServiceClient(url, api_key=key.split()[0]) as client:
        trainer = client.create_model("weaver-nano", {"rank": 4}, name="quick")
        trainer.forward_backward([DATUM], "cross_entropy")
        trainer.optim_step({"learning_rate": 1e-2})
        sampler = trainer.save_weights_and_get_sampling_client()
        assert sampler.sample([5, 6], {"max_tokens": 4}).sequences
    podman("restart", container)
    with ServiceClient(ready(), api_key=key.split()[0]) as client:
        assert client.attach("quick").get_info().step == 1
    podman("kill", "--signal=TERM", container)
    assert podman("wait", container) == "0"
