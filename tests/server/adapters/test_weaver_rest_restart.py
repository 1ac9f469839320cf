"""The Weaver REST interface over a server that is killed: an accepted operation answers later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.server.adapters.helpers import CHUNKS, DATUM, Rest, passes, rest
from tests.server.test_kill import running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
SLOW_STEPS = """
from tests.fake_engine import FakeEngine
engine = FakeEngine(hook=lambda name, argument: name == "optim_step" and time.sleep(4))
"""
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_operations_outlive_the_server(tmp_path: Path) -> None:
    with running(tmp_path, SLOW_STEPS) as server:
        key = {"X-WEAVER-API-KEY": server.keys[0]}
        async with httpx.AsyncClient(base_url=server.url, headers=key, timeout=60) as http:
            api = Rest(http)
            model_id = await api.model()
            passing = f"/models/{model_id}/forward-backward-passes"
            body = passes("forward_backward", data=[DATUM, {**DATUM, "datum_id": "second"}])
            passed = await api.call("POST", passing, body, **TRACE)
            sampling = f"/sampling-sessions/{await api.sampler(model_id)}"
            long = {"prompt": CHUNKS, "num_samples": 2, "return_old_logprob": True}
            sampled = await api.call("POST", f"{sampling}/samples", long)
            await api.call("POST", f"{sampling}/pause-generation", {"mode": "in_place"})
            held = await api.call("POST", f"{sampling}/samples", {"prompt": CHUNKS})
            stepping = await api.step(model_id)
            saving = await api.call("POST", f"/models/{model_id}/checkpoints", {"name": "a"})
            assert [o["status"] for o in (passed, sampled)] == ["done", "done"]
            assert [o["status"] for o in (held, stepping, saving)] == ["pending"] * 3

            server.kill()
            server.start()

            async def get(operation: Any) -> Any:
                return await api.call("GET", f"/operations/{operation['id']}")

            assert await get(passed) == passed
            assert await get(sampled) == sampled
            assert (await api.result(stepping))["metrics"]["step"] == 1
            assert (await api.result(saving))["name"] == "a"
            assert len((await api.result(held))["result"]["sequences"]) == 1
            assert await api.call("POST", passing, body, **TRACE) == passed
            assert (await api.call("GET", f"/models/{model_id}"))["last_seq_id"] == 4
            assert (await api.backward(model_id, 5))["status"] == "done"
            assert (await api.result(await api.step(model_id, 6)))["metrics"]["step"] == 2
            await api.call("GET", f"/operations/{'0' * 32}", status=404)


async def test_with_the_last_outcome_its_session_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rest(tmp_path) as api:
        model_id = await api.model()
        first = await api.backward(model_id)
        monkeypatch.setattr("weaver.server.http.caller_session.KEPT_S", -1.0)
        step = await api.step(model_id)
        await api.call("GET", f"/operations/{first['id']}", status=404)
        assert (await api.result(step))["metrics"]["step"] == 1
