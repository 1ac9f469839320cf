"""Clients that are not heard of any more, and those that only wait."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.client.helpers import DATUMS
from tests.contracts.caller import Caller
from tests.fake_engine import FakeEngine
from tests.server.http.helpers import serving
from tests.server.test_durability import until
from weaver import AsyncServiceClient
from weaver.client import session
from weaver.client.http import HttpService
from weaver.errors import NotFoundError
from weaver.server.service import LocalService
from weaver.server.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio
CLIENT = """
import sys, time
from weaver import Datum, ServiceClient
client = ServiceClient(sys.argv[1])
trainer = client.create_model("fake", lora_config={"rank": 4})
sampler = trainer.save_weights_and_get_sampling_client()
datum = Datum(model_input=[1, 2, 3], loss_fn_inputs={"target_tokens": [2, 3, 4]})
for _ in range(20):
    trainer.forward_backward([datum])
    trainer.optim_step({"learning_rate": 0.1})
for _ in range(50):
    sampler.sample("x", {"max_tokens": 4000}, num_samples=50, wait=False)
client.create_sampling_client(base_model="fake")  # answered, so all before it was accepted
print(trainer.model_id, flush=True)
time.sleep(60)
"""


def die(address: str) -> str:
    """The run of a client that was killed as soon as its work was accepted."""
    command = [sys.executable, "-c", CLIENT, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        process.kill()
    return run


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_client_that_dies_leaves_its_runs_and_nothing_else(home: Path) -> None:
    def slow(name: str, argument: object) -> None:
        if name == "forward_backward":
            time.sleep(0.02)

    engine = FakeEngine(hook=slow)
    settings = ServerSettings(home=home, port=0, auth=False, limits=Limits(session_timeout_s=0.6))
    with serving(engine, settings) as server:
        run = await anyio.to_thread.run_sync(die, server.address)
        async with HttpService(server.address) as service:
            assert [one.unnamed_samplers for one in await service.list_sessions()] == [1]
            assert engine.sampler.busy

            async def ended() -> bool:
                return not (
                    await service.list_sessions()
                    or engine.sampler.busy
                    or any("unnamed" in name for name in engine.sampler.weights_ids)
                    or list((home / "live" / run).glob("sampler/*"))
                    or (await service.get_run(run)).step < 20
                )

            await until(ended)
            assert (await service.get_run(run)).step == 20


async def test_a_client_that_waits_is_heard_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.05)
    limits = Limits(session_timeout_s=0.5)
    async with (
        LocalService(FakeEngine(), home=home, limits=limits) as service,
        AsyncServiceClient(service=service, home=home) as client,
    ):
        trainer = await client.create_model("fake", {"rank": 4})
        silent, polling = await Caller.open(service), await Caller.open(service)
        assert not await service.collect(polling.session_id, after=0, timeout_s=1.5)
        with pytest.raises(NotFoundError, match="not heard of for too long"):
            await service.collect(silent.session_id, after=0, timeout_s=0)
        await trainer.forward(DATUMS)
        await polling.create()
