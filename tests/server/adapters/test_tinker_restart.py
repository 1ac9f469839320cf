"""Tinker's protocol over a server that is killed: what was accepted answers later, and is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from tests.server.adapters.tinker import Tinker
from tests.server.test_kill import running
from weaver.server.adapters.tinker import messages

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
SLOW_STEPS = """
from tests.fake_engine import FakeEngine
engine = FakeEngine(hook=lambda name, argument: name == "optim_step" and time.sleep(2))
"""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_futures_and_samplers_outlive_the_server(tmp_path: Path) -> None:
    with running(tmp_path, SLOW_STEPS) as server:
        key = {"X-API-Key": f"tml-{server.keys[0]}"}
        async with httpx.AsyncClient(base_url=server.url, headers=key, timeout=60) as http:
            api = Tinker(http)
            model_id = await api.model()
            first = await api.backward(model_id, 1)
            passed = await api.binary(first)
            opening = {"model_id": model_id, "sampling_session_seq_id": 0, "seq_id": 2}
            opened = await api.call("save_weights_for_sampler", opening)
            called = (await api.result(opened))["sampling_session_id"]
            sampled = await api.binary(await api.sample(called))
            step = await api.step(model_id, 3)
            save = {"model_id": model_id, "path": "a", "seq_id": 4}
            saving = await api.call("save_weights", save)

            server.kill()
            server.start()

            assert await api.binary(first) == passed
            assert await api.backward(model_id, 1) == first
            assert (await api.result(step))["metrics"]["step"] == 1
            path = (await api.result(saving))["path"]
            again = await api.sample(called)
            assert await api.binary(again) == sampled
            fresh = messages.SampleResponse.FromString(
                await api.binary(await api.sample(called, 1))
            )
            before = messages.SampleResponse.FromString(sampled)
            assert fresh.sequences[0].tokens == before.sequences[0].tokens
            loading = {"session_id": model_id.partition(":")[0], "model_seq_id": 1, "path": path}
            loaded = await api.result(await api.call("load_weights", loading))
            server.kill()
            server.start()
            await api.result(await api.backward(loaded["model_id"], 1))
            assert (await api.result(await api.step(loaded["model_id"], 2)))["metrics"]["step"] == 2
